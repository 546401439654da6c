"""Resampling to isotropic voxels and back."""

from __future__ import annotations

import torch
from monai.data import MetaTensor

from memnet.transforms.grids import ToSpacingd


def test_spacing_goes_there_and_back_beside_an_image_path() -> None:
    # MONAI Label hands over image_path, a string, beside image
    affine = torch.diag(torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=torch.float64))
    image = MetaTensor(torch.rand(2, 20, 10, 6), affine=affine, meta={"filename_or_obj": "a.nii.gz"})
    transform = ToSpacingd("image")
    there = transform({"image": image, "image_path": "a.nii.gz"})
    assert abs(there["image"].shape[1] - 10) <= 1 and abs(there["image"].shape[3] - 12) <= 1
    back = transform.inverse(there)["image"]
    assert back.shape == image.shape
    torch.testing.assert_close(back.affine, affine)
