"""Makes deformed copies of one diffusion series, as if of other subjects: ``python -m memnet diffusion-copies``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from memnet.datasets.diffusion_files import read_series, write_series
from memnet.diffusion.tensors import (
    DiffusionSeries,
    as_channels,
    as_matrices,
    complete_edge,
    fit_tensors,
    predict_signals,
)

__all__ = ["add_parser", "deform"]

_SPACING = 30.0  # mm between the control points of a displacement
_LEAST_VOLUME = 0.3  # of a voxel's volume that a deformation leaves at least; displacements are halved until it does


def deform(
    series: DiffusionSeries, seed: int, rotation: float = 15.0, displacement: float = 3.0, noise: bool = True
) -> DiffusionSeries:
    r"""Turn and warp a series at random; its tensors turn with it.

    The copy shows at :math:`x` what the series has at :math:`\varphi(x) = c + R (x - c) + u(x)`: a rotation about the brain's
    centre and a smooth displacement. Tensors are turned by the rotation nearest to the derivative of :math:`\varphi` (finite
    strain), and give the copy's signals; the directions stay those of the series. Noise is Rician, with the standard deviation
    of what the series' own tensors leave unexplained.

    Args:
        series: see :meth:`memnet.diffusion.tensors.DiffusionSeries.select`.
        seed: seed of rotation, displacement and noise.
        rotation: largest angle about each axis, degrees.
        displacement: standard deviation of the displacement's components at its control points, mm.
        noise: add noise.

    Returns:
        A series on the same grid.

    References:
        Spatial transformations of diffusion tensor magnetic resonance images (Alexander et al., 2001),
        https://doi.org/10.1109/42.963816
    """
    random = np.random.default_rng(seed)
    place, derivative = _map(series, random, rotation, displacement)
    tensors = fit_tensors(series)
    predicted = predict_signals(tensors, series, _unweighted(series))
    residual = (series.signals - predicted)[series.mask]
    content = np.concatenate([np.moveaxis(tensors, -1, 0), _unweighted(series)[None]])
    content = complete_edge(content, series.mask)
    moved = np.stack([ndimage.map_coordinates(c, place, order=1, mode="nearest") for c in content], -1)
    mask = ndimage.map_coordinates(series.mask.astype(np.float32), place, order=1) >= 0.5
    turned = np.zeros_like(moved[..., :6])
    left, _, right = np.linalg.svd(derivative[mask])
    back = np.swapaxes(left @ right, -1, -2)
    turned[mask] = as_channels(back @ as_matrices(moved[..., :6][mask]) @ np.swapaxes(back, -1, -2))
    signals = predict_signals(turned, series, moved[..., 6])
    if noise:
        sigma = residual.std()
        real, imaginary = (random.normal(0, sigma, signals.shape).astype(np.float32) for _ in range(2))
        signals = np.hypot(signals + real, imaginary)
    return replace(series, signals=(signals * mask[..., None]).astype(np.float32), mask=mask)


def _map(
    series: DiffusionSeries, random: np.random.Generator, rotation: float, displacement: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return where each voxel's content comes from, ``(3, D, H, W)`` voxels, and the map's derivative in world axes."""
    shape, axes = series.mask.shape, series.affine[:3, :3]
    turn = Rotation.from_euler("xyz", random.uniform(-rotation, rotation, 3), degrees=True).as_matrix()
    extent = np.array(shape) * np.linalg.norm(axes, axis=0)
    points = random.normal(0, displacement, (3, *(np.ceil(extent / _SPACING).astype(int) + 1)))
    warp = np.stack([_refine(p, shape) for p in points])  # mm, world axes
    slope = np.stack([np.stack(np.gradient(w), -1) for w in warp], -2) @ np.linalg.inv(axes)
    while np.linalg.det(np.eye(3) + slope)[series.mask].min() < _LEAST_VOLUME:
        warp, slope = warp / 2, slope / 2
    positions = np.moveaxis(np.indices(shape).astype(np.float64), 0, -1) @ axes.T
    centre = positions[series.mask].mean(0)
    target = centre + (positions - centre) @ turn.T + np.moveaxis(warp, 0, -1)
    return np.moveaxis(target @ np.linalg.inv(axes).T, -1, 0), turn + slope


def _refine(points: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    lines = [np.linspace(0, n - 1, size) for n, size in zip(points.shape, shape, strict=True)]
    return ndimage.map_coordinates(points, np.meshgrid(*lines, indexing="ij"), order=3, mode="nearest")


def _unweighted(series: DiffusionSeries) -> np.ndarray:
    return series.signals[..., series.unweighted].mean(-1)


def add_parser(commands: Any) -> None:
    """Add the command ``diffusion-copies`` to the command line."""
    parser = commands.add_parser(
        "diffusion-copies",
        help="make turned and warped copies of a diffusion series, for want of several subjects",
        description="Signals of the copies come from the series' turned and warped tensors. They serve experiments, and are "
        "no substitute for subjects.",
    )
    parser.add_argument("data", help="4D NIfTI with its b-values and directions beside it")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--shells", type=float, nargs="+", help="b-values to keep, s/mm^2; all up to 1500 by default")
    parser.add_argument("--rotation", type=float, default=15.0, help="largest angle about each axis, degrees")
    parser.add_argument("--displacement", type=float, default=3.0, help="standard deviation at control points, mm")
    parser.add_argument("--seed", type=int, default=0, help="of the first copy; each further one has the next")
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
    a = arguments
    series = read_series(a.data).select(a.shells)
    for number in tqdm(range(a.copies), "copies", ncols=100):
        copy = deform(series, a.seed + number, a.rotation, a.displacement)
        write_series(Path(a.output_dir) / f"copy{number:03d}.nii.gz", copy)
