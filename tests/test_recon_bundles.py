"""The bundles that reconstruct raw data run: training, resuming, evaluation, inference, several processes, bad input."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_cases import WARNINGS, run, train_in_two_processes
from conftest import BUNDLES, phantom
from monai.bundle import ConfigParser
from pages import Page

from memnet.bundle import input_error
from memnet.datasets.ismrmrd_writer import write_ismrmrd
from memnet.metadata import plain_tensor
from memnet.mri.fourier import image_to_kspace
from memnet.mri.simulated_scans import simulate_volume

pytestmark = WARNINGS

KNEE, CINE = BUNDLES / "knee_mri_recon_mel", BUNDLES / "cardiac_cine_recon_mel"
AFFINE = np.array([[-0.9, 0, 0, 20], [0, 1.1, 0, -30], [0, 0, 1.3, 5], [0, 0, 0, 1]], dtype=float)

SMALL: dict[str, Any] = {
    "n_unrolls": 1,
    "channels": 4,
    "n_coils": 3,
    "acceleration": 2.0,
    "calibration": 14,
    "device": "cpu",
}
SMALL_TRAINING = {
    **SMALL,
    "num_workers": 0,
    "val_interval": 1,
    "slab_size": 4,
    "slabs_per_volume": 1,
    "val_slices": 6,
    "val_slab_size": 4,
    "val_overlap": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three magnitude volumes to simulate raw data from."""
    folder = tmp_path_factory.mktemp("volumes")
    for number in range(3):
        nib.save(nib.Nifti1Image(phantom((8, 24, 22), number)[0], AFFINE), folder / f"t1_{number}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def raw_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ISMRMRD file of a volume whose ellipse of k-space was sampled."""
    magnitude = torch.from_numpy(phantom((8, 24, 22))[0])
    kspace = image_to_kspace(simulate_volume(magnitude, 3, 0.01), (1,)).numpy()[None]
    y, z = np.ogrid[-12:12, -11:11]
    path = tmp_path_factory.mktemp("raw") / "scan.h5"
    write_ismrmrd(path, kspace, ((y / 12) ** 2 + (z / 11) ** 2 <= 1)[None], AFFINE)
    return path


def train(folder: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    options = {**SMALL_TRAINING, "dataset_dir": str(folder), "output_dir": str(output), "epochs": 1, **overrides}
    run(KNEE, "training", "train.json", **options)
    return torch.load(output / "model_last.pt", weights_only=True)


def refusal(*arguments: Any, **overrides: Any) -> str:
    """Run a bundle that must refuse its input; what it says."""
    with pytest.raises((ValueError, RuntimeError)) as caught:
        run(*arguments, **overrides)
    return str(input_error(caught.value))


@pytest.fixture(scope="module")
def weights(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights whose regulariser adds nothing, so that the network solves for consistency with the data alone."""
    output = tmp_path_factory.mktemp("trained")
    train(folder, output)
    state = torch.load(output / "model_best.pt", weights_only=True)
    for key in list(state)[-3:]:
        state[key] *= 0 if "residual" in key else 1
    torch.save(state, output / "sense.pt")
    return output / "sense.pt"


def test_evaluation_scores_each_case_beside_the_zero_filled_image(folder: Path, weights: Path, tmp_path: Path) -> None:
    options = {**SMALL, "num_workers": 0, "dataset_dir": str(folder), "ckpt_path": str(weights), "subset": "all"}
    options |= {"val_slab_size": 5, "val_overlap": 2, "amp": False}
    run(KNEE, "evaluating", "train.json", "evaluate.json", **options, output_dir=str(tmp_path))
    scores = {}
    for name in ("val_psnr", "val_ssim", "val_nrmse", "val_psnr_zero_filled"):
        rows = list(csv.reader((tmp_path / f"{name}_raw.csv").read_text().splitlines()))[1:]
        assert [Path(row[0]).name for row in rows] == [f"t1_{k}.nii.gz" for k in range(3)]
        scores[name] = [float(row[1]) for row in rows]
        assert name in (tmp_path / "metrics.csv").read_text()
        assert Page(tmp_path / "evaluation.html").column(f"{name} [dB]" if "psnr" in name else name) == [
            f"{score:.4g}" for score in scores[name]
        ]
    assert len(Page(tmp_path / "evaluation.html").images) == 3
    assert all(a > b for a, b in zip(scores["val_psnr"], scores["val_psnr_zero_filled"], strict=True))
    assert all(0 < s < 1 for s in scores["val_ssim"] + scores["val_nrmse"])


def test_resuming_gives_the_uninterrupted_result(folder: Path, tmp_path: Path) -> None:
    options = {"val_interval": 2, "epochs": 3}
    whole = train(folder, tmp_path / "whole", **options)
    train(folder, tmp_path / "cut", **options, **{"train#trainer#max_epochs": 1})
    resumed = train(folder, tmp_path / "cut", **options, resume=True)
    assert resumed["epoch"] == whole["epoch"] == 3 and resumed["best_metric"] == whole["best_metric"]
    assert all(torch.equal(resumed["model"][key], value) for key, value in whole["model"].items())
    other = train(folder, tmp_path / "other", **options, seed=1)
    assert any(not torch.equal(other["model"][key], value) for key, value in whole["model"].items())


def test_training_learns(folder: Path, tmp_path: Path) -> None:
    def error(**overrides: Any) -> float:
        state = train(folder, tmp_path / "learning", **overrides)
        return -float(state["best_metric"])

    # one case again and again, so that a few steps must show
    assert error(epochs=12, learning_rate=0.01, slabs_per_volume=2) < error(epochs=1, learning_rate=0.0) - 0.3


def test_trains_on_several_accelerations_and_noises(folder: Path, tmp_path: Path) -> None:
    one = train(folder, tmp_path / "one")
    same = train(folder, tmp_path / "same", train_accelerations=[2.0], acceleration=2.0)
    several = train(folder, tmp_path / "several", train_accelerations=[1.5, 2.0])
    noisy = train(folder, tmp_path / "noisy", added_noise=0.1)
    key = "regularizers.0.residual.0.weight"
    assert torch.equal(one["model"][key], same["model"][key])
    assert not any(torch.equal(one["model"][key], other["model"][key]) for other in (several, noisy))


def test_fine_tuning_begins_with_given_weights_of_any_number_of_unrolls(
    folder: Path, weights: Path, tmp_path: Path
) -> None:
    state = train(folder, tmp_path, pretrained=str(weights), n_unrolls=2, learning_rate=1e-12)
    for key, value in torch.load(weights, weights_only=True).items():
        torch.testing.assert_close(state["model"][key], value, rtol=0, atol=1e-9, msg=key)


def test_weight_of_data_consistency_is_learned_from_where_it_is_set(folder: Path, tmp_path: Path) -> None:
    state = train(folder, tmp_path, mu=0.5, learning_rate=0.01)
    log_mu = float(state["model"]["data_consistency.log_mu"])
    assert log_mu != pytest.approx(np.log(0.5), abs=1e-3) and log_mu == pytest.approx(np.log(0.5), abs=1)
    state = train(folder, tmp_path, mu=0.5, learning_rate=0.01, mu_learning_rate=0.0)
    assert float(state["model"]["data_consistency.log_mu"]) == pytest.approx(np.log(0.5), abs=1e-6)


@pytest.mark.parametrize("memory", ["store", "recursive"])
def test_memory_strategies_train_alike(folder: Path, tmp_path: Path, memory: str) -> None:
    expected, found = (train(folder, tmp_path / m, memory=m, tile=None) for m in ("checkpoint", memory))
    for key, value in expected["model"].items():
        torch.testing.assert_close(found["model"][key], value, msg=key)


def test_trains_slice_by_slice(folder: Path, tmp_path: Path) -> None:
    state = train(folder, tmp_path, **{"network_def#spatial_dims": 2})
    assert state["model"]["regularizers.0.residual.0.weight"].dim() == 4


@pytest.mark.parametrize("phase", [False, True])
def test_raw_data_become_an_image_in_their_place(raw_data: Path, weights: Path, tmp_path: Path, phase: bool) -> None:
    options = {**SMALL, "image": str(raw_data), "ckpt_path": str(weights), "slab_size": 5, "overlap": 2, "phase": phase}
    run(KNEE, "run", "inference.json", **options | {"acceleration": None}, output_dir=str(tmp_path))
    names = {"scan_recon.nii.gz", "inference.html", *(["scan_recon_phase.nii.gz"] if phase else [])}
    assert {p.name for p in tmp_path.iterdir()} == names
    image, page = nib.load(tmp_path / "scan_recon.nii.gz"), Page(tmp_path / "inference.html")
    assert page.column("size") == ["8 x 24 x 22"] and page.column("voxel [mm]") == ["0.9 x 1.1 x 1.3"]
    assert page.column("input") == ["scan.h5"] and len(page.images) == 1
    assert page.column("raw data") == ["as read"] and 75 < float(page.column("k-space [%]")[0]) < 80  # an ellipse
    assert image.shape == (8, 24, 22) and image.get_data_dtype() == np.float32
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-4)
    expected, found = phantom((8, 24, 22))[0], np.asarray(image.dataobj)
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.97
    if phase:
        angles = np.asarray(nib.load(tmp_path / "scan_recon_phase.nii.gz").dataobj)
        assert -np.pi <= angles.min() < angles.max() <= np.pi and angles.std() > 0.1


def test_inference_may_undersample_what_it_is_given(folder: Path, weights: Path, tmp_path: Path) -> None:
    images = []
    for acceleration in (None, 2.5):
        options = {**SMALL, "dataset_dir": str(folder), "ckpt_path": str(weights), "acceleration": acceleration}
        options |= {"output_dir": str(tmp_path / str(acceleration)), "slab_size": None}
        run(KNEE, "run", "inference.json", **options)
        images.append(np.asarray(nib.load(tmp_path / str(acceleration) / "t1_0_recon.nii.gz").dataobj))
        page = Page(tmp_path / str(acceleration) / "inference.html")
        assert set(page.column("raw data")) == {"simulated from magnitudes"}
        shares = {float(share) for share in page.column("k-space [%]")}
        assert shares == {100.0} if acceleration is None else max(shares) < 60
    assert not np.allclose(*images, rtol=1e-2)


def test_trains_in_two_processes(folder: Path, tmp_path: Path) -> None:
    overrides = {**SMALL_TRAINING, "dataset_dir": folder, "output_dir": tmp_path, "epochs": 1}
    overrides.pop("device")
    train_in_two_processes(KNEE, **overrides)
    state = torch.load(tmp_path / "model_last.pt", weights_only=True)
    assert state["iteration"] == 1 and not any(key.startswith("module.") for key in state["model"])


def test_several_processes_resume_to_the_uninterrupted_result(folder: Path, tmp_path: Path) -> None:
    overrides = {**SMALL_TRAINING, "dataset_dir": folder, "epochs": 2}
    overrides.pop("device")
    train_in_two_processes(KNEE, **overrides, output_dir=tmp_path / "whole")
    stopped = {"train#trainer#max_epochs": 1, "output_dir": tmp_path / "parts"}
    train_in_two_processes(KNEE, **overrides, **stopped)
    train_in_two_processes(KNEE, **overrides, output_dir=tmp_path / "parts", resume=True)
    whole, parts = (torch.load(tmp_path / name / "model_last.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["epoch"] == parts["epoch"] == 2
    for key, value in whole["model"].items():
        torch.testing.assert_close(parts["model"][key], value, rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.write_text("nothing"), "not an HDF5 file"),
        (lambda p: _raw(p, sampled=np.arange(18) % 2 == 0), "reference lines"),
        (lambda p: _raw(p, frames=2), "expected one 3D volume"),
        (lambda p: _fastmri(p, n_masked=16), "its mask has the shape (16,)"),
    ],
    ids=["missing", "text", "no reference lines", "movie", "mask of another shape"],
)
def test_bad_input_leaves_nothing_behind(
    make: Callable[[Path], Any], message: str, weights: Path, tmp_path: Path
) -> None:
    make(tmp_path / "in.h5")
    options = {**SMALL, "acceleration": None, "image": str(tmp_path / "in.h5"), "ckpt_path": str(weights)}
    error = refusal(KNEE, "run", "inference.json", **options, output_dir=str(tmp_path / "out"))
    assert message in error and "in.h5" in error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_folder_goes_on_past_a_file_that_cannot_be_read(
    raw_data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.h5").write_text("nothing")
    (tmp_path / "in" / "b.h5").write_bytes(raw_data.read_bytes())
    options = {**SMALL, "acceleration": None, "ckpt_path": str(weights), "slab_size": None}
    monkeypatch.chdir(tmp_path)
    error = refusal(KNEE, "run", "inference.json", **options, dataset_dir="in", output_dir="out")
    assert error.startswith("1 of 2 inputs could not be read, the others are done: in/a.h5: ")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"b_recon.nii.gz", "inference.html"}
    assert Page(tmp_path / "out" / "inference.html").column("why")[0].startswith("a.h5: ")


def _raw(path: Path, sampled: np.ndarray | None = None, frames: int = 1) -> None:
    kspace = np.random.default_rng(0).normal(size=(frames, 2, 4, 18, 8)).astype(np.complex64)
    taken = np.ones((frames, 18, 8), bool) if sampled is None else np.tile(sampled[None, :, None], (frames, 1, 8))
    write_ismrmrd(path, kspace, taken, AFFINE)


def _fastmri(path: Path, n_masked: int) -> None:
    with h5py.File(path, "w") as file:
        file["kspace"], file["mask"] = np.ones((4, 2, 18, 18), np.complex64), np.ones(n_masked)


def test_without_data_the_run_says_what_to_give(tmp_path: Path) -> None:
    error = refusal(KNEE, "training", "train.json", **SMALL_TRAINING, output_dir=str(tmp_path))
    assert "give --dataset_dir FOLDER (ISMRMRD" in error


@pytest.mark.parametrize("bundle", [KNEE, CINE], ids=lambda bundle: bundle.name)
def test_training_and_inference_start_from_the_same_numbers(bundle: Path) -> None:
    train_config, inference = (
        json.loads((bundle / "configs" / f"{c}.json").read_text()) for c in ("train", "inference")
    )
    for key in ("n_coils", "calibration", "noise", "n_unrolls", "channels", "tile"):
        assert train_config[key] == inference[key], key


SMALL_CINE = {**{k: v for k, v in SMALL.items() if k != "calibration"}, "calibration": 16, "calibration_lines": 4}


@pytest.fixture
def movies(write_nifti: Callable[..., Path]) -> Path:
    """A heart of three slices and six frames, in which something beats."""
    frames = np.repeat(phantom((24, 20, 9))[0][:, :, 3:6, None], 6, -1)
    frames[8:16, 8:12] *= 1 + 0.3 * np.sin(np.arange(6))
    return write_nifti("movies/cine.nii.gz", frames.astype(np.float32), AFFINE).parent


def test_what_is_scored_is_what_is_reconstructed(movies: Path) -> None:
    """The network gets the same samples and coil maps from evaluation, which has seen all samples, as from inference."""
    parsers = []
    for names in (("train.json", "evaluate.json"), ("inference.json",)):
        parser = ConfigParser()
        parser.read_config([str(CINE / "configs" / name) for name in names])
        parser.update({**SMALL_CINE, "num_workers": 0, "dataset_dir": str(movies)})
        parsers.append(parser)
    parsers[1]["slice_index"] = 2  # the last, which validates
    scored, reconstructed = (parser.get_parsed_content("dataset")[0]["image"] for parser in parsers)
    assert torch.equal(plain_tensor(scored), plain_tensor(reconstructed))


def test_movies_train_and_resume(movies: Path, tmp_path: Path) -> None:
    def train_cine(name: str, **overrides: Any) -> dict[str, Any]:
        options = {**SMALL_CINE, "num_workers": 0, "val_interval": 2, "n_frames": 4, "epochs": 2, **overrides}
        run(CINE, "training", "train.json", **options, dataset_dir=str(movies), output_dir=str(tmp_path / name))
        return torch.load(tmp_path / name / "model_last.pt", weights_only=True)

    whole = train_cine("whole")
    train_cine("cut", **{"train#trainer#max_epochs": 1})
    with pytest.raises(RuntimeError) as raised:
        train_cine("cut", resume=True, epochs=3)
    assert "ends at 4 (t_total)" in str(input_error(raised.value))
    resumed = train_cine("cut", resume=True)
    # two slices to train on, one to validate
    assert whole["iteration"] == 4
    assert resumed["best_metric"] == whole["best_metric"] > 10
    assert all(torch.equal(resumed["model"][key], value) for key, value in whole["model"].items())


def test_movies_are_scored_and_reconstructed_in_their_place(movies: Path, weights: Path, tmp_path: Path) -> None:
    options = {**SMALL_CINE, "ckpt_path": str(weights), "dataset_dir": str(movies), "amp": False}
    run(
        CINE, "evaluating", "train.json", "evaluate.json", **options, num_workers=0, output_dir=str(tmp_path / "scores")
    )
    scores = {}
    for name in ("val_psnr", "val_psnr_zero_filled"):
        scores[name] = float((tmp_path / "scores" / f"{name}_raw.csv").read_text().splitlines()[1].split(",")[1])
    assert scores["val_psnr"] > scores["val_psnr_zero_filled"] + 2.5
    assert len(Page(tmp_path / "scores" / "evaluation.html").images) == 1

    run(CINE, "run", "inference.json", **options, slice_index=2, output_dir=str(tmp_path / "out"))
    assert len(Page(tmp_path / "out" / "inference.html").images) == 1
    image = nib.load(tmp_path / "out" / "cine_recon.nii.gz")
    assert image.shape == (24, 20, 1, 6)
    np.testing.assert_allclose(image.affine @ [0, 0, 0, 1], AFFINE @ [0, 0, 2, 1], atol=1e-4)
    expected = np.asarray(nib.load(movies / "cine.nii.gz").dataobj)[:, :, 2]
    assert np.corrcoef(expected.ravel(), np.asarray(image.dataobj)[:, :, 0].ravel())[0, 1] > 0.97
