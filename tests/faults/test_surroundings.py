"""Where a bundle lies and what its files are called is no matter; what comes from elsewhere is data, not code."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundle_cases import SMALL, TISSUE, WARNINGS, run
from conftest import phantom
from pages import Page

from memnet.bundle import input_error

pytestmark = WARNINGS

READ_ONLY = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from bundle_cases import SMALL, run
from memnet.bundle import input_error
bundle, options = Path(sys.argv[2]), {**SMALL, "image": sys.argv[3], "ckpt_path": sys.argv[4], "report": False}
run(bundle, "run", "inference.json", **options, output_dir=sys.argv[5])
try:
    run(bundle, "run", "inference.json", **options)
except Exception as error:
    print("told:", input_error(error))
"""


def without_privilege() -> None:
    """Let permissions bind root, too (PR_CAPBSET_DROP of CAP_DAC_OVERRIDE); others have nothing to drop."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def test_bundle_in_a_read_only_folder_runs(
    shipped: Callable[[Path], Path],
    random_weights: Callable[..., Path],
    write_nifti: Callable[..., Path],
    tmp_path: Path,
) -> None:
    bundle, scan = shipped(TISSUE.folder), write_nifti("a.nii.gz", phantom()[0])
    weights, folders = random_weights(TISSUE.folder, **SMALL), [bundle, *(f for f in bundle.rglob("*") if f.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    arguments = [Path(__file__).parent.parent, bundle, scan, weights, tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        preexec_fn=without_privilege,
        timeout=300,
    )
    for folder in folders:
        folder.chmod(0o755)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"a_tissue.nii.gz", "tissue_volumes.csv"}, (
        done.stderr
    )
    told = f"told: {bundle / 'eval'}: Permission denied; outputs go where --output_dir says"
    assert told in done.stdout.splitlines(), done.stdout
    assert not (bundle / "eval").exists()


def test_spaces_and_other_alphabets(
    shipped: Callable[[Path], Path], random_weights: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = shipped(TISSUE.folder)
    bundle = bundle.rename(tmp_path / "mes modèles, 脳")
    folder = tmp_path / "Größe & Überblick"
    folder.mkdir()
    names = ["Großhirn 1 (T1).nii.gz", "脳 T1.nii.gz", "$__import__('os').abort() T1.nii.gz", "@image T1.nii.gz"]
    for name in names:
        nib.save(nib.Nifti1Image(phantom()[0], np.eye(4)), folder / name)
    options = {**SMALL, "dataset_dir": str(folder), "ckpt_path": str(random_weights(TISSUE.folder, **SMALL))}
    run(bundle, "run", "inference.json", **options)
    stems = [name.removesuffix(".nii.gz") for name in names]
    outputs = {file.name for file in (bundle / "eval").iterdir()}
    assert outputs == {*(f"{stem}_tissue.nii.gz" for stem in stems), "tissue_volumes.csv", "inference.html"}
    assert sorted(Page(bundle / "eval" / "inference.html").column("input")) == sorted(names)


def test_a_folder_called_by_a_number_is_found(
    random_weights: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "100307").mkdir()
    nib.save(nib.Nifti1Image(phantom()[0], np.eye(4)), tmp_path / "100307" / "T1.nii.gz")
    monkeypatch.chdir(tmp_path)
    options = {**SMALL, "ckpt_path": str(random_weights(TISSUE.folder, **SMALL)), "report": False}
    # as the command line hands it over
    run(TISSUE.folder, "run", "inference.json", **options, dataset_dir=100307, output_dir=str(tmp_path / "out"))
    assert (tmp_path / "out" / "T1_tissue.nii.gz").is_file()


@pytest.mark.parametrize("image", ["$open('planted', 'w')", "%planted", "@planted"])
def test_a_datalist_is_data_not_code(image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datalist.json").write_text(json.dumps({"test": [{"image": image}]}))
    with pytest.raises(RuntimeError) as raised:
        run(TISSUE.folder, "run", "inference.json", **SMALL, datalist="datalist.json", output_dir=str(tmp_path / "out"))
    assert f"{image}: no such file" in str(input_error(raised.value))
    assert [file.name for file in tmp_path.iterdir()] == ["datalist.json"]


def test_a_folder_called_memnet_does_not_hide_the_package(tmp_path: Path) -> None:
    (tmp_path / "memnet").mkdir()
    command = [sys.executable, "-m", "memnet", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
