"""Scores of reconstructions: what is compared, how weights are tuned, what is drawn and written."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_cases import WARNINGS
from conftest import BUNDLES, phantom
from PIL import Image

from memnet.bundle import input_error
from memnet.nets.packed import PackedMoDL
from memnet.workflow import reconstruction_scoring
from memnet.workflow.pics import METHODS, Method
from memnet.workflow.reconstruction_panels import write_pictures
from memnet.workflow.reconstruction_scoring import find_weight, image_quality, score_reconstruction

pytestmark = WARNINGS

SMALL: dict[str, Any] = {"n_coils": 3, "acceleration": 2.5, "calibration": 12, "n_unrolls": 1, "channels": 4}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights with which the network is SENSE with one small weight of regularisation."""
    network = PackedMoDL(n_unrolls=1, channels=4)
    torch.nn.init.zeros_(network.regularizers[0].residual[-1].weight)
    torch.nn.init.zeros_(network.regularizers[0].residual[-1].bias)
    torch.save(network.state_dict(), tmp_path / "sense.pt")
    return tmp_path / "sense.pt"


def volumes(folder: Path, *seeds: int) -> Path:
    folder.mkdir()
    for seed in seeds:
        nib.save(nib.Nifti1Image(phantom((5, 24, 22), seed)[0], np.eye(4)), folder / f"t1.{seed}.nii.gz")
    return folder


def test_every_method_gets_the_same_data_and_a_row(weights: Path, tmp_path: Path) -> None:
    scored, tuning = volumes(tmp_path / "scored", 0, 1), volumes(tmp_path / "tuning", 2)
    options = {**SMALL, "device": "cpu", "amp": False}
    methods = ["zero-filled", "CG-SENSE"]
    bundle = shutil.copytree(BUNDLES / "knee_mri_recon_mel", tmp_path / "knee")
    (bundle / "models").mkdir(exist_ok=True)
    weights.replace(bundle / "models" / "model.pt")
    score_reconstruction(bundle, scored, tuning, tmp_path / "out", methods, **options)
    with (tmp_path / "out" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["method"]) for row in rows] == [
        (case, method) for case in ("t1.0", "t1.1") for method in (*methods, bundle.name)
    ]
    for zero, sense, network in (rows[:3], rows[3:]):
        assert float(zero["weight"]) == float(network["weight"]) == 0 < float(sense["weight"])
        assert float(zero["psnr"]) + 1 < float(sense["psnr"]) and float(zero["psnr"]) + 1 < float(network["psnr"])
        assert float(zero["nrmse"]) > float(sense["nrmse"]) and 0 < float(sense["ssim"]) < 1
    mean = np.mean([float(row["psnr"]) for row in rows if row["method"] == "CG-SENSE"])
    assert f"| {mean:.2f} |" in (tmp_path / "out" / "scores.md").read_text()
    # three columns and the reference
    with Image.open(tmp_path / "out" / "t1.0.png") as picture:
        assert picture.width == pytest.approx(110 * (4 * 2.44 + 0.04), abs=2)


def test_a_method_that_takes_no_odd_sides_is_left_out(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended the command after minutes, and nothing was written."""
    even = Method(METHODS["volume"]["CG-SENSE"].solve, takes_odd_sides=False)
    methods = {"zero-filled": METHODS["volume"]["zero-filled"], "even": even}
    monkeypatch.setitem(METHODS, "volume", methods)
    tuning = volumes(tmp_path / "tuning", 2)
    for name, shape in (("scored", (5, 24, 23)), ("all_odd", (5, 24, 21))):
        volumes(tmp_path / name, *([0] if name == "scored" else []))
        nib.save(nib.Nifti1Image(phantom(shape, 1)[0], np.eye(4)), tmp_path / name / "t1.1.nii.gz")
        options = {**SMALL, "device": "cpu", "amp": False, "ckpt_path": str(weights)}
        bundle = BUNDLES / "knee_mri_recon_mel"
        rows = score_reconstruction(bundle, tmp_path / name, tuning, tmp_path / f"{name}_out", (), **options)
        expected = ["zero-filled", *(["even"] if name == "scored" else []), bundle.name]
        assert [row["method"] for row in rows if row["case"] == rows[0]["case"]] == expected
        assert "even" not in [row["method"] for row in rows if row["case"] == "t1.1"]
        assert "Left out where a side of k-space is odd: even." in (tmp_path / f"{name}_out" / "scores.md").read_text()


def test_slices_of_movies_are_named_by_their_files(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "movies").mkdir()
    for name in ("a", "b"):
        film = phantom((24, 22, 5), 3)[0][..., 2:3, None] * np.linspace(1, 1.2, 5)
        nib.save(nib.Nifti1Image(film.astype(np.float32), np.eye(4)), tmp_path / "movies" / f"{name}.nii.gz")
    options = {**SMALL, "ckpt_path": str(weights), "device": "cpu", "calibration_lines": 8}
    folders = tmp_path / "movies", tmp_path / "movies", tmp_path / "out"
    rows = score_reconstruction(BUNDLES / "cardiac_cine_recon_mel", *folders, ["zero-filled"], **options)
    names = ["a_0", "b_0"]
    assert [row["case"] for row in rows if row["method"] == "zero-filled"] == names
    assert sorted(file.stem for file in (tmp_path / "out").glob("*.gif")) == names


def test_scores_are_those_of_the_definition() -> None:
    reference = torch.zeros(2, 2, 8, 8)
    reference[0, :, 2:6] = 4.0
    # the phase does not count, the largest magnitude is the peak
    assert image_quality(reference.flip(0), reference)["nrmse"] == 0
    found = image_quality(reference * 0.9, reference)
    assert found["nrmse"] == pytest.approx(0.1)
    assert found["psnr"] == pytest.approx(-10 * np.log10(0.1**2 / 2), abs=1e-3)
    assert found["ssim"] < 1


def test_the_weight_is_searched_until_it_gets_worse_on_both_sides() -> None:
    tried = []

    def solve(kspace: torch.Tensor, csm: torch.Tensor, mask: torch.Tensor, weight: float) -> torch.Tensor:
        tried.append(weight)
        return torch.ones(1, 8, 8, dtype=torch.complex64) * (1 + abs(np.log2(weight / 0.5)))

    case = {"image": torch.zeros(3, 1, 8, 8, dtype=torch.complex64), "label": torch.stack([torch.ones(1, 8, 8)] * 2)}
    case["label"][1] = 0
    assert find_weight(Method(solve, 0.0625), [case]) == 0.5
    assert sorted(tried) == [0.0625, 0.125, 0.25, 0.5, 1.0]
    assert find_weight(Method(solve), [case]) == 0.0


def test_what_cannot_be_is_refused_before_weights_are_searched_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = volumes(tmp_path / "volumes", 0)
    monkeypatch.setattr(reconstruction_scoring, "find_weight", lambda *_: pytest.fail("a weight was searched for"))
    knee, out = BUNDLES / "knee_mri_recon_mel", tmp_path / "out"
    with pytest.raises(ValueError, match=r"nosuch\.pt"):
        score_reconstruction(knee, folder, folder, out, ["CG-SENSE"], **SMALL, ckpt_path=str(tmp_path / "nosuch.pt"))
    with pytest.raises(RuntimeError) as raised:
        score_reconstruction(knee, tmp_path / "absent", folder, out, ["CG-SENSE"], **SMALL)
    assert "absent" in str(input_error(raised.value))
    with pytest.raises(ValueError, match="is no folder"):
        score_reconstruction(knee, folder, folder, next(folder.iterdir()), ["CG-SENSE"], **SMALL)
    assert not out.exists()


def test_what_is_unknown_is_refused(tmp_path: Path) -> None:
    folder = volumes(tmp_path / "volumes", 0)
    with pytest.raises(ValueError, match="got magic"):
        score_reconstruction(BUNDLES / "knee_mri_recon_mel", folder, folder, tmp_path, ["magic"])
    with pytest.raises(ValueError, match="--bundle"):
        score_reconstruction(tmp_path, folder, folder, tmp_path)


def test_pictures_show_planes_errors_and_the_course_in_time(tmp_path: Path) -> None:
    movie = torch.rand(1, 6, 20, 24)
    images = {"zero-filled": 0.8 * movie, "reference": movie}
    png, gif = write_pictures(images, tmp_path / "heart", movie=True)
    with Image.open(gif) as animation:
        assert animation.n_frames == 6
    with Image.open(png) as picture:
        shown = np.asarray(picture.convert("L")).astype(float)
    height, width = shown.shape
    rows = [shown[int(height * (0.04 + 0.32 * k)) : int(height * (0.3 + 0.32 * k))] for k in range(3)]
    # the reference has no error, the other one has
    assert rows[1][20:, width // 2 + 10 :].max() < 40 < rows[1][20:, : width // 2].max()
    assert all(row.std() > 20 for row in (rows[0], rows[2]))
    assert write_pictures(images, tmp_path / "knee") == [tmp_path / "knee.png"]
    sizes = {}
    for sides in ((1.0, 1.0), (1.0, 2.0)):
        with Image.open(*write_pictures(images, tmp_path / "knee", sides=sides)) as picture:
            sizes[sides] = picture.size
    assert sizes[1.0, 2.0][0] == sizes[1.0, 1.0][0] and sizes[1.0, 2.0][1] > 1.8 * sizes[1.0, 1.0][1]


def test_methods_that_are_not_installed_are_told_apart() -> None:
    assert Method(lambda *_: _[0], needs="no_such_module_or_program").is_installed is False
    assert all(method.is_installed for table in METHODS.values() for name, method in table.items() if not method.needs)
