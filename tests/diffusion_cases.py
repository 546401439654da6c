"""A diffusion series made from an analytic field of tensors in the world, for tests on any grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

GRIDS = {
    "RAS": np.diag([2.0, 2, 2, 1]),
    "LAS": np.array([[-2.0, 0, 0, 30], [0, 2, 0, -12], [0, 0, 2, 0], [0, 0, 0, 1]]),
    "PSR, permuted": np.array([[0, 0, 2.0, 4], [-2, 0, 0, 20], [0, 2, 0, 7], [0, 0, 0, 1]]),
    "oblique": np.array([[1.92, -0.56, 0, -10], [0.56, 1.92, 0, 5], [0, 0, 2, 0], [0, 0, 0, 1]]),
}


def positions(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """World coordinates of the voxels, mm."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return grid @ affine[:3, :3].T + affine[:3, 3]


def field(points: np.ndarray, wavelength: float = 90.0) -> np.ndarray:
    """Tensors (mm^2/s, world axes) whose first axis turns as one goes along x and z."""
    angle, tilt = 2 * np.pi * points[..., 0] / wavelength, 2 * np.pi * points[..., 2] / wavelength
    axis = np.stack([np.cos(angle) * np.cos(tilt), np.sin(angle) * np.cos(tilt), np.sin(tilt)], -1)
    return 0.4e-3 * np.eye(3) + 1.2e-3 * axis[..., :, None] * axis[..., None, :]


def directions(n: int = 12) -> np.ndarray:
    """Unit vectors in the world."""
    vectors = np.random.default_rng(5).normal(size=(n, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def fsl_bvecs(world: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Directions as FSL writes them: by the voxel axes, the first reversed on a right-handed grid."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    voxel = np.linalg.solve(axes, world.T).T
    if np.linalg.det(axes) > 0:
        voxel[:, 0] *= -1
    return voxel


def write_series(
    folder: Path,
    shape: tuple[int, int, int] = (12, 14, 12),
    affine: np.ndarray = GRIDS["LAS"],
    names: tuple[str, str, str, str] = ("data.nii.gz", "bvals", "bvecs", "nodif_brain_mask.nii.gz"),
    b: float = 1000.0,
    margin: int = 1,
    noise: float = 0.0,
    seed: int = 0,
    bvals: Sequence[float] | None = None,
) -> Path:
    """Write a series, its bvals, bvecs and mask; the brain is what lies deeper than a margin.

    It has an image of b = 0 and twelve of ``b``, or those of ``bvals``, the first of which has a direction, too.
    """
    world = np.concatenate([np.zeros((1, 3)) if bvals is None else [[0, 0.6, 0.8]], directions()])
    weights = np.array([0, *[b] * 12] if bvals is None else bvals)
    tensors = field(positions(shape, affine))
    signals = 1000 * np.exp(-weights * np.einsum("ni,xyzij,nj->xyzn", world, tensors, world))
    signals += np.random.default_rng(seed).normal(0, noise, signals.shape) if noise else 0
    mask = np.zeros(shape, dtype=np.uint8)
    mask[tuple(slice(margin, n - margin) for n in shape)] = 1
    folder.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(signals.astype(np.float32), affine), folder / names[0])
    np.savetxt(folder / names[1], weights[None], fmt="%g")
    np.savetxt(folder / names[2], fsl_bvecs(world, affine).T)
    nib.save(nib.Nifti1Image(mask, affine), folder / names[3])
    return folder / names[0]


def write_hcp(folder: Path, n_subjects: int = 3, **arguments) -> Path:
    """Write subjects in HCP's layout."""
    for number in range(n_subjects):
        write_series(folder / f"10030{number}" / "T1w" / "Diffusion", seed=number, noise=1.0, **arguments)
    return folder


class Enlarge(torch.nn.Module):
    """Stands in for a trained network without padding: repeats the voxels that it keeps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = x[..., 2:-2, 2:-2, 2:-2]
        for axis in (2, 3, 4):
            inner = inner.repeat_interleave(2, axis)
        return inner
