"""The super-resolution bundle trains, resumes, evaluates and refines; outputs lie where the input does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_cases import WARNINGS, run, train_in_two_processes
from conftest import BUNDLES
from diffusion_cases import GRIDS, Enlarge, field, positions, write_hcp, write_series
from pages import Page

from memnet import ESPCNRevNet
from memnet.bundle import input_error
from memnet.datasets.diffusion_files import read_tensors, write_tensors
from memnet.diffusion.tensors import as_channels, as_matrices, fine_affine

pytestmark = WARNINGS

BUNDLE = BUNDLES / "brain_dti_superres_iqt"
SMALL: dict[str, Any] = {"network_def#channels": [12, 12], "n_blocks": 1, "patch_size": 7, "device": "cpu"}
SMALL_TRAINING = {**SMALL, "patches_per_epoch": 4, "batch_size": 2}
SHAPE = (16, 14, 17)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small subjects in HCP's layout."""
    return write_hcp(tmp_path_factory.mktemp("hcp"), 3, shape=SHAPE)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pt"
    torch.save(ESPCNRevNet(n_blocks=1, channels=(12, 12)).state_dict(), path)
    return path


@pytest.mark.parametrize("n_blocks", [0, 1])
def test_trains_evaluates_and_refines(n_blocks: int, subjects: Path, tmp_path: Path) -> None:
    common = {"dataset_dir": str(subjects), "n_blocks": n_blocks, "cache_dir": str(tmp_path / "cache")}
    trained = tmp_path / "trained"
    run(BUNDLE, "training", "train.json", **{**SMALL_TRAINING, **common}, epochs=1, output_dir=str(trained))
    assert {"model_best.pt", "model_last.pt", "tensorboard"} <= {p.name for p in trained.iterdir()}

    best, evaluated = str(trained / "model_best.pt"), tmp_path / "evaluated"
    options = {**SMALL, **common, "ckpt_path": best, "output_dir": str(evaluated)}
    run(BUNDLE, "evaluating", "train.json", "evaluate.json", **options)
    metrics = dict(line.split(",") for line in (evaluated / "metrics.csv").read_text().splitlines())
    names = [
        f"{m}rmse_{r}"
        for m in ("", "trilinear_", "cubic_", "signals_")
        for r in ("interior", "edge", "total", "md", "fa")
    ]
    assert set(names) <= set(metrics) and all(float(metrics[name]) > 0 for name in names)
    rows = (evaluated / "cubic_rmse_total_raw.csv").read_text().splitlines()
    assert len(rows) == 2 and "10030" in rows[1]  # one test subject
    page = Page(evaluated / "evaluation.html")
    assert (
        page.row("cubic_rmse_total [1e-5 mm2/s]") == [f"{float(metrics['cubic_rmse_total']):.4g}"]
        and len(page.images) == 1
    )

    refined = tmp_path / "refined"
    options = {**SMALL, **common, "ckpt_path": best, "output_dir": str(refined), "panel": False}
    run(BUNDLE, "run", "inference.json", **options)
    kinds = ("tensor", "md", "fa", "colour_fa")
    outputs = {f"10030{i}_{kind}.nii.gz" for i in range(3) for kind in kinds}
    assert {p.name for p in refined.iterdir()} == {*outputs, "inference.html"}
    page = Page(refined / "inference.html")
    assert page.column("input") == [f"10030{i}/T1w/Diffusion/data.nii.gz" for i in range(3)]
    assert page.column("tensors") == [f"10030{i}_tensor.nii.gz" for i in range(3)] and len(page.images) == 3
    assert all(0 < float(mean) < 2 for mean in page.column("mean MD [1e-3 mm2/s]"))
    assert nib.load(refined / "100300_md.nii.gz").shape == tuple(2 * n for n in SHAPE)


def test_cubic_interpolation_of_a_smooth_field_is_nearly_right(subjects: Path, weights: Path, tmp_path: Path) -> None:
    """The field turns by 8 degrees a coarse voxel: errors of the order of 1e-5 mm^2/s, and nearest is several times worse."""
    options = {**SMALL, "dataset_dir": str(subjects), "ckpt_path": str(weights), "output_dir": str(tmp_path)}
    run(BUNDLE, "evaluating", "train.json", "evaluate.json", **options)
    metrics = dict(line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines())
    assert (
        float(metrics["signals_rmse_interior"]) < 2
        and float(metrics["cubic_rmse_interior"]) < 2
        and float(metrics["rmse_total"]) > 10
    )


def test_resuming_gives_the_uninterrupted_result(subjects: Path, tmp_path: Path) -> None:
    def train(name: str, epochs: int, **overrides: Any) -> dict[str, Any]:
        options = {**SMALL_TRAINING, "dataset_dir": str(subjects), "cache_dir": str(tmp_path / "cache"), **overrides}
        options |= {"epochs": 3, "train#trainer#max_epochs": epochs, "output_dir": str(tmp_path / name)}
        run(BUNDLE, "run", "train.json", **options)
        return torch.load(tmp_path / name / "model_last.pt", weights_only=True)

    whole = train("whole", 3)
    train("cut", 1)
    resumed = train("cut", 3, resume=True)
    assert resumed["epoch"] == 3 and resumed["best_metric"] == whole["best_metric"]
    assert [key for key, value in whole["model"].items() if not torch.equal(resumed["model"][key], value)] == []


def test_training_begins_with_the_weights_given(subjects: Path, weights: Path, tmp_path: Path) -> None:
    options = {**SMALL_TRAINING, "dataset_dir": str(subjects), "output_dir": str(tmp_path / "out"), "epochs": 1}
    # a step of next to nothing, so that the end shows the beginning
    run(BUNDLE, "training", "train.json", **options, pretrained=str(weights), learning_rate=1e-12)
    tuned = torch.load(tmp_path / "out" / "model_best.pt", weights_only=True)
    for key, value in torch.load(weights, weights_only=True).items():
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(tuned[key], value, msg=key)


def test_best_epoch_is_the_one_of_the_lowest_error(subjects: Path, tmp_path: Path) -> None:
    options = {**SMALL_TRAINING, "dataset_dir": str(subjects), "output_dir": str(tmp_path)}
    run(BUNDLE, "run", "train.json", **options, epochs=3, learning_rate=1e-4)
    last = torch.load(tmp_path / "model_last.pt", weights_only=True)
    best = torch.load(tmp_path / "model_best.pt", weights_only=True)
    assert last["best_metric_epoch"] == 3  # it falls from epoch to epoch
    assert all(torch.equal(best[key], value) for key, value in last["model"].items())


def test_trains_in_two_processes(subjects: Path, tmp_path: Path) -> None:
    overrides = {**SMALL_TRAINING, "dataset_dir": subjects, "output_dir": tmp_path, "epochs": 1}
    overrides.pop("device")
    train_in_two_processes(BUNDLE, **overrides)
    # four patches, two a batch, over two processes
    assert torch.load(tmp_path / "model_last.pt", weights_only=True)["iteration"] == 1


@pytest.mark.parametrize("affine", GRIDS.values(), ids=GRIDS)
def test_output_lies_on_the_input(affine: np.ndarray, tmp_path: Path) -> None:
    """Each fine voxel has the tensor of the coarse voxel that it is in, in world axes, whatever the input's orientation."""
    shape = (8, 9, 10)
    tensors = as_channels(field(positions(shape, affine)))
    tensors[0, 3, 4] = 0  # lopsided: outside the brain
    write_tensors(tmp_path / "subject.nii.gz", tensors, affine)
    image = str(tmp_path / "subject.nii.gz")
    replaced = {"network_def": Enlarge(), "handlers": []}
    run(BUNDLE, "run", "inference.json", **SMALL, **replaced, image=image, output_dir=str(tmp_path), panel="false")
    refined, fine = read_tensors(tmp_path / "subject_tensor.nii.gz")
    np.testing.assert_allclose(fine, fine_affine(affine, 2), atol=1e-5)
    expected = tensors.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    np.testing.assert_allclose(refined, expected, atol=1e-8)
    colour = np.asarray(nib.load(tmp_path / "subject_colour_fa.nii.gz").dataobj)
    axis = np.abs(np.linalg.eigh(as_matrices(expected[9, 9, 9]))[1][:, -1])
    rgb = np.array([colour[9, 9, 9][c] for c in "RGB"], dtype=float)
    np.testing.assert_allclose(rgb / np.linalg.norm(rgb), axis, atol=0.02)
    md = nib.load(tmp_path / "subject_md.nii.gz")
    np.testing.assert_allclose(md.get_fdata()[9, 9, 9], 0.8e-3, rtol=1e-4)
    assert not md.get_fdata()[0:2, 6:8, 8:10].any()
    assert not (tmp_path / "subject.png").exists()


def test_series_is_fitted_and_the_panel_drawn_on_demand(weights: Path, tmp_path: Path) -> None:
    data = write_series(tmp_path / "sub", (9, 9, 9))
    run(BUNDLE, "run", "inference.json", **SMALL, dwi=str(data), ckpt_path=str(weights), output_dir=str(tmp_path / "a"))
    fitted = tmp_path / "a" / "tensors" / "data" / "tensor_high.nii.gz"
    assert (tmp_path / "a" / "data.png").read_bytes().startswith(b"\x89PNG")
    assert nib.load(tmp_path / "a" / "data_fa.nii.gz").shape == (18, 18, 18)
    # the same from the tensors, beside ESPCN and a reference
    espcn = tmp_path / "espcn.pt"
    torch.save(ESPCNRevNet(n_blocks=0).state_dict(), espcn)
    options = {"image": str(fitted), "reference": str(tmp_path / "a" / "data_tensor.nii.gz"), "espcn_path": str(espcn)}
    run(BUNDLE, "run", "inference.json", **SMALL, **options, ckpt_path=str(weights), output_dir=str(tmp_path / "b"))
    a, b = (
        read_tensors(path)[0] for path in (tmp_path / "a" / "data_tensor.nii.gz", *tmp_path.glob("b/*_tensor.nii.gz"))
    )
    np.testing.assert_array_equal(a, b)
    assert len(list((tmp_path / "b").glob("*.png"))) == 1


def refused(run_id: str, *configs: str, **overrides: Any) -> str:
    with pytest.raises((RuntimeError, ValueError)) as raised:
        run(BUNDLE, run_id, *configs, **{**SMALL, **overrides})
    found = input_error(raised.value)
    assert found is not None, repr(raised.value)
    return str(found)


def test_bad_input_is_refused_by_name_and_leaves_nothing(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"ckpt_path": str(weights), "output_dir": str(out)}
    assert "--image" in refused("run", "inference.json", **options)
    assert "--dataset_dir" in refused("run", "train.json", output_dir=str(out))
    assert "no such file" in refused("run", "inference.json", **options, image="absent.nii.gz")
    t1 = tmp_path / "t1.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.float32), np.eye(4)), t1)
    assert f"{t1}: has shape (8, 8, 8), expected a tensor image" in refused(
        "run", "inference.json", **options, image=str(t1)
    )
    data = write_series(tmp_path / "sub", (8, 8, 8))
    assert "no image of b = 2000" in refused("run", "inference.json", **options, dwi=str(data), shells=[2000])
    assert "given together" in refused("run", "inference.json", **options, dwi=str(data), image=str(t1))
    assert "do not fit" in refused("run", "inference.json", **options, dwi=str(data), n_blocks=2)
    assert [p.name for p in out.rglob("*") if p.is_file() and "tensors" not in p.parts] == []


def test_scores_count_brain_that_the_coarse_mask_lacks(tmp_path: Path) -> None:
    folder = write_hcp(tmp_path / "hcp", 3, shape=(24, 24, 24))
    for file in folder.glob("*/T1w/Diffusion/nodif_brain_mask.nii.gz"):
        mask = nib.load(file)
        values = np.zeros(mask.shape, np.uint8)
        values[12:, 12:, 12:] = 1
        values[1, 1, 1] = 1  # an eighth of a coarse voxel
        nib.save(nib.Nifti1Image(values, mask.affine), file)
    weights = tmp_path / "weights.pt"
    torch.save(ESPCNRevNet(n_blocks=0, channels=(12, 12), start="interpolation").state_dict(), weights)
    options = {**SMALL, "n_blocks": 0, "dataset_dir": str(folder), "ckpt_path": str(weights), "reflections": 1}
    run(BUNDLE, "evaluating", "train.json", "evaluate.json", **options, output_dir=str(tmp_path / "out"))
    metrics = dict(line.split(",") for line in (tmp_path / "out" / "metrics.csv").read_text().splitlines())
    # untrained, the network is trilinear interpolation
    assert float(metrics["rmse_total"]) == pytest.approx(float(metrics["trilinear_rmse_total"]), rel=1e-3)


def test_a_folder_goes_on_past_a_series_that_cannot_be_fitted(weights: Path, tmp_path: Path) -> None:
    for subject in ("a", "b", "c"):
        data = write_series(tmp_path / "series" / subject, (8, 8, 8))
        if subject == "b":
            data.with_name("data.bvec").unlink(missing_ok=True)
            for bvecs in data.parent.glob("*bvec*"):
                bvecs.write_text("1 0 0")
    options = {"ckpt_path": str(weights), "output_dir": str(tmp_path / "out"), "panel": False}
    told = refused("run", "inference.json", **options, dataset_dir=str(tmp_path / "series"))
    assert told.startswith("1 of 3 inputs could not be read, the others are done: ") and "series/b/" in told
    made = {p.name for p in (tmp_path / "out").glob("*_tensor.nii.gz")}
    assert made == {"a_tensor.nii.gz", "c_tensor.nii.gz"}
    (passed_over,) = (t[1:] for t in Page(tmp_path / "out" / "inference.html").tables if t[0] == ["input", "why"])
    assert [row[0] for row in passed_over] == ["b"] and passed_over[0][1].startswith("data.nii.gz: ")


def test_too_few_subjects_and_too_small_volumes(subjects: Path, tmp_path: Path) -> None:
    options = {"dataset_dir": str(subjects), "output_dir": str(tmp_path)}
    assert "3 subjects are there; n_training=8" in refused("run", "train.json", **options, n_training=8)
    message = refused("run", "train.json", **{**SMALL_TRAINING, **options, "patch_size": 11})
    assert "(8, 7, 8) voxels are fewer than a patch's 11 a side" in message
