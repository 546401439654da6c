"""What brain_mri_tumor_invres does beyond what all bundles do."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_cases import SMALL, SMALL_TRAINING, TUMOR, WARNINGS, run
from conftest import phantom
from monai.bundle import ConfigParser

from memnet.bundle import input_error

pytestmark = WARNINGS

TRAINING = {**SMALL_TRAINING, "network_name": "baseline", "epochs": 1}


def refused(*configs: str, **overrides: Any) -> str:
    """Run the bundle and return the message of the ValueError behind what it raised."""
    with pytest.raises((RuntimeError, ValueError)) as raised:
        run(TUMOR.folder, "run", *configs, **overrides)
    found = input_error(raised.value)
    assert found is not None, repr(raised.value)
    return str(found)


@pytest.fixture
def brats_copy(brats_folder: Path, tmp_path: Path) -> Path:
    """A BraTS folder of one's own to spoil."""
    return Path(shutil.copytree(brats_folder, tmp_path / "brats"))


@pytest.fixture
def gli_folder(brats_folder: Path, tmp_path: Path) -> Path:
    """The same cases as BraTS distributes them from 2023 on: other names, enhancing tumour 3."""
    kinds = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f", "seg": "seg"}
    for number in (1, 2, 3):
        old, new = f"BraTS20_Training_{number:03d}", f"BraTS-GLI-{number:05d}-000"
        (tmp_path / "gli" / new).mkdir(parents=True)
        for kind, name in kinds.items():
            image = nib.load(brats_folder / old / f"{old}_{kind}.nii.gz")
            values = np.asarray(image.dataobj)
            values = np.where(values == 4, 3, values) if kind == "seg" else values
            nib.save(nib.Nifti1Image(values, image.affine), tmp_path / "gli" / new / f"{new}-{name}.nii.gz")
    return tmp_path / "gli"


def test_both_editions_train_alike(brats_folder: Path, gli_folder: Path, tmp_path: Path) -> None:
    states = []
    for folder in (brats_folder, gli_folder):
        out = tmp_path / f"trained_{len(states)}"
        run(TUMOR.folder, "training", "train.json", **TRAINING, dataset_dir=str(folder), output_dir=str(out))
        states.append(torch.load(out / "model_last.pt", weights_only=True)["model"])
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


def test_enhancing_tumour_is_written_in_the_edition_s_value(write_nifti: Callable[..., Path], tmp_path: Path) -> None:
    class Enhancing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x[:, 0] * 0, x[:, 0] * 0, x[:, 0] * 0, x[:, 0]], 1)

    scan = str(write_nifti("a_t1.nii.gz", phantom()[0]))
    for value, options in {4: {}, 3: {"enhancing_label": 3}}.items():
        replaced = {"network_def": Enhancing(), "handlers": [], "amp": False, **options}
        run(TUMOR.folder, "run", "inference.json", **{**SMALL, "t1": scan, "output_dir": str(tmp_path)}, **replaced)
        labels = np.asarray(nib.load(tmp_path / "a_t1_tumor.nii.gz").dataobj)
        assert set(np.unique(labels)) == {0, value}
    assert "5" in refused("inference.json", **SMALL, t1=scan, enhancing_label=5)


def test_missing_modalities_are_zero_channels_however_the_files_are_given(brats_folder: Path, tmp_path: Path) -> None:
    case = brats_folder / "BraTS20_Training_001" / "BraTS20_Training_001"
    t1c, flair = f"{case}_t1ce.nii.gz", f"{case}_flair.nii.gz"
    datalist = tmp_path / "d.json"
    datalist.write_text(json.dumps({"test": [[None, t1c, None, flair]]}))
    lone = tmp_path / "BraTS20_Training_001"
    lone.mkdir()
    for file in (t1c, flair):
        shutil.copy(file, lone)
    seen = []

    class Look(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.clone())
            return x

    for given in (
        {"t1c": t1c, "flair": flair},
        {"datalist": str(datalist)},
        {"dataset_dir": str(lone)},
        {"dataset_dir": str(tmp_path)},
    ):
        options = {**SMALL, "roi_size": [32, 32, 32], "output_dir": str(tmp_path / "out"), **given}
        run(TUMOR.folder, "run", "inference.json", **options, **{"network_def": Look(), "handlers": [], "amp": False})
    assert len(seen) == 4 and all(torch.equal(x, seen[0]) for x in seen)
    assert [bool(channel.any()) for channel in seen[0][0]] == [False, True, False, True]


def test_scans_scored_after_stripping_look_as_before_to_the_network(
    write_nifti: Callable[..., Path], tmp_path: Path
) -> None:
    """Z-scored files have a constant background below 0, as those of BraTS 2015 do."""
    t1 = phantom()[0]
    seen = []

    class Look(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.clone())
            return x

    scored = (t1 - t1[t1 > 0].mean()) / t1[t1 > 0].std()
    for name, values in {"a_t1.nii.gz": t1, "b_t1.nii.gz": scored}.items():
        options = {**SMALL, "roi_size": [32, 32, 32], "t1": str(write_nifti(name, values)), "output_dir": str(tmp_path)}
        run(TUMOR.folder, "run", "inference.json", **options, **{"network_def": Look(), "handlers": [], "amp": False})
    torch.testing.assert_close(seen[1], seen[0], atol=1e-4, rtol=0)


def test_patch_larger_than_the_volume_is_padded(brats_folder: Path, tmp_path: Path) -> None:
    options = {**TRAINING, "patch_size": [32, 32, 32], "patches_per_volume": 1}
    run(TUMOR.folder, "training", "train.json", **options, dataset_dir=str(brats_folder), output_dir=str(tmp_path))
    assert all(torch.isfinite(v).all() for v in torch.load(tmp_path / "model_best.pt", weights_only=True).values())


def test_training_shows_the_network_what_inference_shows_it(brats_folder: Path, tmp_path: Path) -> None:
    """But for the draws: background and missing modalities are exactly 0, and so are they in training."""
    parser = ConfigParser()
    parser.read_config(str(TUMOR.folder / "configs" / "train.json"))
    parser.update({"patch_size": [16, 16, 16], "dataset_dir": str(brats_folder), "device": "cpu"})
    case = dict(parser.get_parsed_content("cases")["training"][0])
    case["image"] = [None, case["image"][1], None, case["image"][3]]
    transform = parser.get_parsed_content("train#preprocessing")
    transform.set_random_state(seed=0)
    for patch in (patch for _ in range(5) for patch in transform(case)):
        assert not patch["image"][0].any() and not patch["image"][2].any()
        assert patch["image"].min() == 0 and patch["image"].max() <= 1.2
        assert set(patch["label"].unique().tolist()) <= {0, 1, 2, 3}


def test_modalities_of_different_grids(
    random_weights: Callable[..., Path], write_nifti: Callable[..., Path], tmp_path: Path
) -> None:
    t1, t2, _ = phantom()
    files = {
        "t1": str(write_nifti("a_t1.nii.gz", t1)),
        "t2": str(write_nifti("a_t2.nii.gz", t2[::2], np.diag([2.0, 1, 1, 1]))),
        "flair": str(write_nifti("a_flair.nii.gz", t2)),
    }
    options = {**SMALL, **files, "ckpt_path": str(random_weights(TUMOR.folder, **SMALL))}
    out = tmp_path / "out"
    message = refused("inference.json", **options, output_dir=str(out))
    assert message.startswith(files["t2"]) and "--resample true" in message
    assert not out.exists() or not list(out.iterdir())
    run(TUMOR.folder, "run", "inference.json", **options, output_dir=str(out), resample=True)
    assert nib.load(out / "a_t1_tumor.nii.gz").shape == t1.shape


@pytest.mark.parametrize("spoil", ["unknown labels", "two editions", "label grid", "missing file", "one case"])
def test_bad_case_is_named_before_anything_is_written(brats_copy: Path, tmp_path: Path, spoil: str) -> None:
    cases = sorted(brats_copy.iterdir())
    file = cases[1] / f"{cases[1].name}_seg.nii.gz"
    words = [str(file)]
    labels = np.asarray(nib.load(file).dataobj)
    if spoil == "unknown labels":
        nib.save(nib.Nifti1Image(np.where(labels == 4, 7, labels), np.eye(4)), file)
        words += ["7", "known: 0, 1, 2, 3, 4"]
    elif spoil == "two editions":
        nib.save(nib.Nifti1Image(np.where(labels == 1, 3, labels), np.eye(4)), file)
        words += ["--label_map brats2015"]
    elif spoil == "label grid":
        nib.save(nib.Nifti1Image(labels[:-1], np.eye(4)), file)
        words += ["its grid", "--resample true"]
    elif spoil == "missing file":
        (cases[1] / f"{cases[1].name}_flair.nii.gz").unlink()
        words = [cases[1].name, "FLAIR", "_flair.nii.gz", "--allow_missing true"]
    else:
        for case in cases[1:]:
            shutil.rmtree(case)
        words = ["1 labelled case", "at least 2"]
    # every case is read: all of them are trained on or validated with
    out = tmp_path / "out"
    message = refused("train.json", **TRAINING, dataset_dir=str(brats_copy), output_dir=str(out), cache_rate=1.0)
    assert all(word in message for word in words), message
    assert not list(out.rglob("*.pt"))


def test_report_gives_the_regions_and_draws_over_flair(
    brats_folder: Path,
    random_weights: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr("memnet.workflow.reporting.draw_overlay", lambda scan, *_: drawn.append(Path(scan).name))
    caplog.set_level(logging.INFO, "memnet")
    options = {**SMALL, "ckpt_path": str(random_weights(TUMOR.folder, **SMALL)), "output_dir": str(tmp_path / "out")}
    run(TUMOR.folder, "run", "inference.json", **options, dataset_dir=str(brats_folder), overlay=True)
    assert drawn == [f"BraTS20_Training_{k:03d}_flair.nii.gz" for k in (1, 2, 3)]
    table = (tmp_path / "out" / "tumor_volumes.csv").read_text().splitlines()
    assert table[0] == "file,whole tumour [ml],core [ml],enhancing [ml]" and len(table) == 4
    labels = np.asarray(nib.load(tmp_path / "out" / "BraTS20_Training_001_t1_tumor.nii.gz").dataobj)
    expected = [np.isin(labels, values).sum() / 1000 for values in ([1, 2, 4], [1, 4], [4])]
    assert [float(value) for value in table[1].split(",")[1:]] == pytest.approx(expected, abs=1e-3)
    assert "whole tumour" in caplog.text


def test_no_input_says_how_to_give_one() -> None:
    assert "--flair" in refused("inference.json", **SMALL)
    assert "BraTS" in refused("train.json", **SMALL)
