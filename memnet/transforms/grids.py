"""Compares the voxel grids of volumes, says how they differ, and resamples to isotropic voxels."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform, Spacing
from monai.utils import GridSampleMode
from scipy import ndimage

from memnet.metadata import plain_tensor

__all__ = ["Grid", "ToSpacingd", "file_grid", "grid_of", "require_one_grid", "same_grid", "smoothed"]

_MOST_VOXELS = 2**28

# number of voxels along the axes, and affine (mm, RAS+)
Grid = tuple[tuple[int, ...], np.ndarray]


def grid_of(volume: MetaTensor) -> Grid:
    """Return the grid of a volume ``(C, D, H, W)``."""
    return tuple(volume.shape[1:]), np.asarray(volume.affine)


def file_grid(volume: MetaTensor) -> Grid:
    """Return the grid of the file that a volume was read from, whatever was done to it since."""
    shape, affine = volume.meta["spatial_shape"], volume.meta["original_affine"]
    return tuple(int(n) for n in shape), np.asarray(affine)


def same_grid(a: Grid, b: Grid) -> bool:
    """Tell whether corners lie within a twentieth of a voxel; affines written by different programs differ in rounding."""
    (shape, affine), (other_shape, other) = a, b
    if shape != other_shape:
        return False
    corners = np.stack(np.meshgrid(*[[0, n - 1] for n in shape], [1], indexing="ij"), -1).reshape(-1, 4)
    moved = np.linalg.norm(corners @ (affine - other)[:3].T, axis=1)
    return bool(moved.max() <= 0.05 * np.linalg.norm(affine[:3, :3], axis=0).min())


def require_one_grid(
    files: Sequence[tuple[str, Grid]], advice: str = "give --resample true if the two are aligned in space"
) -> None:
    """Refuse files of different grids.

    Args:
        files: each file's name and grid.
        advice: how the message ends.

    Raises:
        ValueError: naming a file whose grid is not that of most, and both grids.
    """
    usual, expected = max(files, key=lambda file: sum(same_grid(file[1], other) for _, other in files))
    for name, grid in files:
        if not same_grid(grid, expected):
            raise ValueError(
                f"{name}: its grid ({_words(grid)}) differs from that of {usual} ({_words(expected)}); {advice}"
            )


def smoothed(image: MetaTensor, affine: np.ndarray) -> MetaTensor:
    """Smooth along axes whose voxels are less than three quarters of those to come, as if they were of that size.

    Interpolation takes the voxels next to a point and leaves the rest, with whose mean noise would have been less.

    Args:
        image: ``(C, D, H, W)``, as it will be interpolated.
        affine: of the grid to come, mm, ``(3, 3)`` at least; an axis of the image is compared with the most parallel of its axes.

    Returns:
        The image itself where there is nothing to smooth.
    """
    axes = np.asarray(image.affine, dtype=np.float64)[:3, :3]
    to_come = np.asarray(affine, dtype=np.float64)[:3, :3]
    voxels, sides = np.linalg.norm(axes, axis=0), np.linalg.norm(to_come, axis=0)
    nearest = np.abs((axes / voxels).T @ (to_come / sides)).argmax(1)
    # two Gaussians of a full width at half maximum of a voxel's side each, the smaller one's taken off
    ratios = sides[nearest] / voxels
    sigmas = [0.42 * float(np.sqrt(ratio**2 - 1)) if ratio > 4 / 3 else 0.0 for ratio in ratios]
    if not any(sigmas):
        return image
    smooth = ndimage.gaussian_filter(plain_tensor(image).cpu().numpy(), (0, *sigmas), mode="nearest", truncate=3)
    result = image.clone()
    plain_tensor(result).copy_(torch.from_numpy(smooth))
    return result


class ToSpacingd(MapTransform, InvertibleTransform):
    """Resample to isotropic voxels, trilinearly, and back.

    Along axes of much smaller voxels the image is smoothed first, see :func:`smoothed`.

    MONAI's ``Spacingd`` takes every entry whose key begins like the image's for metadata, and fails on the
    ``image_path`` that MONAI Label hands over.

    Args:
        keys: the images, ``(C, D, H, W)`` MetaTensors.
        spacing: side of a voxel in mm.

    Raises:
        ValueError: the voxels' sides, as the file has them, make a volume of nothing or of more than 2^28 voxels.
    """

    def __init__(self, keys: KeysCollection, spacing: float = 1.0) -> None:
        super().__init__(keys)
        self.side = spacing
        self.spacing = Spacing(pixdim=(spacing,) * 3, mode=GridSampleMode.BILINEAR, dtype=np.float32)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample."""
        d = dict(data)
        for key in self.key_iterator(d):
            _require_sensible_size(d[key], self.side)
            d[key] = self.spacing(smoothed(d[key], np.eye(3) * self.side))
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample back to the original grid."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.spacing.inverse(d[key])
        return d


def _words(grid: Grid) -> str:
    shape, affine = grid
    voxel = " x ".join(f"{side:.4g}" for side in np.linalg.norm(affine[:3, :3], axis=0))
    origin = ", ".join(f"{x:.4g}" for x in affine[:3, 3])
    axes = "".join(nib.aff2axcodes(affine))
    return f"{' x '.join(map(str, shape))} voxels of {voxel} mm, {axes}, first at ({origin})"


def _require_sensible_size(image: MetaTensor, side: float) -> None:
    sides = np.linalg.norm(np.asarray(image.affine, dtype=np.float64)[:3, :3], axis=0)
    sizes = [n * of_file / side for n, of_file in zip(image.shape[1:], sides, strict=True)]
    if min(sizes) < 0.5 or float(np.prod(sizes)) > _MOST_VOXELS:
        told = " x ".join(f"{s:.3g}" for s in sides)
        raise ValueError(
            f"{image.meta.get('filename_or_obj', 'image')}: has voxels of {told} mm, so that at {side:g} mm it would have "
            f"{' x '.join(f'{size:.3g}' for size in sizes)} voxels; is its header right?"
        )
