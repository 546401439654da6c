"""Diffusion tensors: their order and axes in files, their fit to diffusion-weighted images, and maps of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage
from scipy.linalg import polar

__all__ = [
    "SYMMETRIC",
    "TENSOR_ORDERS",
    "DiffusionSeries",
    "as_matrices",
    "as_channels",
    "block_mean",
    "coarse_affine",
    "colour_fractional_anisotropy",
    "complete_edge",
    "fine_affine",
    "fit_tensors",
    "fractional_anisotropy",
    "has_tensor",
    "is_unweighted",
    "mean_diffusivity",
    "predict_signals",
    "rotate_tensors",
    "rotation_of",
    "world_directions",
]

logger = logging.getLogger("memnet")

SYMMETRIC = ((0, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2))
"""NIfTI's order of a symmetric matrix (intent 1005): the lower triangle row by row, xx, xy, yy, xz, yz, zz."""

TENSOR_ORDERS = {
    "nifti": ("xx", "xy", "yy", "xz", "yz", "zz"),
    "fsl": ("xx", "xy", "xz", "yy", "yz", "zz"),
    "mrtrix": ("xx", "yy", "zz", "xy", "xz", "yz"),
}
"""The orders in which programs write the six entries of a tensor."""

_ROWS, _COLUMNS = (np.array(indices) for indices in zip(*SYMMETRIC, strict=True))
_B0_LIMITS = (50.0, 100.0)  # s/mm^2: scanners write the true b of b = 0, 5 to 15, HCP at 7 T up to 70
_MOST_WEIGHTED = 1e5  # s/mm^2, more than any scanner's gradients reach
_UNIT_TOLERANCE = 0.05
_VOXELS_AT_ONCE = 20_000
_LEAST_DIFFUSIVITY = 1e-6  # mm^2/s


def as_matrices(tensors: np.ndarray) -> np.ndarray:
    """Turn tensors ``(..., 6)`` in NIfTI's order into symmetric matrices ``(..., 3, 3)``."""
    matrices = np.empty((*tensors.shape[:-1], 3, 3), dtype=tensors.dtype)
    matrices[..., _ROWS, _COLUMNS] = tensors
    matrices[..., _COLUMNS, _ROWS] = tensors
    return matrices


def as_channels(matrices: np.ndarray) -> np.ndarray:
    """Turn symmetric matrices ``(..., 3, 3)`` into tensors ``(..., 6)`` in NIfTI's order."""
    return matrices[..., _ROWS, _COLUMNS]


def has_tensor(tensors: np.ndarray) -> np.ndarray:
    """Tell where ``(..., 6)`` entries, mm^2/s, are a tensor; a background stored as scaled integers is not quite 0."""
    return (np.abs(tensors) > _LEAST_DIFFUSIVITY).any(-1)


def rotation_of(affine: np.ndarray) -> np.ndarray:
    """Return the orthogonal matrix nearest to an affine's axes, ``(3, 3)``; a left-handed grid's is a reflection.

    Args:
        affine: voxels to world (mm, RAS+), ``(4, 4)``.
    """
    matrix = np.asarray(affine, dtype=np.float64)[:3, :3]
    return polar(matrix / np.linalg.norm(matrix, axis=0))[0]


def rotate_tensors(tensors: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    r"""Turn tensors into other axes, :math:`Q D Q^\top`.

    Args:
        tensors: ``(..., 6)`` in NIfTI's order.
        rotation: orthogonal ``(3, 3)``, or one a tensor ``(..., 3, 3)``.

    Returns:
        As ``tensors``.
    """
    rotated = rotation @ as_matrices(tensors) @ np.swapaxes(rotation, -1, -2)
    return as_channels(rotated).astype(tensors.dtype)


def world_directions(bvecs: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Turn gradient directions of an FSL file into world axes (RAS+).

    FSL's directions refer to the voxel axes, of which the first is reversed where the grid is right-handed (the affine's
    determinant is positive).

    Args:
        bvecs: ``(n, 3)``.
        affine: voxels to world (mm, RAS+), ``(4, 4)``.

    References:
        https://fsl.fmrib.ox.ac.uk/fsl/docs/#/diffusion/index?id=what-conventions-do-the-bvecs-use
    """
    axes = np.asarray(bvecs, dtype=np.float64) * [-1 if np.linalg.det(affine[:3, :3]) > 0 else 1, 1, 1]
    return axes @ rotation_of(affine).T


def is_unweighted(bvals: np.ndarray) -> np.ndarray:
    """Tell which of ``(n,)`` b-values are meant to be 0: those up to 50 s/mm^2, or up to 100 where there is none."""
    low, high = (bvals <= limit for limit in _B0_LIMITS)
    return low if low.any() else high


@dataclass(frozen=True)
class DiffusionSeries:
    """Diffusion-weighted images of one subject.

    Attributes:
        signals: ``(D, H, W, n)``, any unit.
        bvals: ``(n,)``, s/mm^2.
        bvecs: ``(n, 3)``, FSL's directions; unit vectors where b is not 0.
        affine: voxels to world (mm, RAS+), ``(4, 4)``.
        mask: ``(D, H, W)`` boolean, the brain.
        name: what errors call the series.

    Raises:
        ValueError: the parts do not belong together, or there is no image of b = 0.
    """

    signals: np.ndarray
    bvals: np.ndarray
    bvecs: np.ndarray
    affine: np.ndarray
    mask: np.ndarray
    name: str = "the diffusion series"

    def __post_init__(self) -> None:
        n = self.signals.shape[-1]
        if self.signals.ndim != 4:
            raise ValueError(f"{self.name}: has shape {self.signals.shape}, expected a 4D series of images")
        if self.bvals.shape != (n,) or self.bvecs.shape != (n, 3):
            raise ValueError(
                f"{self.name}: {n} images, but {self.bvals.size} b-values and {self.bvecs.size / 3:g} directions; each image "
                "needs one of both"
            )
        if self.mask.shape != self.signals.shape[:3]:
            raise ValueError(f"{self.name}: its mask has {self.mask.shape} voxels, the images {self.signals.shape[:3]}")
        if not self.mask.any():
            raise ValueError(f"{self.name}: its mask is empty")
        if not np.isfinite(self.bvals).all() or self.bvals.min() < 0:
            raise ValueError(f"{self.name}: a b-value is negative or not finite")
        largest = float(self.bvals.max())
        if 0 < largest < _B0_LIMITS[0] or largest > _MOST_WEIGHTED:
            unit = "ms/um^2" if largest < _B0_LIMITS[0] else "s/m^2"
            raise ValueError(f"{self.name}: its b-values go up to {largest:g}; are they in {unit}? s/mm^2 are expected")
        weighted = ~self.unweighted
        if weighted.all():
            raise ValueError(f"{self.name}: no image of b = 0 (below {_B0_LIMITS[1]:g} s/mm^2); the fit needs one")
        lengths = np.linalg.norm(self.bvecs[weighted], axis=1)
        wrong = ~(np.abs(lengths - 1) <= _UNIT_TOLERANCE)  # NaN, too
        if wrong.any():
            raise ValueError(
                f"{self.name}: {int(wrong.sum())} of {wrong.size} directions are no unit vectors (lengths "
                f"{lengths.min():.3g} to {lengths.max():.3g}); are the bvecs those of this series?"
            )

    @property
    def unweighted(self) -> np.ndarray:
        """The images of b = 0, ``(n,)`` boolean."""
        return is_unweighted(self.bvals)

    def select(self, shells: Sequence[float] | None = None, tolerance: float = 100.0) -> DiffusionSeries:
        """Keep the images of b = 0 and those of some shells.

        Args:
            shells: b-values, s/mm^2; all up to 1500, beyond which signals do not follow a tensor, where None.
            tolerance: how far an image's b-value may lie from its shell's, s/mm^2.

        Raises:
            ValueError: a shell is missing, or six directions are not there.
        """
        b0 = self.unweighted
        if shells is None:
            kept = ~b0 & (self.bvals <= 1500)
        else:
            found = [np.abs(self.bvals - shell) <= tolerance for shell in shells]
            there = ", ".join(f"{b:g}" for b in np.unique(np.round(self.bvals, -2)))
            for shell, images in zip(shells, found, strict=True):
                if not (images & ~b0).any():
                    raise ValueError(
                        f"{self.name}: no image of b = {shell:g} s/mm^2; there are b = {there} (--shells names those to take)"
                    )
            kept = ~b0 & np.any(found, axis=0)
        directions = self.bvecs[kept]
        if np.linalg.matrix_rank(directions[:, _ROWS] * directions[:, _COLUMNS], tol=1e-3) < 6:
            raise ValueError(
                f"{self.name}: {int(kept.sum())} directions in the chosen shells do not determine a tensor; it needs 6 that "
                "differ"
            )
        kept |= b0
        return replace(self, signals=self.signals[..., kept], bvals=self.bvals[kept], bvecs=self.bvecs[kept])

    def cropped(self, rate: int = 2) -> DiffusionSeries:
        """Drop what no whole block of ``rate`` voxels a side is left for at the ends of the axes.

        Raises:
            ValueError: no block is left.
        """
        box = tuple(slice(0, n - n % rate) for n in self.mask.shape)
        if not self.mask[box].any():
            raise ValueError(f"{self.name}: {self.mask.shape} voxels are too few for blocks of {rate} a side")
        return replace(self, signals=self.signals[box], mask=self.mask[box])

    def coarse(self, rate: int = 2) -> DiffusionSeries:
        """Lower the resolution by the mean of blocks of ``rate`` voxels a side; a block of half brain is brain."""
        return replace(
            self,
            signals=block_mean(self.signals, rate),
            mask=block_mean(self.mask.astype(np.float32), rate) >= 0.5,
            affine=coarse_affine(self.affine, rate),
        )

    def fine(self, rate: int = 2) -> DiffusionSeries:
        """Raise the resolution by cubic interpolation of the signals, those of the brain going on beyond its edge.

        What is interpolated stays between the least and the largest signal of the neighbouring coarse voxels: splines
        overshoot, and no tensor follows a signal of 0 or less.
        """
        completed = complete_edge(np.moveaxis(self.signals, -1, 0), self.mask)
        volumes = []
        for volume in completed:
            bounds = [f(volume, 3, mode="nearest") for f in (ndimage.minimum_filter, ndimage.maximum_filter)]
            least, largest = (x.repeat(rate, 0).repeat(rate, 1).repeat(rate, 2) for x in bounds)
            refined = ndimage.zoom(volume, rate, order=3, mode="nearest", grid_mode=True)
            volumes.append(np.clip(refined, least, largest))
        mask = self.mask.repeat(rate, 0).repeat(rate, 1).repeat(rate, 2)
        return replace(self, signals=np.stack(volumes, -1), mask=mask, affine=fine_affine(self.affine, rate))


def block_mean(volume: np.ndarray, rate: int) -> np.ndarray:
    """Average blocks of ``rate`` voxels a side over the first three axes; what is left over at the ends is dropped.

    Raises:
        ValueError: the volume has not a single block.
    """
    sizes = [n // rate for n in volume.shape[:3]]
    if min(sizes) < 1:
        raise ValueError(f"a volume of {volume.shape[:3]} voxels has no block of {rate} voxels a side")
    cropped = volume[tuple(slice(0, n * rate) for n in sizes)].astype(np.float32)
    blocks = cropped.reshape(sizes[0], rate, sizes[1], rate, sizes[2], rate, *volume.shape[3:])
    return blocks.mean(axis=(1, 3, 5))


def complete_edge(values: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Give each voxel outside the brain the value of the nearest voxel of the brain.

    Args:
        values: ``(C, D, H, W)``.
        brain: ``(D, H, W)`` boolean, not empty.
    """
    nearest = ndimage.distance_transform_edt(~brain, return_distances=False, return_indices=True)
    return values[:, nearest[0], nearest[1], nearest[2]]


def coarse_affine(affine: np.ndarray, rate: int) -> np.ndarray:
    """Return the affine of blocks of ``rate`` voxels a side, whose centres lie between those of their voxels."""
    scaling = np.diag([rate, rate, rate, 1.0])
    scaling[:3, 3] = (rate - 1) / 2
    return np.asarray(affine, dtype=np.float64) @ scaling


def fine_affine(affine: np.ndarray, rate: int) -> np.ndarray:
    """Return the affine of a grid ``rate`` times as fine that fills the same voxels: :func:`coarse_affine` undone."""
    return np.asarray(affine, dtype=np.float64) @ np.linalg.inv(coarse_affine(np.eye(4), rate))


def fit_tensors(series: DiffusionSeries, progress: bool = False) -> np.ndarray:
    """Fit tensors by weighted least squares, through DIPY.

    Args:
        series: the images; see :meth:`DiffusionSeries.select`.
        progress: show a progress bar.

    Returns:
        ``(D, H, W, 6)`` float32 in NIfTI's order, mm^2/s, in world axes (RAS+); 0 outside the mask, and where no image of
        b = 0, or no weighted one, has a signal. Negative eigenvalues stay as they are.

    References:
        Comparison of bootstrap approaches for estimation of uncertainties of DTI parameters (Chung, Lu, Henry, 2006)
    """
    from dipy.core.gradients import gradient_table
    from dipy.reconst.dti import design_matrix, wls_fit_tensor
    from tqdm import tqdm

    bvals, directions = _weighting(series)
    table = gradient_table(bvals, bvecs=directions, b0_threshold=0)
    signals = series.signals[series.mask].astype(np.float64)
    positive = signals[signals > 0]
    if positive.size == 0 or not np.isfinite(signals).all():
        raise ValueError(f"{series.name}: its signals in the mask are all 0, or not finite")
    unweighted = series.unweighted
    seen = (signals[:, unweighted] > 0).any(1) & (signals[:, ~unweighted] > 0).any(1)
    signals = np.maximum(signals, positive.min())
    fitted = np.empty((len(signals), 6), dtype=np.float32)
    for start in tqdm(range(0, len(signals), _VOXELS_AT_ONCE), "fitting tensors", disable=not progress, ncols=100):
        part = slice(start, start + _VOXELS_AT_ONCE)
        # DIPY's lower triangle has NIfTI's order; its eigenvalues would be clamped, these are not.
        fitted[part] = wls_fit_tensor(design_matrix(table), signals[part], return_lower_triangular=True)[0][..., :6]
    tensors = np.zeros((*series.mask.shape, 6), dtype=np.float32)
    tensors[series.mask] = np.where(seen[:, None], fitted, 0)
    return tensors


def predict_signals(tensors: np.ndarray, series: DiffusionSeries, unweighted: np.ndarray) -> np.ndarray:
    r"""Return the images that tensors give under a series' b-values and directions, :math:`S_0 e^{-b g^\top D g}`.

    Args:
        tensors: ``(D, H, W, 6)`` in NIfTI's order and world axes, mm^2/s.
        series: whose b-values, directions and axes are taken.
        unweighted: :math:`S_0`, the image of b = 0, ``(D, H, W)``.

    Returns:
        ``(D, H, W, n)``, float32.
    """
    bvals, directions = _weighting(series)
    products = directions[:, _ROWS] * directions[:, _COLUMNS] * np.where(_ROWS == _COLUMNS, 1, 2)
    exponent = np.asarray(tensors, dtype=np.float32) @ (-bvals[:, None] * products).T.astype(np.float32)
    return np.exp(exponent, out=exponent) * np.asarray(unweighted, dtype=np.float32)[..., None]


def _weighting(series: DiffusionSeries) -> tuple[np.ndarray, np.ndarray]:
    """Return b-values and unit directions in world axes, both 0 for images of b = 0 without a direction, be it 0 or NaN."""
    lengths = np.linalg.norm(series.bvecs, axis=1)
    has_direction = np.abs(lengths - 1) <= _UNIT_TOLERANCE
    unit = np.divide(series.bvecs, lengths[:, None], out=np.zeros(series.bvecs.shape), where=has_direction[:, None])
    return np.where(has_direction, series.bvals, 0), world_directions(unit, series.affine)


def _eigenvalues(tensors: np.ndarray) -> np.ndarray:
    """Return the eigenvalues ``(..., 3)``, ascending, those below 0 clamped to it."""
    return np.maximum(np.linalg.eigvalsh(as_matrices(np.asarray(tensors, dtype=np.float64))), 0)


def mean_diffusivity(tensors: np.ndarray) -> np.ndarray:
    """Return the mean of the eigenvalues, in the tensors' unit; negative ones count as 0."""
    return _eigenvalues(tensors).mean(-1)


def fractional_anisotropy(tensors: np.ndarray) -> np.ndarray:
    """Return the fractional anisotropy, 0 to 1; negative eigenvalues count as 0, and a tensor of zeros has 0."""
    values = _eigenvalues(tensors)
    spread = np.square(values - values.mean(-1, keepdims=True)).sum(-1)
    size = np.square(values).sum(-1)
    return np.sqrt(1.5 * np.divide(spread, size, out=np.zeros_like(spread), where=size > 0))


def colour_fractional_anisotropy(tensors: np.ndarray) -> np.ndarray:
    """Return ``(..., 3)``: the magnitudes of the first eigenvector's x, y and z, times the fractional anisotropy."""
    vectors = np.linalg.eigh(as_matrices(np.asarray(tensors, dtype=np.float64)))[1]
    return np.abs(vectors[..., :, -1]) * fractional_anisotropy(tensors)[..., None]
