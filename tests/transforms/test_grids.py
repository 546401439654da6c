"""Resampling to isotropic voxels and back."""

from __future__ import annotations

import pytest
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


def test_small_voxels_are_averaged_not_left_out() -> None:
    """Every eighth voxel of 0.5 mm was taken, and its noise."""
    noise = torch.randn(1, 48, 48, 48, generator=torch.Generator().manual_seed(0))
    kept = {}
    for side in (0.5, 0.8, 1.0):
        affine = torch.diag(torch.tensor([side, side, side, 1.0], dtype=torch.float64))
        transform = ToSpacingd("image")
        there = transform({"image": MetaTensor(torch.cat([noise + 5, 0 * noise]), affine=affine)})
        kept[side] = float(there["image"][0, 2:-2, 2:-2, 2:-2].std())
        assert abs(float(there["image"][0].mean()) - 5) < 0.05 and not there["image"][1].any()
        assert transform.inverse(there)["image"].shape == (2, 48, 48, 48)
    assert kept[0.5] < 0.3 and kept[1.0] > 0.95  # 0.35 is what the mean of eight voxels leaves


def test_smoothing_leaves_a_border_between_tissues_where_it_is() -> None:
    affine = torch.diag(torch.tensor([0.5, 0.5, 0.5, 1.0], dtype=torch.float64))
    image = torch.zeros(1, 40, 24, 24)
    image[:, 20:] = 1
    profile = ToSpacingd("image")({"image": MetaTensor(image, affine=affine)})["image"][0, :, 6, 6]
    # the border lies at 9.75 mm from the first voxel's centre
    crossing = 9 + (0.5 - profile[9]) / (profile[10] - profile[9])
    assert float(crossing) == pytest.approx(9.75, abs=0.15)  # 9.5 without
