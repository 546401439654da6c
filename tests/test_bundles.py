"""Every bundle under bundles/ keeps MONAI's rules and runs: training, evaluation, inference, resuming, loading."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BUNDLES, phantom
from monai.bundle import ConfigParser, ConfigWorkflow

pytestmark = [
    # MONAI on its own deprecations, and on tiny volumes that miss a class
    pytest.mark.filterwarnings("ignore::FutureWarning:monai"),
    pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning"),
    pytest.mark.filterwarnings("ignore:No hash value provided:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*(ground truth|prediction) of class.*:UserWarning"),
]

SCHEMA = Path(__file__).parent / "meta_schema_20240725.json"
# the bundle's own words for a run of seconds
SMALL: dict[str, Any] = {
    "network_def#channels": 8,
    "network_def#n_levels": 2,
    "roi_size": [16, 16, 16],
    "device": "cpu",
}
SMALL_TRAINING = {**SMALL, "patch_size": [16, 16, 16], "patches_per_volume": 2, "num_workers": 0, "val_interval": 1}

bundles = pytest.mark.parametrize("bundle", sorted(p for p in BUNDLES.iterdir() if p.is_dir()), ids=lambda p: p.name)


def run(bundle: Path, run_id: str, *configs: str, **overrides: Any) -> None:
    """Run a bundle in this process as ``python -m monai.bundle run`` does."""
    files = [str(bundle / "configs" / config) for config in configs]
    monai.bundle.run(run_id, config_file=files, logging_file=False, **overrides)  # type: ignore[arg-type]


@pytest.fixture
def tissue() -> Path:
    return BUNDLES / "brain_mri_tissue_invres"


@pytest.fixture
def weights(tmp_path: Path) -> Callable[..., Path]:
    """Make weights of a small network of the tissue bundle."""

    def make(**overrides: Any) -> Path:
        parser = ConfigParser()
        parser.read_config(str(BUNDLES / "brain_mri_tissue_invres" / "configs" / "inference.json"))
        parser.update({**SMALL, **overrides})
        path = tmp_path / "weights.pt"
        torch.save(parser.get_parsed_content("network_def").state_dict(), path)
        return path

    return make


@pytest.fixture
def label_maps(write_nifti: Callable[..., Path]) -> Path:
    """Three small label maps with FreeSurfer's values: background, ventricle, cortex, white matter, skin."""
    for number in range(3):
        values = np.array([0, 4, 3, 2], dtype=np.int16)[phantom(seed=number)[2]]
        values[2:-2, 2:-2, 2:-2][values[2:-2, 2:-2, 2:-2] == 0] = 516
        path = write_nifti(f"label_maps/{number}.nii.gz", values)
    return path.parent


@pytest.fixture
def shipped(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Copy a bundle elsewhere, with random weights where it ships none yet."""

    def copy(bundle: Path) -> Path:
        target = tmp_path / "elsewhere" / bundle.name
        shutil.copytree(bundle, target, ignore=shutil.ignore_patterns("eval"))
        model = target / "models" / "model.pt"
        if not model.exists():
            parser = ConfigParser()
            parser.read_config(str(target / "configs" / "inference.json"))
            model.parent.mkdir(exist_ok=True)
            torch.save(parser.get_parsed_content("network_def").state_dict(), model)
        return target

    yield copy


@bundles
def test_has_the_files_of_a_bundle(bundle: Path) -> None:
    for name in ["LICENSE", "docs/README.md", "configs/logging.conf"]:
        assert (bundle / name).is_file(), name
    for name in ["metadata", "train", "inference", "evaluate", "multi_gpu_train"]:
        json.loads((bundle / "configs" / f"{name}.json").read_text())


@bundles
def test_metadata_follows_the_schema(bundle: Path) -> None:
    monai.bundle.verify_metadata(meta_file=str(bundle / "configs" / "metadata.json"), filepath=str(SCHEMA))
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert metadata["version"] in metadata["changelog"]


@bundles
@pytest.mark.parametrize("config", ["train.json", "inference.json"])
def test_network_takes_and_gives_what_the_metadata_says(bundle: Path, config: str) -> None:
    folder = bundle / "configs"
    monai.bundle.verify_net_in_out(
        "network_def", meta_file=str(folder / "metadata.json"), config_file=str(folder / config), device="cpu", n=2
    )


@bundles
@pytest.mark.parametrize(
    ("kind", "configs"),
    [
        ("train", ["train.json"]),
        ("train", ["train_synthetic.json"]),
        ("evaluation", ["train.json", "evaluate.json"]),
        ("inference", ["inference.json"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "+".join(v),
)
def test_properties_are_complete(bundle: Path, kind: str, configs: list[str], label_maps: Path, tmp_path: Path) -> None:
    files = [str(bundle / "configs" / config) for config in configs]
    if not all(Path(f).is_file() for f in files):
        pytest.skip(f"{bundle.name} has no {' and '.join(configs)}")
    overrides: dict[str, Any] = {"output_dir": str(tmp_path)}
    if "train_synthetic.json" in configs:
        overrides |= {"dataset_dir": str(label_maps), "patch_size": [16, 16, 16]}
    workflow = ConfigWorkflow(config_file=files, workflow_type=kind, logging_file=False, **overrides)  # type: ignore[arg-type]
    workflow.initialize()
    assert workflow.check_properties() == []


@bundles
def test_training_and_inference_share_network_and_preprocessing(bundle: Path) -> None:
    train, inference = (json.loads((bundle / "configs" / f"{c}.json").read_text()) for c in ("train", "inference"))
    for key in ("network_def", "network", "network_name", "memory", "device"):
        assert train[key] == inference[key], key
    shared = train["image_transforms"]
    assert inference["preprocessing"]["transforms"][: len(shared)] == shared


@bundles
@pytest.mark.parametrize("config", ["train.json", "inference.json"])
def test_config_ends_in_the_ids_that_hosts_run(bundle: Path, config: str) -> None:
    content = json.loads((bundle / "configs" / config).read_text())
    assert "run" in content and ("training" if config == "train.json" else "evaluating") in content
    if config == "inference.json":
        assert "@_meta_" not in (bundle / "configs" / config).read_text()
        assert content["preprocessing"]["_target_"] == content["postprocessing"]["_target_"] == "Compose"


@bundles
@pytest.mark.parametrize("kind", ["train", "inference"])
def test_loads_from_another_folder(
    bundle: Path, kind: str, shipped: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = shipped(bundle)
    monkeypatch.chdir(tmp_path)
    network = monai.bundle.load(bundle.name, bundle_dir=str(copy.parent), workflow_type=kind, device="cpu")
    expected = torch.load(copy / "models" / "model.pt", weights_only=True)
    loaded = network.state_dict()
    assert expected.keys() <= loaded.keys()
    assert all(torch.equal(loaded[key].cpu(), value) for key, value in expected.items())


@bundles
def test_exports_to_torchscript(bundle: Path, shipped: Callable[[Path], Path], tmp_path: Path) -> None:
    copy = shipped(bundle)
    monai.bundle.ckpt_export(
        "network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(copy / "models" / "model.pt"),
        meta_file=str(copy / "configs" / "metadata.json"),
        config_file=str(copy / "configs" / "inference.json"),
    )
    scripted = torch.jit.load(tmp_path / "model.ts").eval()
    parser = ConfigParser()
    parser.read_config(str(copy / "configs" / "inference.json"))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(copy / "models" / "model.pt", weights_only=True), strict=False)
    image = torch.rand(1, 2, 16, 24, 16)
    with torch.no_grad():
        torch.testing.assert_close(scripted(image), network(image), atol=1e-4, rtol=1e-4)


@bundles
def test_shipped_weights_are_small_plain_tensors(bundle: Path) -> None:
    model = bundle / "models" / "model.pt"
    if not model.is_file():
        pytest.skip("no weights shipped yet")
    assert model.stat().st_size <= 20e6
    assert all(isinstance(v, torch.Tensor) for v in torch.load(model, weights_only=True).values())


@bundles
def test_bundle_root_does_not_depend_on_the_working_directory(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in (tmp_path, bundle):
        monkeypatch.chdir(directory)
        config = os.path.relpath(bundle / "configs" / "inference.json", directory)
        workflow = ConfigWorkflow(config_file=config, workflow_type="inference", logging_file=False)
        workflow.initialize()
        assert Path(workflow.bundle_root) == bundle.resolve()


@pytest.mark.parametrize("network_name", ["baseline", "partially", "fully"])
def test_trains_evaluates_and_segments(
    tissue: Path, network_name: str, iseg_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = {"network_name": network_name, "dataset_dir": str(iseg_folder)}
    trained = tmp_path / "trained"
    run(tissue, "training", "train.json", **SMALL_TRAINING, **common, epochs=1, output_dir=str(trained))
    assert {"model_best.pt", "model_last.pt", "tensorboard"} <= {p.name for p in trained.iterdir()}

    best = str(trained / "model_best.pt")
    evaluated = tmp_path / "evaluated"
    options = {**SMALL, "num_workers": 0, **common, "ckpt_path": best, "output_dir": str(evaluated), "subset": "all"}
    run(tissue, "evaluating", "train.json", "evaluate.json", **options)
    rows = (evaluated / "val_mean_dice_raw.csv").read_text().splitlines()
    assert [Path(row.split(",")[0]).name for row in rows[1:]] == [f"subject-{k}-T1.hdr" for k in (1, 2, 10)]
    assert "val_hausdorff_gm" in (evaluated / "metrics.csv").read_text()

    segmented = tmp_path / "segmented"
    run(tissue, "run", "inference.json", **SMALL, **common, ckpt_path=best, output_dir=str(segmented))
    assert {p.name for p in segmented.iterdir()} == {
        *(f"subject-{k}-T1_tissue.nii.gz" for k in (1, 2, 10)),
        "tissue_volumes.csv",
    }


def test_trains_from_a_datalist_with_a_missing_modality(tissue: Path, datalist: Path, tmp_path: Path) -> None:
    run(tissue, "run", "train.json", **SMALL_TRAINING, datalist=str(datalist), epochs=1, output_dir=str(tmp_path / "t"))
    assert (tmp_path / "t" / "model_best.pt").is_file()


def test_trains_from_label_maps_alone(tissue: Path, label_maps: Path, tmp_path: Path) -> None:
    options = {**SMALL, "patch_size": [16, 16, 16], "patches_per_map": 2, "num_workers": 0, "epochs": 1}
    options.pop("roi_size")
    run(tissue, "training", "train_synthetic.json", **options, dataset_dir=str(label_maps), output_dir=str(tmp_path))
    assert all(torch.isfinite(v).all() for v in torch.load(tmp_path / "model_best.pt", weights_only=True).values())


def test_training_leaves_the_shipped_weights_alone(
    tissue: Path, shipped: Callable[[Path], Path], iseg_folder: Path
) -> None:
    copy = shipped(tissue)
    before = (copy / "models" / "model.pt").read_bytes()
    run(copy, "run", "train.json", **SMALL_TRAINING, dataset_dir=str(iseg_folder), epochs=1)
    assert (copy / "models" / "model.pt").read_bytes() == before
    assert (copy / "eval" / "model_best.pt").is_file()


def test_resuming_gives_the_uninterrupted_result(tissue: Path, iseg_folder: Path, tmp_path: Path) -> None:
    def train(name: str, epochs: int, **overrides: Any) -> dict[str, Any]:
        options = {**SMALL_TRAINING, "val_interval": 2, "dataset_dir": str(iseg_folder), **overrides}
        # the scheduler counts on all epochs, as it would in a training that is cut off
        options |= {"epochs": 3, "train#trainer#max_epochs": epochs, "output_dir": str(tmp_path / name)}
        run(tissue, "run", "train.json", **options)
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


def test_an_earlier_training_is_kept(tissue: Path, iseg_folder: Path, tmp_path: Path) -> None:
    options = {**SMALL_TRAINING, "dataset_dir": str(iseg_folder), "epochs": 1, "output_dir": str(tmp_path)}
    run(tissue, "run", "train.json", **options)
    first = (tmp_path / "model_best.pt").read_bytes()
    run(tissue, "run", "train.json", **options, seed=1)
    assert (tmp_path / "model_best.previous.pt").read_bytes() == first


def test_trains_in_two_processes(tissue: Path, iseg_folder: Path, tmp_path: Path) -> None:
    configs = [str(tissue / "configs" / name) for name in ("train.json", "multi_gpu_train.json")]
    overrides = {**SMALL_TRAINING, "dataset_dir": iseg_folder, "output_dir": tmp_path, "epochs": 1}
    overrides.pop("device")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "monai.bundle", "run", "training", "--config_file", str(configs)]
    command += [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    state = torch.load(tmp_path / "model_last.pt", weights_only=True)
    # two training cases over two processes are one iteration each
    assert state["iteration"] == 1
    assert not any(key.startswith("module.") for key in state["model"])


ORIENTATIONS = {
    "RAS, 1 mm": np.diag([1.0, 1.0, 1.0, 1.0]),
    "LPS, anisotropic": np.diag([-0.9, -1.1, 2.0, 1.0]),
    "ASL, permuted": np.array([[0, 0, -1.3, 40], [0.8, 0, 0, -20], [0, 1.2, 0, 7], [0, 0, 0, 1.0]]),
    "oblique": np.array([[0.96, -0.28, 0, -10], [0.28, 0.96, 0, 5], [0, 0, 1.5, 0], [0, 0, 0, 1.0]]),
}


@pytest.mark.parametrize("affine", ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_label_map_lies_on_the_input_grid(
    tissue: Path, affine: np.ndarray, weights: Callable[..., Path], write_nifti: Callable[..., Path], tmp_path: Path
) -> None:
    t1, _, _ = phantom((21, 18, 16))
    scan = write_nifti("sub-01.scan.nii.gz", t1, affine)
    run(tissue, "run", "inference.json", **SMALL, image=str(scan), ckpt_path=str(weights()), output_dir=str(tmp_path))
    labels = nib.load(tmp_path / "sub-01.scan_tissue.nii.gz")
    assert labels.shape == t1.shape
    assert labels.get_data_dtype() == np.uint8
    np.testing.assert_allclose(labels.affine, affine, atol=1e-5)
    np.testing.assert_allclose(labels.get_qform(), affine, atol=1e-3)
    assert set(np.unique(labels.dataobj)) <= {0, 1, 2, 3}


class Threshold(torch.nn.Module):
    """Stands in for a trained network: labels follow the first modality's brightness."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = torch.tensor([0.0, 0.25, 0.55, 1.0]).reshape(1, 4, 1, 1, 1)
        return -100 * (x.amax(1, keepdim=True) - levels).abs()


@pytest.mark.parametrize("affine", ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_label_map_lies_on_the_anatomy(
    tissue: Path, affine: np.ndarray, write_nifti: Callable[..., Path], tmp_path: Path
) -> None:
    _, _, truth = phantom((40, 36, 32))
    # lopsided, so that a flipped or permuted result shows
    truth[24:34, 20:30, 18:28] = 2
    image = np.array([0, 250, 550, 1000], dtype=np.float32)[truth]
    scan = write_nifti("scan.nii.gz", image, affine)
    run(
        tissue,
        "run",
        "inference.json",
        **SMALL,
        image=str(scan),
        output_dir=str(tmp_path),
        **{"network_def": Threshold(), "handlers": [], "amp": False},
    )
    labels = np.asarray(nib.load(tmp_path / "scan_tissue.nii.gz").dataobj)
    inner = 2 * ((labels == 3) & (truth == 3)).sum() / ((labels == 3).sum() + (truth == 3).sum())
    assert inner > (0.99 if np.allclose(affine, np.eye(4)) else 0.8)
    assert (labels > 0)[truth > 0].mean() > 0.9


def test_t2_alone_and_both_modalities(
    tissue: Path, weights: Callable[..., Path], write_nifti: Callable[..., Path], tmp_path: Path
) -> None:
    t1, t2, _ = phantom()
    first, second = write_nifti("a_T1.nii.gz", t1), write_nifti("a_T2.nii.gz", t2[::2], np.diag([2.0, 1, 1, 1]))
    options = {**SMALL, "ckpt_path": str(weights())}
    run(tissue, "run", "inference.json", **options, t2=str(second), output_dir=str(tmp_path / "t2"))
    assert nib.load(tmp_path / "t2" / "a_T2_tissue.nii.gz").shape == t2[::2].shape
    run(tissue, "run", "inference.json", **options, t1=str(first), t2=str(second), output_dir=str(tmp_path / "both"))
    assert nib.load(tmp_path / "both" / "a_T1_tissue.nii.gz").shape == t1.shape
    run(tissue, "run", "inference.json", **options, image=str(first), output_dir=str(tmp_path / "t1"))
    both, alone = (np.asarray(nib.load(tmp_path / d / "a_T1_tissue.nii.gz").dataobj) for d in ("both", "t1"))
    assert (both != alone).any()


def test_weights_with_the_variational_branch_serve_inference(
    tissue: Path, weights: Callable[..., Path], write_nifti: Callable[..., Path], tmp_path: Path
) -> None:
    scan = write_nifti("scan.nii.gz", phantom()[0])
    options = {**SMALL, "image": str(scan), "ckpt_path": str(weights(vae=True)), "output_dir": str(tmp_path)}
    run(tissue, "run", "inference.json", **options)
    assert (tmp_path / "scan_tissue.nii.gz").is_file()


def test_overlay_is_drawn_on_demand(
    tissue: Path, weights: Callable[..., Path], write_nifti: Callable[..., Path], tmp_path: Path
) -> None:
    scan = write_nifti("scan.nii.gz", phantom()[0])
    options = {**SMALL, "image": str(scan), "ckpt_path": str(weights()), "output_dir": str(tmp_path)}
    # the words as a command line passes them on
    run(tissue, "run", "inference.json", **options, overlay="false")
    assert not (tmp_path / "scan_tissue.png").exists()
    run(tissue, "run", "inference.json", **options, overlay="true")
    assert (tmp_path / "scan_tissue.png").read_bytes().startswith(b"\x89PNG")


def test_hosts_may_hand_over_a_plain_file_name(tissue: Path, write_nifti: Callable[..., Path]) -> None:
    # MONAI Label and the Deploy SDK call preprocessing with {"image": path} and no run around it
    parser = ConfigParser()
    parser.read_config(str(tissue / "configs" / "inference.json"))
    scan = write_nifti("scan.nii.gz", phantom()[0])
    data = parser.get_parsed_content("preprocessing")({"image": str(scan), "image_path": str(scan)})
    assert data["image"].shape[0] == 2
    assert not data["image"][1].any()
