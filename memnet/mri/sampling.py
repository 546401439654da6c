"""Which samples of k-space an accelerated scan takes: variable-density Poisson discs, and golden-ratio lines over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from monai.apps.reconstruction.transforms.array import KspaceMask

__all__ = ["GoldenRatioMask", "PoissonDiscMask", "golden_ratio_lines", "poisson_disc"]

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_FALLOFF = 2.0  # how much farther apart samples lie at the edge of k-space than at its centre, less 1


def poisson_disc(
    shape: Sequence[int],
    acceleration: float,
    calibration: int = 20,
    random: np.random.RandomState | None = None,
) -> np.ndarray:
    """Draw a variable-density Poisson-disc mask of the two phase-encoding directions.

    Samples are thrown in random order into the ellipse that fits k-space; one is kept if no kept one has it within its
    radius, which grows threefold from the centre to the edge. A centred square is taken whole, for calibration. The number
    of samples is met exactly.

    Args:
        shape: ``(y, z)``.
        acceleration: samples of the grid for one that is taken.
        calibration: side of the calibration square, samples.
        random: where the randomness comes from.

    Returns:
        Bool ``(y, z)``.

    Raises:
        ValueError: the acceleration is below what an ellipse allows or leaves nothing beside the calibration.

    References:
        Fast Poisson disk sampling in arbitrary dimensions (Bridson, 2007), https://doi.org/10.1145/1278780.1278807
    """
    random = np.random.RandomState() if random is None else random
    grid = (int(shape[0]), int(shape[1]))
    n_samples = round(grid[0] * grid[1] / acceleration)
    distance = _distance(grid)
    centre = _centred_square(grid, calibration)
    most, least = int(((distance <= 1) | centre).sum()), int(centre.sum())
    if not least < n_samples <= most:
        raise ValueError(
            f"acceleration {acceleration:g} of {grid[0]} x {grid[1]} samples is {n_samples}; expected more than the "
            f"{least} of the calibration square and at most the {most} of the ellipse"
        )
    mask = _throw(distance, _scale(grid, acceleration, calibration), random) | centre
    # what the scale, found for another draw, gives too much or too little
    surplus = int(mask.sum()) - n_samples
    choice = np.flatnonzero(mask & ~centre if surplus > 0 else ~mask & (distance <= 1))
    mask.flat[random.permutation(choice)[: abs(surplus)]] = surplus < 0
    return mask


def golden_ratio_lines(
    n_frames: int,
    n_lines: int,
    acceleration: float,
    calibration: int = 4,
    random: np.random.RandomState | None = None,
) -> np.ndarray:
    """Draw a k-t mask: in every frame the same number of lines, moved on from frame to frame by the golden ratio.

    The lines of a frame lie evenly in the cumulated density of sampling, which falls threefold from the centre of k-space to
    its edge. They move by the golden ratio of the interval between two, so that all frames together cover it.

    Args:
        n_frames: frames.
        n_lines: lines of phase encoding.
        acceleration: lines of a frame for one that is taken.
        calibration: central lines that every frame takes.
        random: where the first frame's offset comes from.

    Returns:
        Bool ``(n_frames, n_lines)``.

    Raises:
        ValueError: the acceleration is below 1 or leaves nothing beside the calibration.

    References:
        An optimal radial profile order based on the golden ratio for time-resolved MRI (Winkelmann et al., 2007),
        https://doi.org/10.1109/TMI.2006.885337
    """
    random = np.random.RandomState() if random is None else random
    n_taken = round(n_lines / acceleration)
    if not calibration < n_taken <= n_lines:
        raise ValueError(
            f"acceleration {acceleration:g} of {n_lines} lines is {n_taken}; expected more than the {calibration} lines of "
            "the calibration and no more than there are"
        )
    centre = np.zeros(n_lines, dtype=bool)
    start = n_lines // 2 - calibration // 2
    centre[start : start + calibration] = True
    others = np.flatnonzero(~centre)
    density = 1 / (1 + _FALLOFF * np.abs(others - n_lines // 2) / (n_lines / 2))
    cumulated = np.cumsum(density) / density.sum()
    mask = np.tile(centre, (n_frames, 1))
    n_drawn = n_taken - calibration
    offset = random.uniform()
    for frame in range(n_frames):
        places = (np.arange(n_drawn) + (offset + frame * _GOLDEN_RATIO) % 1) / n_drawn
        for line in np.searchsorted(cumulated, places):
            free = np.flatnonzero(~mask[frame, others])
            mask[frame, others[free[np.abs(free - line).argmin()]]] = True
    return mask


class _DrawnMask(KspaceMask):
    """MONAI mask that is drawn anew for each k-space.

    Args:
        accelerations: one or several to draw from.
        calibration: lines or side of the square at the centre that are taken whole.
    """

    def __init__(self, accelerations: Sequence[float], calibration: int) -> None:
        super().__init__([0.0] * len(accelerations), accelerations, spatial_dims=3, is_complex=False)
        self.calibration = calibration

    def draw(self, shape: Sequence[int], acceleration: float) -> torch.Tensor:
        """Draw a mask bool for k-space of a shape, with singleton dimensions where all share it."""
        raise NotImplementedError

    def __call__(self, kspace: torch.Tensor) -> Sequence[torch.Tensor]:
        """Draw a mask for k-space complex, and apply it.

        Returns:
            The k-space that is left, and the mask.
        """
        _, acceleration = self.randomize_choose_acceleration()
        mask = self.draw(kspace.shape, float(acceleration)).to(kspace.device)
        return kspace * mask, mask


class PoissonDiscMask(_DrawnMask):
    """MONAI mask of :func:`poisson_disc`, the same for all slices.

    Args:
        accelerations: one or several to draw from.
        calibration: see :func:`poisson_disc`.
    """

    def __init__(self, accelerations: Sequence[float] = (8.0,), calibration: int = 20) -> None:
        super().__init__(accelerations, calibration)

    def draw(self, shape: Sequence[int], acceleration: float) -> torch.Tensor:
        """Draw a mask bool ``(1, 1, y, z)`` for k-space complex ``(coils, slices, y, z)``."""
        return torch.from_numpy(poisson_disc(tuple(shape[-2:]), acceleration, self.calibration, self.R))[None, None]


class GoldenRatioMask(_DrawnMask):
    """MONAI mask of :func:`golden_ratio_lines`.

    Args:
        accelerations: one or several to draw from.
        calibration: see :func:`golden_ratio_lines`.
    """

    def __init__(self, accelerations: Sequence[float] = (8.0,), calibration: int = 4) -> None:
        super().__init__(accelerations, calibration)

    def draw(self, shape: Sequence[int], acceleration: float) -> torch.Tensor:
        """Draw a mask bool ``(1, frames, 1, y)`` for k-space complex ``(coils, frames, x, y)``."""
        lines = golden_ratio_lines(shape[1], shape[3], acceleration, self.calibration, self.R)
        return torch.from_numpy(lines)[None, :, None]


def _distance(grid: tuple[int, int]) -> np.ndarray:
    """Return how far each sample lies from the centre, 1 on the ellipse that fits the grid."""
    y, z = ((np.arange(n) - n // 2) / (n / 2) for n in grid)
    return np.hypot(y[:, None], z[None])


def _centred_square(grid: tuple[int, int], side: int) -> np.ndarray:
    inside = [np.abs(np.arange(n) - n // 2 + (0.5 if side % 2 == 0 else 0)) <= side / 2 - 0.25 for n in grid]
    return inside[0][:, None] & inside[1][None]


@lru_cache(maxsize=64)
def _scale(grid: tuple[int, int], acceleration: float, calibration: int) -> float:
    """Find the radius at the centre with which one draw comes to the wanted number of samples."""
    distance, centre = _distance(grid), _centred_square(grid, calibration)
    scale = math.sqrt(acceleration) / 2
    for _ in range(6):
        mask = _throw(distance, scale, np.random.RandomState(0)) | centre
        scale *= ((mask.sum() - centre.sum()) * acceleration / (mask.size - centre.sum() * acceleration)) ** 0.5
    return scale


def _throw(distance: np.ndarray, scale: float, random: np.random.RandomState) -> np.ndarray:
    """Throw samples at all places within the ellipse, in random order, and keep those that no kept one's disc covers."""
    radius = scale * (1 + _FALLOFF * distance)
    margin = math.ceil(radius.max()) + 1
    width = distance.shape[1] + 2 * margin
    covered = np.zeros((distance.shape[0] + 2 * margin, width), dtype=bool)
    at = memoryview(covered.reshape(-1))  # type: ignore[arg-type]
    kept = np.zeros_like(covered)
    discs: dict[int, tuple[int, np.ndarray]] = {}
    places = random.permutation(np.argwhere(distance <= 1))
    # radii in eighths, so that few discs are made
    eighths = np.rint(8 * radius[places[:, 0], places[:, 1]]).astype(int).tolist()
    for (y, z), size in zip((places + margin).tolist(), eighths, strict=True):
        if at[y * width + z]:
            continue
        kept[y, z] = True
        if size not in discs:
            reach = size // 8
            offsets = np.arange(-reach, reach + 1)
            discs[size] = reach, np.hypot(offsets[:, None], offsets[None]) < max(size, 1) / 8
        reach, disc = discs[size]
        covered[y - reach : y + reach + 1, z - reach : z + reach + 1] |= disc
    return kept[margin:-margin, margin:-margin].copy()
