"""Every bundle that trains on a folder of scans and labels runs: training, evaluation, inference, resuming."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_cases import SMALL, SMALL_TRAINING, WARNINGS, BundleCase, cases, run, train_in_two_processes
from conftest import phantom
from pages import Page

from memnet.bundle import input_error

pytestmark = WARNINGS


@pytest.fixture
def data(case: BundleCase, request: pytest.FixtureRequest) -> Path:
    """The small data set of the bundle under test."""
    return request.getfixturevalue(case.data)


@cases
@pytest.mark.parametrize("network_name", ["baseline", "partially", "fully"])
def test_trains_evaluates_and_segments(
    case: BundleCase, data: Path, network_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = {"network_name": network_name, "dataset_dir": str(data)}
    trained = tmp_path / "trained"
    run(case.folder, "training", "train.json", **SMALL_TRAINING, **common, epochs=1, output_dir=str(trained))
    assert {"model_best.pt", "model_last.pt", "tensorboard"} <= {p.name for p in trained.iterdir()}

    best = str(trained / "model_best.pt")
    evaluated = tmp_path / "evaluated"
    options = {**SMALL, "num_workers": 0, **common, "ckpt_path": best, "output_dir": str(evaluated), "subset": "all"}
    run(case.folder, "evaluating", "train.json", "evaluate.json", **options)
    rows = (evaluated / "val_mean_dice_raw.csv").read_text().splitlines()
    assert [Path(row.split(",")[0]).name for row in rows[1:]] == case.scans
    assert case.metric in (evaluated / "metrics.csv").read_text()
    page = Page(evaluated / "evaluation.html")
    assert page.column("mean") == [f"{float(row.split(',')[-1]):.4g}" for row in rows[1:]]
    assert page.column("case") == case.scans and len(page.images) == 3
    assert page.row("case")[:3] == list(case.columns)

    segmented = tmp_path / "segmented"
    run(case.folder, "run", "inference.json", **SMALL, **common, ckpt_path=best, output_dir=str(segmented))
    outputs = {f"{name.split('.')[0]}_{case.postfix}.nii.gz" for name in case.scans}
    assert {p.name for p in segmented.iterdir()} == {*outputs, case.table, "inference.html"}
    page = Page(segmented / "inference.html")
    table = list(csv.reader((segmented / case.table).read_text().splitlines()))
    assert page.column("label map") == sorted(outputs, key=page.column("label map").index) and len(page.images) == 3
    for column, *values in zip(*table, strict=True):
        assert column == "file" or page.column(column) == [f"{float(value):.4g}" for value in values]
    assert page.row("weights") == [f"{best}, SHA-256 {hashlib.sha256(Path(best).read_bytes()).hexdigest()}"]


@cases
def test_training_leaves_the_shipped_weights_alone(
    case: BundleCase, data: Path, shipped: Callable[[Path], Path]
) -> None:
    copy = shipped(case.folder)
    before = (copy / "models" / "model.pt").read_bytes()
    run(copy, "run", "train.json", **SMALL_TRAINING, dataset_dir=str(data), epochs=1)
    assert (copy / "models" / "model.pt").read_bytes() == before
    assert (copy / "eval" / "model_best.pt").is_file()


@cases
@pytest.mark.parametrize("network", ["fully", "baseline"])
def test_trains_within_a_memory_budget_to_the_same_weights(
    case: BundleCase, network: str, data: Path, tmp_path: Path
) -> None:
    options = {**SMALL_TRAINING, "dataset_dir": str(data), "epochs": 1, "network_name": network}
    for memory, more in (("store", {}), ("auto", {"network_def#memory_budget": "10MB"})):
        run(case.folder, "training", "train.json", **options, **more, memory=memory, output_dir=str(tmp_path / memory))
    plain, fitted = (torch.load(tmp_path / name / "model_best.pt", weights_only=True) for name in ("store", "auto"))
    assert all(torch.equal(plain[key], fitted[key]) for key in plain)


@cases
def test_fine_tuning_begins_with_the_weights_given(
    case: BundleCase, data: Path, random_weights: Callable[..., Path], tmp_path: Path
) -> None:
    small = {k: v for k, v in SMALL.items() if k.startswith("network_def")}
    weights = random_weights(case.folder, **small)
    options = {**SMALL_TRAINING, "dataset_dir": str(data), "epochs": 1, "pretrained": str(weights)}
    # a step of next to nothing, so that the end shows the beginning
    run(case.folder, "training", "train.json", **options, learning_rate=1e-12, output_dir=str(tmp_path / "out"))
    tuned = torch.load(tmp_path / "out" / "model_best.pt", weights_only=True)
    given = torch.load(weights, weights_only=True)
    assert any(key.startswith("vae.") for key in tuned) and not any(key.startswith("vae.") for key in given)
    for key, value in given.items():
        torch.testing.assert_close(tuned[key], value, msg=key)
    wrong = str(random_weights(case.folder, **small, network_name="baseline"))
    with pytest.raises(RuntimeError) as raised:
        run(
            case.folder,
            "training",
            "train.json",
            **{**options, "pretrained": wrong, "output_dir": str(tmp_path / "wrong")},
        )
    assert "do not fit FullyInvResUNet" in str(input_error(raised.value))


@cases
def test_resuming_gives_the_uninterrupted_result(case: BundleCase, data: Path, tmp_path: Path) -> None:
    def train(name: str, epochs: int, **overrides: Any) -> dict[str, Any]:
        options = {**SMALL_TRAINING, "val_interval": 2, "dataset_dir": str(data), **overrides}
        # the scheduler counts on all epochs, as it would in a training that is cut off
        options |= {"epochs": 3, "train#trainer#max_epochs": epochs, "output_dir": str(tmp_path / name)}
        run(case.folder, "run", "train.json", **options)
        return torch.load(tmp_path / name / "model_last.pt", weights_only=True)

    whole = train("whole", 3)
    train("cut", 1)
    resumed = train("cut", 3, resume=True)
    assert resumed["epoch"] == whole["epoch"] == 3
    assert resumed["best_metric"] == whole["best_metric"]
    assert resumed["lr_scheduler"] == whole["lr_scheduler"]
    for key, value in whole["model"].items():
        assert torch.equal(resumed["model"][key], value), key
    for index, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(resumed["optimizer"]["state"][index][k], v) for k, v in state.items())
    other = train("other", 3, seed=1)
    assert any(not torch.equal(other["model"][key], value) for key, value in whole["model"].items())


@cases
def test_trains_in_two_processes(case: BundleCase, data: Path, tmp_path: Path) -> None:
    overrides = {**SMALL_TRAINING, "dataset_dir": data, "output_dir": tmp_path, "epochs": 1}
    overrides.pop("device")
    train_in_two_processes(case.folder, **overrides)
    state = torch.load(tmp_path / "model_last.pt", weights_only=True)
    # two training cases over two processes are one iteration each
    assert state["iteration"] == 1
    assert not any(key.startswith("module.") for key in state["model"])
    # one process alone writes curves
    writers = {file.name.rsplit(".", 2)[1] for file in (tmp_path / "tensorboard").iterdir()}
    assert len(writers) == 1, writers


ORIENTATIONS = {
    "RAS, 1 mm": np.diag([1.0, 1.0, 1.0, 1.0]),
    "LPS, anisotropic": np.diag([-0.9, -1.1, 2.0, 1.0]),
    "ASL, permuted": np.array([[0, 0, -1.3, 40], [0.8, 0, 0, -20], [0, 1.2, 0, 7], [0, 0, 0, 1.0]]),
    "oblique": np.array([[0.96, -0.28, 0, -10], [0.28, 0.96, 0, 5], [0, 0, 1.5, 0], [0, 0, 0, 1.0]]),
}
orientations = pytest.mark.parametrize("affine", ORIENTATIONS.values(), ids=ORIENTATIONS)


@cases
@orientations
def test_label_map_lies_on_the_input_grid(
    case: BundleCase,
    affine: np.ndarray,
    random_weights: Callable[..., Path],
    write_nifti: Callable[..., Path],
    tmp_path: Path,
) -> None:
    t1, _, _ = phantom((21, 18, 16))
    scan = write_nifti("sub-01.scan.T1.nii.gz", t1, affine)
    options = {**SMALL, case.flag: str(scan), "ckpt_path": str(random_weights(case.folder, **SMALL))}
    run(case.folder, "run", "inference.json", **options, output_dir=str(tmp_path))
    labels = nib.load(tmp_path / f"sub-01.scan.T1_{case.postfix}.nii.gz")
    assert labels.shape == t1.shape
    assert labels.get_data_dtype() == np.uint8
    np.testing.assert_allclose(labels.affine, affine, atol=1e-5)
    np.testing.assert_allclose(labels.get_qform(), affine, atol=1e-3)
    assert set(np.unique(labels.dataobj)) <= set(case.values)


class Threshold(torch.nn.Module):
    """Stands in for a trained network: classes follow the brightest modality."""

    def __init__(self, levels: list[float]) -> None:
        super().__init__()
        self.levels = torch.tensor(levels).reshape(1, 4, 1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -100 * (x.amax(1, keepdim=True) - self.levels).abs()


@cases
@orientations
def test_label_map_lies_on_the_anatomy(
    case: BundleCase, affine: np.ndarray, write_nifti: Callable[..., Path], tmp_path: Path
) -> None:
    _, _, truth = phantom((40, 36, 32))
    # lopsided, so that a flipped or permuted result shows
    truth[24:34, 20:30, 18:28] = 2
    image = np.array([0, 250, 550, 1000], dtype=np.float32)[truth]
    # some voxels of a brain are nearly black, and scaling looks for the darkest
    image[17:20, 16:19, 3:6] = 1
    scan = write_nifti("scan_T1.nii.gz", image, affine)
    replaced = {"network_def": Threshold(list(case.levels)), "handlers": [], "amp": False}
    run(
        case.folder, "run", "inference.json", **{**SMALL, case.flag: str(scan), "output_dir": str(tmp_path)}, **replaced
    )
    labels = np.asarray(nib.load(tmp_path / f"scan_T1_{case.postfix}.nii.gz").dataobj)
    found, expected = labels == case.values[3], truth == 3
    assert 2 * (found & expected).sum() / (found.sum() + expected.sum()) > (
        0.99 if np.allclose(affine, np.eye(4)) else 0.8
    )
    assert (labels > 0)[truth > 0].mean() > 0.9


@cases
def test_overlay_is_drawn_on_demand(
    case: BundleCase, random_weights: Callable[..., Path], write_nifti: Callable[..., Path], tmp_path: Path
) -> None:
    options = {**SMALL, "ckpt_path": str(random_weights(case.folder, **SMALL)), "output_dir": str(tmp_path)}
    options[case.flag] = str(write_nifti("scan_T1.nii.gz", phantom()[0]))
    # the words as a command line passes them on
    run(case.folder, "run", "inference.json", **options, overlay="false")
    assert not (tmp_path / f"scan_T1_{case.postfix}.png").exists()
    run(case.folder, "run", "inference.json", **options, overlay="true")
    assert (tmp_path / f"scan_T1_{case.postfix}.png").read_bytes().startswith(b"\x89PNG")


@cases
def test_trains_with_nothing_to_validate_on(case: BundleCase, data: Path, tmp_path: Path) -> None:
    """As with the first labels that someone draws in MONAI Label, which sets both lists."""
    options = {**SMALL_TRAINING, "dataset_dir": str(data), "epochs": 1, "output_dir": str(tmp_path)}
    run(case.folder, "run", "train.json", **options, **{"validate#dataset#data": []})
    assert {file.name for file in tmp_path.glob("*.pt")} == {"model_last.pt"}
