"""Makes deformed copies of one diffusion series, as if of other subjects: ``python -m memnet diffusion-copies``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from memnet.datasets.diffusion_files import read_series, write_series
from memnet.diffusion.tensors import (
    DiffusionSeries,
    as_channels,
    as_matrices,
    block_mean,
    coarse_affine,
    complete_edge,
    fit_tensors,
    predict_signals,
)

__all__ = ["add_parser", "deform"]

_SPACING = 30.0  # mm between the control points of a displacement
_SURROUNDINGS = 10.0  # mm beyond the brain that a copy shows, since the means of blocks at its edge see them
_LEAST_VOLUME = 0.3  # of a voxel's volume that a deformation leaves at least; displacements are halved until it does

_RANGES = (
    ("noise", [1.0, 1.0], "noise of a copy, in that of the series"),
    ("voxel_size", None, "side of a copy's voxels, mm, not below the series'; the series' grid by default"),
    ("margin", [0.0, 0.0], "how far a copy's brain goes beyond the series', mm; below 0 it ends within"),
)  # each copy draws its own from between two numbers


def deform(
    series: DiffusionSeries,
    seed: int,
    rotation: float = 15.0,
    displacement: float = 3.0,
    noise: float = 1.0,
    voxel_size: float | None = None,
    margin: float = 0.0,
) -> DiffusionSeries:
    r"""Turn and warp a series at random; its tensors turn with it.

    The copy shows at :math:`x` what the series has at :math:`\varphi(x) = c + R (x - c) + u(x)`: a rotation about the brain's
    centre and a smooth displacement. Tensors are turned by the rotation nearest to the derivative of :math:`\varphi` (finite
    strain), and give the copy's signals; the directions stay those of the series. Voxels larger than the series' show the mean
    of the signals in them. Noise is Rician, with the standard deviation of what the series' own tensors leave unexplained.

    Args:
        series: see :meth:`memnet.diffusion.tensors.DiffusionSeries.select`.
        seed: seed of rotation, displacement and noise.
        rotation: largest angle about each axis, degrees.
        displacement: standard deviation of the displacement's components at its control points, mm.
        noise: standard deviation of the noise, in that of the series; 0 adds none.
        voxel_size: side of the copy's voxels, mm; those of the series where None.
        margin: how far the copy's brain goes beyond the series', mm; below 0 it ends within.

    Returns:
        A series that fills the same box.

    Raises:
        ValueError: the voxels would be smaller than the series', too large for its box, or no brain would be left.

    References:
        Spatial transformations of diffusion tensor magnetic resonance images (Alexander et al., 2001),
        https://doi.org/10.1109/42.963816
    """
    random = np.random.default_rng(seed)
    series, around = _with_margin(series, margin)
    rate, shape, affine = _samples(series, voxel_size)
    place, derivative = _map(series, shape, affine, random, rotation, displacement)
    tensors = fit_tensors(around)
    predicted = predict_signals(tensors, series, _unweighted(series))
    residual = (series.signals - predicted)[series.mask]
    content = np.concatenate([np.moveaxis(tensors, -1, 0), _unweighted(series)[None]])
    content = complete_edge(content, around.mask)
    # cubic, since linear interpolation would smooth what a network is to sharpen
    moved = np.stack([ndimage.map_coordinates(c, place, order=3, mode="nearest") for c in content], -1)
    moved[..., 6] = np.clip(moved[..., 6], content[6].min(), content[6].max())
    brain, head = (
        block_mean(ndimage.map_coordinates(mask.astype(np.float32), place, order=1), rate) >= 0.5
        for mask in (series.mask, around.mask)
    )
    left, _, right = np.linalg.svd(derivative)
    back = np.swapaxes(left @ right, -1, -2)
    turned = as_channels(back @ as_matrices(moved[..., :6]) @ np.swapaxes(back, -1, -2))
    slabs = [slice(start, start + rate) for start in range(0, shape[0], rate)]
    signals = np.concatenate(
        [block_mean(predict_signals(turned[slab], series, moved[slab][..., 6]), rate) for slab in slabs]
    )
    if noise:
        sigma = noise * residual.std()
        real, imaginary = (random.normal(0, sigma, signals.shape).astype(np.float32) for _ in range(2))
        signals = np.hypot(signals + real, imaginary)
    signals = (signals * head[..., None]).astype(np.float32)
    return replace(series, signals=signals, mask=brain, affine=coarse_affine(affine, rate))


def _with_margin(series: DiffusionSeries, margin: float) -> tuple[DiffusionSeries, DiffusionSeries]:
    """Let the brain go on beyond its edge, as far as there are signals, or end before it; and add what surrounds it."""
    sampling = voxel_sizes(series.affine)
    outside, inside = (ndimage.distance_transform_edt(m, sampling=sampling) for m in (~series.mask, series.mask))
    visible = series.mask | (_unweighted(series) > 0)
    brain = (outside <= margin if margin >= 0 else inside > -margin) & visible
    return replace(series, mask=brain), replace(series, mask=brain | (visible & (outside <= margin + _SURROUNDINGS)))


def _samples(series: DiffusionSeries, voxel_size: float | None) -> tuple[int, tuple[int, ...], np.ndarray]:
    """Return how many samples a side a voxel of the copy has, and the samples' grid, which fills the series' box."""
    sizes = voxel_sizes(series.affine)
    if voxel_size is None:
        return 1, series.mask.shape, series.affine
    if voxel_size < sizes.max() * (1 - 1e-3):
        raise ValueError(
            f"{series.name}: has voxels of {sizes.round(3)} mm, of which none of {voxel_size:g} mm can be made"
        )
    rate = int(np.ceil(voxel_size / sizes.min() - 1e-3))
    counts = [int(n * size / voxel_size + 1e-3) for n, size in zip(series.mask.shape, sizes, strict=True)]
    if min(counts) < 2:
        raise ValueError(f"{series.name}: {series.mask.shape} voxels leave {counts} of {voxel_size:g} mm")
    scaling = np.diag([*(voxel_size / rate / sizes), 1.0])
    scaling[:3, 3] = (voxel_size / rate / sizes - 1) / 2
    return rate, tuple(rate * n for n in counts), series.affine @ scaling


def _map(
    series: DiffusionSeries,
    shape: tuple[int, ...],
    affine: np.ndarray,
    random: np.random.Generator,
    rotation: float,
    displacement: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return where the content of a grid comes from, ``(3, D, H, W)`` voxels, and the map's derivative in world axes."""
    turn = Rotation.from_euler("xyz", random.uniform(-rotation, rotation, 3), degrees=True).as_matrix()
    extent = np.array(shape) * voxel_sizes(affine)
    points = random.normal(0, displacement, (3, *(np.ceil(extent / _SPACING).astype(int) + 1)))
    warp = np.stack([_refine(p, shape) for p in points])  # mm, world axes
    slope = np.stack([np.stack(np.gradient(w), -1) for w in warp], -2) @ np.linalg.inv(affine[:3, :3])
    while np.linalg.det(np.eye(3) + slope).min() < _LEAST_VOLUME:
        warp, slope = warp / 2, slope / 2
    centre = apply_affine(series.affine, np.argwhere(series.mask)).mean(0)
    positions = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    target = centre + (positions - centre) @ turn.T + np.moveaxis(warp, 0, -1)
    return np.moveaxis(apply_affine(np.linalg.inv(series.affine), target), -1, 0), turn + slope


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
    for name, default, help_text in _RANGES:
        parser.add_argument(
            f"--{name}", type=float, nargs=2, default=default, metavar=("LEAST", "LARGEST"), help=help_text
        )
    parser.add_argument("--seed", type=int, default=0, help="of the first copy; each further one has the next")
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
    a = arguments
    for name, *_ in _RANGES:
        least, largest = getattr(a, name) or (1.0, 1.0)
        if least > largest or (name == "noise" and least < 0):
            raise ValueError(
                f"--{name} is {least:g} {largest:g}, expected the least before the largest, noise not below 0"
            )
    series = read_series(a.data).select(a.shells)
    for number in tqdm(range(a.copies), "copies", ncols=100):
        random = np.random.default_rng((a.seed + number, 1))  # apart from what deform draws
        ranges = {name: getattr(a, name) for name, *_ in _RANGES}
        drawn = {name: float(random.uniform(*bounds)) for name, bounds in ranges.items() if bounds is not None}
        copy = deform(series, a.seed + number, a.rotation, a.displacement, **drawn)
        write_series(Path(a.output_dir) / f"copy{number:03d}.nii.gz", copy)
