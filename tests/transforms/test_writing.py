"""Writing of label maps; what a full disk does to it is in tests/faults."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch

from memnet.transforms.modalities import LoadModalitiesd
from memnet.transforms.writing import AtomicNibabelWriter


@pytest.mark.parametrize("codes", [(0, 0), (1, 1), (0, 2), (4, 1)])
def test_the_space_of_the_scan_is_that_of_the_label_map(codes: tuple[int, int], tmp_path: Path) -> None:
    """A file without orientation got one, so that other programs saw the labels mirrored beside it."""
    affine = np.diag([2.0, 2, 3, 1])
    affine[:3, 3] = -9
    image = nib.Nifti1Image(np.random.default_rng(0).random((8, 7, 6), dtype=np.float32), affine)
    image.set_qform(affine, codes[1])
    image.set_sform(affine, codes[0])
    nib.save(image, tmp_path / "scan.nii.gz")
    volume = LoadModalitiesd("image")({"image": str(tmp_path / "scan.nii.gz")})["image"]
    writer = AtomicNibabelWriter(output_dtype=np.uint8)
    writer.set_data_array((volume[:1] > 0.5).float(), channel_dim=0, squeeze_end_dims=True)
    writer.set_metadata(volume.meta)
    writer.write(tmp_path / "labels.nii.gz")
    scan, labels = (SimpleITK.ReadImage(str(tmp_path / f"{name}.nii.gz")) for name in ("scan", "labels"))
    assert labels.GetOrigin() == pytest.approx(scan.GetOrigin()) and labels.GetDirection() == scan.GetDirection()
    written = nib.load(tmp_path / "labels.nii.gz")
    np.testing.assert_allclose(written.affine, nib.load(tmp_path / "scan.nii.gz").affine)
    code = codes[0] or codes[1]
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (code, code)


def test_a_guessed_orientation_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = nib.Nifti1Image(np.random.default_rng(0).random((8, 7, 6), dtype=np.float32), None)
    nib.save(image, tmp_path / "scan.nii.gz")
    for _ in range(2):
        LoadModalitiesd("image")({"image": str(tmp_path / "scan.nii.gz")})
    assert caplog.text.count("tells no orientation") == 1


def test_a_single_slice_keeps_its_three_dimensions(tmp_path: Path) -> None:
    writer = AtomicNibabelWriter(output_dtype=np.uint8)
    writer.set_data_array(torch.ones(1, 6, 5, 1), channel_dim=0, squeeze_end_dims=True)
    writer.set_metadata({"affine": np.eye(4)})
    writer.write(tmp_path / "a.nii.gz")
    assert nib.load(tmp_path / "a.nii.gz").shape == (6, 5, 1)
