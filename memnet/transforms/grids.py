"""Compares the voxel grids of volumes and says how they differ."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np
from monai.data import MetaTensor

__all__ = ["Grid", "file_grid", "grid_of", "require_one_grid", "same_grid"]

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


def _words(grid: Grid) -> str:
    shape, affine = grid
    voxel = " x ".join(f"{side:.4g}" for side in np.linalg.norm(affine[:3, :3], axis=0))
    origin = ", ".join(f"{x:.4g}" for x in affine[:3, 3])
    axes = "".join(nib.aff2axcodes(affine))
    return f"{' x '.join(map(str, shape))} voxels of {voxel} mm, {axes}, first at ({origin})"
