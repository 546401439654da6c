"""Bad input to a bundle ends in one clear line, exit code 1 and no file, and in a ValueError for hosts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BUNDLES, phantom
from monai.bundle import ConfigParser
from pages import Page
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from memnet import bundle
from memnet.bundle import input_error
from memnet.datasets import find_brats
from memnet.transforms.volumes import read_volume

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")

CONFIGS = BUNDLES / "brain_mri_tissue_invres" / "configs"
SMALL: dict[str, Any] = {
    "network_def#channels": 8,
    "network_def#n_levels": 2,
    "roi_size": [16, 16, 16],
    "device": "cpu",
}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser.update(SMALL)
    path = tmp_path / "weights" / "model.pt"
    path.parent.mkdir()
    torch.save(parser.get_parsed_content("network_def").state_dict(), path)
    return path


def refused(config: str, **overrides: Any) -> str:
    """Run a config in this process and return the message of the ValueError behind what it raised."""
    with pytest.raises((RuntimeError, ValueError)) as raised:
        monai.bundle.run(config_file=str(CONFIGS / config), logging_file=False, **{**SMALL, **overrides})  # type: ignore[arg-type]
    found = input_error(raised.value)
    assert found is not None, repr(raised.value)
    return str(found)


def write_bad(folder: Path, kind: str) -> tuple[Path, str]:
    """Write a file that cannot be segmented; return it and a word of the message."""
    path = folder / f"{kind.replace(' ', '_')}.nii.gz"
    t1 = phantom()[0]
    images = {
        "4D": np.stack([t1, t1], -1),
        "2D": t1[:, :, 0],
        "all zero": np.zeros_like(t1),
        "NaN": np.where(t1 > 800, np.nan, t1),
    }
    if kind in images:
        nib.save(nib.Nifti1Image(images[kind].astype(np.float32), np.eye(4)), path)
    elif kind == "not a NIfTI":
        path.write_text("this is a letter, not a scan\n" * 20)
    elif kind == "empty":
        path.touch()
    elif kind == "cut short":
        nib.save(nib.Nifti1Image(t1, np.eye(4)), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "cut short, not compressed":
        path = folder / "short.nii"
        nib.save(nib.Nifti1Image(t1, np.eye(4)), path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "singular affine":
        header = nib.Nifti1Header()
        header.set_data_dtype(np.float32)
        header.set_sform(np.diag([1.0, 1, 0, 1]), code=2)
        nib.save(nib.Nifti1Image(t1, None, header), path)
    elif kind == "a folder":
        path.mkdir()
    words = {
        "4D": r"\(20, 24, 22, 2\), expected a 3D volume",
        "2D": r"\(20, 24\), expected a 3D volume",
        "all zero": "every voxel is 0",
        "NaN": "voxels are NaN or infinite",
        "not a NIfTI": "not a NIfTI",
        "empty": "not a NIfTI",
        "cut short": "damaged",
        "cut short, not compressed": "damaged",
        "singular affine": "affine",
        "a folder": "is a folder",
        "missing": "no such file",
    }
    return path, words[kind]


KINDS = [
    "4D", "2D", "all zero", "NaN", "not a NIfTI", "empty", "cut short", "cut short, not compressed", "singular affine",
    "a folder", "missing",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_volume_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path, word = write_bad(tmp_path, kind)
    with pytest.raises(ValueError, match=word) as raised:
        read_volume(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("kind", ["4D", "NaN", "cut short", "missing"])
def test_inference_leaves_nothing_behind(tmp_path: Path, weights: Path, kind: str) -> None:
    path, _ = write_bad(tmp_path, kind)
    message = refused("inference.json", image=str(path), ckpt_path=str(weights), output_dir=str(tmp_path / "out"))
    assert str(path) in message
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_bad_volumes_among_many_are_passed_over_and_told(
    tmp_path: Path, weights: Path, write_nifti: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    write_nifti("scans/a.nii.gz", phantom()[0])
    bad = [write_bad(tmp_path / "scans", kind)[0] for kind in ("cut short", "NaN")]
    write_nifti("scans/z.nii.gz", phantom()[0])
    out = tmp_path / "out"
    message = refused(
        "inference.json", dataset_dir=str(tmp_path / "scans"), ckpt_path=str(weights), output_dir=str(out)
    )
    assert message.startswith("2 of 4 inputs could not be read, the others are done: ")
    assert all(str(path) in message and f"passed over: {path}" in caplog.text for path in bad)
    names = {"a_tissue.nii.gz", "z_tissue.nii.gz", "tissue_volumes.csv", "inference.html"}
    assert {p.name for p in out.iterdir()} == names
    assert (out / "tissue_volumes.csv").read_text().count("\n") == 3
    page = Page(out / "inference.html")
    assert page.column("label map") == ["a_tissue.nii.gz", "z_tissue.nii.gz"]
    (passed_over,) = (table[1:] for table in page.tables if table[0] == ["input", "why"])
    assert [row[0] for row in passed_over] == sorted(path.name for path in bad)
    assert all(row[1].startswith(f"{row[0]}: ") for row in passed_over) and str(tmp_path / "scans") not in page.text


def test_nothing_but_bad_volumes(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "scans").mkdir()
    for kind in KINDS[:5]:
        write_bad(tmp_path / "scans", kind)
    message = refused(
        "inference.json", dataset_dir=str(tmp_path / "scans"), ckpt_path=str(weights), output_dir=str(tmp_path / "out")
    )
    assert message.startswith("5 of 5 inputs could not be read") and message.endswith("; and 2 more")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["inference.html"]


def test_failed_writing_leaves_no_partial_file(
    tmp_path: Path, weights: Path, write_nifti: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(image: Any, filename: Any, **kwargs: Any) -> None:
        Path(filename).write_bytes(b"half a fi")
        raise OSError("No space left on device")

    scan = write_nifti("a.nii.gz", phantom()[0])
    monkeypatch.setattr("nibabel.save", disk_full)
    with pytest.raises(RuntimeError):
        monai.bundle.run(
            config_file=str(CONFIGS / "inference.json"),
            logging_file=False,  # type: ignore[arg-type]
            **{**SMALL, "image": str(scan), "ckpt_path": str(weights), "output_dir": str(tmp_path / "out")},
        )
    assert not list((tmp_path / "out").iterdir())


def test_wrong_number_of_channels(tmp_path: Path, weights: Path, write_nifti: Callable[..., Path]) -> None:
    scan = str(write_nifti("a.nii.gz", phantom()[0]))
    datalist = tmp_path / "d.json"
    datalist.write_text(json.dumps({"test": [{"image": [scan, scan, scan]}]}))
    assert "expected one file or the 2 modalities" in refused("inference.json", datalist=str(datalist))
    options = {"image": scan, "ckpt_path": str(weights), "output_dir": str(tmp_path / "out")}
    assert "1 of another shape" in refused("inference.json", **options, **{"network_def#in_channels": 3})


def test_modalities_apart_in_space(tmp_path: Path, weights: Path, write_nifti: Callable[..., Path]) -> None:
    t1, t2, _ = phantom()
    far = np.eye(4)
    far[:3, 3] = 1000
    options = {"t1": str(write_nifti("t1.nii", t1)), "t2": str(write_nifti("t2.nii", t2, far))}
    assert "do not overlap" in refused("inference.json", **options, ckpt_path=str(weights), output_dir=str(tmp_path))


def test_no_input_at_all() -> None:
    assert "--image" in refused("inference.json")
    assert "--dataset_dir" in refused("train.json")


def test_labels_unknown_to_the_map(iseg_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(iseg_folder, tmp_path / "iseg")
    label = tmp_path / "iseg" / "subject-2-label.hdr"
    values = np.asarray(nib.load(label).dataobj).copy()
    values[values == 150] = 77
    nib.save(nib.AnalyzeImage(values, np.diag([-1.0, 1, 1, 1])), label)
    message = refused(
        "train.json",
        dataset_dir=str(tmp_path / "iseg"),
        output_dir=str(tmp_path / "out"),
        num_workers=0,
        patch_size=[16, 16, 16],
    )
    assert str(label) in message and "77" in message


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("epochz", "epochs"), ("network_nam", "network_name"), ("train#trainer#max_epoch", "train#trainer#max_epochs")],
)
def test_unknown_override_is_named_with_the_nearest(key: str, nearest: str) -> None:
    message = refused("train.json", **{key: 1})
    assert repr(key) in message and repr(nearest) in message


def test_unknown_override_of_inference() -> None:
    assert "'image'" in refused("inference.json", imag="scan.nii.gz")
    assert "'chanels'" in refused("inference.json", image=__file__, **{"network_def#chanels": 4})


def test_unknown_network() -> None:
    assert "baseline, partially, fully" in refused("inference.json", network_name="resnet", image=__file__)


def test_weights_that_do_not_fit(tmp_path: Path, weights: Path, write_nifti: Callable[..., Path]) -> None:
    options = {"image": str(write_nifti("a.nii.gz", phantom()[0])), "output_dir": str(tmp_path / "out")}
    fit = {**options, "ckpt_path": str(weights)}
    assert "do not fit FullyInvResUNet" in refused("inference.json", **fit, **{"network_def#channels": 12})
    assert "do not fit UNet3D" in refused("inference.json", **fit, network_name="baseline")
    absent = str(tmp_path / "absent.pt")
    assert absent in refused("inference.json", **options, ckpt_path=absent)
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(weights.read_bytes()[:1000])
    assert "not a file of weights" in refused("inference.json", **options, ckpt_path=str(damaged))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_nothing_to_resume(tmp_path: Path, iseg_folder: Path) -> None:
    options = {"dataset_dir": str(iseg_folder), "output_dir": str(tmp_path), "num_workers": 0}
    assert "no training to resume" in refused("train.json", **options, resume=True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config_file", str(CONFIGS / "train.json"), "--epochz", "1"], "epochz"),
        (["--config_file", str(CONFIGS / "inference.json"), "--image", "absent.nii.gz"], "absent.nii.gz"),
        (["--config_file", str(CONFIGS / "inference.json"), "--network_name", "resnet"], "network_name is 'resnet'"),
        (
            ["b.nii.gz", "--config_file", str(CONFIGS / "inference.json"), "--image", "a.nii.gz"],
            "'b.nii.gz' is nothing",
        ),
        (
            ["training", "--config_file", str(CONFIGS / "train.json"), "--dataset_dir", "a", "--pretrained", "b.pt"],
            "b.pt: no such weights file",
        ),
    ],
    ids=["unknown override", "missing file", "no such network", "files of a pattern", "weights before data"],
)
def test_command_ends_in_one_line_and_exit_code_1(arguments: list[str], told: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "monai.bundle", "run", *arguments, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and told in last
    assert "Traceback" not in done.stderr + done.stdout


def test_evaluation_without_weights_ends_in_one_line(iseg_folder: Path, tmp_path: Path) -> None:
    configs = str([str(CONFIGS / name) for name in ("train.json", "evaluate.json")])
    overrides = {
        **SMALL,
        "num_workers": 0,
        "dataset_dir": iseg_folder,
        "ckpt_path": "absent.pt",
        "output_dir": tmp_path / "out",
    }
    command = [sys.executable, "-m", "monai.bundle", "run", "evaluating", "--config_file", configs]
    command += [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    assert [line for line in done.stderr.splitlines() if "absent.pt: no such weights" in line] == [
        done.stderr.splitlines()[-1]
    ]
    assert not (tmp_path / "out").exists()


def test_bad_volume_in_the_loop_ends_the_command_in_one_line(tmp_path: Path, weights: Path) -> None:
    path, _ = write_bad(tmp_path, "NaN")
    overrides = {**SMALL, "image": path, "ckpt_path": weights, "output_dir": tmp_path / "out"}
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(CONFIGS / "inference.json")]
    command += [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout and "terminating" not in done.stderr + done.stdout
    assert [line for line in done.stderr.splitlines() if "NaN or infinite" in line] == [done.stderr.splitlines()[-1]]


def test_torchrun_tells_the_error_in_its_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(ValueError, match="no such folder") as raised:
        find_brats("BraTS2020")
    bundle._print_input_error(raised.type, raised.value, raised.tb)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    summary = str(ChildFailedError("monai.bundle", {0: failure}))
    assert "traceback : BraTS2020: no such folder; expected a BraTS folder" in summary
