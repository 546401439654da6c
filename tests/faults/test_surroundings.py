"""Where a bundle lies and what its files are called is no matter; what comes from elsewhere is data, not code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundle_cases import SMALL, TISSUE, WARNINGS, run
from conftest import phantom

from memnet.bundle import input_error

pytestmark = WARNINGS


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
