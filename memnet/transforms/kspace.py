"""Dictionary transforms from raw data to the network's input."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.apps.reconstruction.transforms.array import KspaceMask
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform, Transform

from memnet.metadata import plain_tensor, with_meta_of
from memnet.mri.coils import calibration_region, compress_coils, espirit_maps
from memnet.mri.operators import SenseOperator
from memnet.mri.sampling import PoissonDiscMask
from memnet.nets.packed import pack

__all__ = [
    "CombineCoilsd",
    "CompressCoilsd",
    "EstimateMapsd",
    "PackKspaced",
    "RandKspaceNoised",
    "RandSlabd",
    "RandUndersampled",
    "ScaleKspaced",
    "plain_tensor",
    "with_meta_of",
]

logger = logging.getLogger("memnet")

Data = Mapping[Hashable, Any]

# of a reference: an ellipse takes 0.785 of its rectangle, and scanners do not agree on where it ends
_LEAST_SAMPLED, _LEAST_FILLED, _LEAST_BALANCED = 0.7, 0.9, 0.9


class CompressCoilsd(MapTransform):
    """Combine coils into fewer virtual ones, those of ``calibration`` alike, see :func:`memnet.mri.coils.compress_coils`.

    Args:
        keys: k-space.
        n_coils: virtual coils.
    """

    def __init__(self, keys: KeysCollection = "kspace", n_coils: int = 8) -> None:
        super().__init__(keys)
        self.n_coils = n_coils

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Return the data with compressed k-space."""
        d = dict(data)
        for key in self.key_iterator(d):
            if "calibration" in d:
                d["calibration"] = compress_coils(d["calibration"], self.n_coils, plain_tensor(d[key]))
            d[key] = with_meta_of(compress_coils(plain_tensor(d[key]), self.n_coils), d[key])
        return d


class EstimateMapsd(Transform):
    """Estimate coil maps from the centre of ``kspace`` and add them as ``csm``, see :func:`memnet.mri.coils.espirit_maps`.

    A mask that changes with the frames is that of a movie: its frames are averaged, each sample over those that took it. Where
    the centre is sampled over no more than the kernel, maps come of the reference scan ``calibration``, which is left out of the
    result.

    Args:
        calibration: side of the region to use at most, samples; less where a gap comes before. With c coils of which each has
            patches of k x k, ``(calibration - k + 1)**2`` should not be far below ``c k**2``.
        kernel: see :func:`memnet.mri.coils.espirit_maps`.

    Raises:
        ValueError: the centre is not sampled over more than the kernel, or holds noise alone, or the mask is of another shape
            than k-space, naming the file.
    """

    def __init__(self, calibration: int = 24, kernel: int = 6) -> None:
        self.calibration, self.kernel = calibration, kernel

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Add ``csm`` complex64, ``(coils, slices, y, z)`` or ``(coils, 1, x, y)`` of a movie."""
        d = dict(data)
        kspace, mask = plain_tensor(d["kspace"]), _fitting(d, d["mask"])
        mask = mask.expand(1, mask.shape[1], *kspace.shape[2:])
        if mask.shape[1] > 1:
            count = mask.sum(1, keepdim=True)
            kspace, mask = kspace.sum(1, keepdim=True) / count.clamp_min(1), count > 0
        region, reference = calibration_region(mask[0, 0]), d.pop("calibration", None)
        if reference is not None and min(region) <= self.kernel:
            kspace, region = reference, calibration_region((reference != 0).any(0).any(0))
        region = (min(region[0], self.calibration), min(region[1], self.calibration))
        try:
            d["csm"] = espirit_maps(kspace, region, self.kernel)
        except ValueError as error:
            raise ValueError(f"{_file(d)}: {error}") from error
        if not bool(d["csm"].any()):
            raise ValueError(
                f"{_file(d)}: no coil maps come of the central {region[0]} x {region[1]} samples; are they more than noise?"
            )
        return d


class CombineCoilsd(Transform):
    """Add ``label``, the image of fully sampled k-space and its coil maps, to train on or to compare with.

    K-space that goes farther to one side than to the other, as partial Fourier's, makes a blurred reference; it is told once a
    file.

    Raises:
        ValueError: more is missing than the corners beyond an ellipse, naming the file.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Add ``label`` float32 ``(2, slices or frames, y, z)``, real and imaginary part."""
        d = dict(data)
        share = float(d["mask"].float().mean())
        filled, shorter = _extent(d["mask"][0].bool().all(0))
        if share < _LEAST_SAMPLED or filled < _LEAST_FILLED:
            part = (
                f"{100 * share:.0f} % of k-space" if share < _LEAST_SAMPLED else f"{100 * filled:.0f} % of its ellipse"
            )
            raise ValueError(f"{_file(d)}: {part} is sampled; a reference needs fully sampled data")
        if shorter < _LEAST_BALANCED and _file(d) not in self._told:
            self._told.add(_file(d))
            logger.warning(
                "%s: k-space reaches %.0f %% as far to one side as to the other; the reference is blurred",
                _file(d),
                100 * shorter,
            )
        image = SenseOperator(d["csm"][None], d["mask"][None]).adjoint(plain_tensor(d["kspace"])[None])
        d["label"] = with_meta_of(torch.view_as_real(image[0]).movedim(-1, 0).contiguous(), d["kspace"])
        return d


class RandSlabd(RandomizableTransform, MapTransform):
    """Cut a slab of consecutive slices at random, centred where there is something to see.

    Args:
        keys: ``(C, slices, y, z)``; those with one slice stay as they are.
        slab_size: slices; all of a volume that has no more.
        source_key: the image whose energy says where there is something: at least a tenth of its brightest slice's.
    """

    def __init__(self, keys: KeysCollection, slab_size: int, source_key: str = "label") -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, 1.0)
        self.slab_size, self.source_key = slab_size, source_key

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Return the data with slabs."""
        d = dict(data)
        energy = plain_tensor(d[self.source_key]).square().sum((0, 2, 3))
        n_slices = len(energy)
        centre = int(self.R.choice(torch.nonzero(energy >= 0.1 * energy.max()).flatten().tolist()))
        start = max(0, min(centre - self.slab_size // 2, n_slices - self.slab_size))
        for key in self.key_iterator(d):
            if d[key].shape[1] > 1:
                d[key] = d[key][:, start : start + self.slab_size]
        return d


class RandKspaceNoised(RandomizableTransform):
    """Add complex Gaussian noise of a random strength to fully sampled ``kspace``, and what comes of it to ``label``.

    A network that has seen one strength alone smooths quieter data and leaves noise in others. As in measured data, the
    reference has the noise of the samples that it was made of.

    Args:
        largest: the standard deviation in each coil's image (real and imaginary part alike), relative to the 99th percentile of
            the label's magnitude, is drawn between 0 and this.
    """

    def __init__(self, largest: float) -> None:
        RandomizableTransform.__init__(self, 1.0)
        self.largest = largest

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Return the data with new ``kspace`` and ``label``."""
        d = dict(data)
        if self.largest == 0:
            return d
        kspace, label = plain_tensor(d["kspace"]), plain_tensor(d["label"])
        strength = float(self.R.uniform(0, self.largest)) * _bright(label.norm(dim=0))
        generator = torch.Generator().manual_seed(int(self.R.randint(2**31)))
        noise = torch.view_as_complex(torch.randn(*kspace.shape, 2, generator=generator)) * strength * d["mask"]
        image = SenseOperator(d["csm"][None], d["mask"][None]).adjoint(noise[None])
        d["kspace"] = with_meta_of(kspace + noise, d["kspace"])
        d["label"] = with_meta_of(label + torch.view_as_real(image[0]).movedim(-1, 0), d["kspace"])
        return d


class RandUndersampled(RandomizableTransform):
    """Throw samples of fully sampled k-space away; of a scan that has few already, it is told that it loses more.

    Args:
        mask: which ones stay.
        seed: draw the mask that this seed gives, the same at each call, as in validation; at random if ``None``.
    """

    def __init__(self, mask: KspaceMask, seed: int | None = None) -> None:
        RandomizableTransform.__init__(self, 1.0)
        self.mask, self.seed = mask, seed
        self._has_told = self._has_told_share = False

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Return the data with less of ``kspace`` and with the new ``mask``.

        Raises:
            ValueError: the mask cannot be drawn for a file of this size or is of another, naming it.
        """
        d = dict(data)
        if d["kspace"].meta.get("is_stack") and isinstance(self.mask, PoissonDiscMask) and not self._has_told:
            self._has_told = True
            logger.warning(
                "%s: slices of a 2D scan, whose readout lies in the slice; a Poisson disc leaves out parts of each readout, "
                "which no scan does",
                _file(d),
            )
        share = float(_fitting(d, d["mask"]).float().mean())
        if share < _LEAST_SAMPLED and self.seed is not None and not self._has_told_share:
            self._has_told_share = True
            logger.warning(
                "%s: %.0f %% of k-space is sampled, and an acceleration takes more away; leave it out for a scan as it is",
                _file(d),
                100 * share,
            )
        # one draw of the transform's own generator seeds the mask, so that MONAI's way of seeding reaches it
        self.mask.set_random_state(seed=int(self.R.randint(2**31)) if self.seed is None else self.seed)
        try:
            left, mask = self.mask(plain_tensor(d["kspace"]))
        except ValueError as error:
            raise ValueError(f"{_file(d)}: {error}") from error
        d["mask"] = _fitting(d, mask) & _fitting(d, d["mask"])
        d["kspace"] = with_meta_of(left, d["kspace"])
        return d


class ScaleKspaced(Transform):
    """Divide k-space, and a reference, by the 99th percentile of the magnitude of the zero-filled image.

    Raises:
        ValueError: the image is zero, naming the file.
    """

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Return the scaled data; the factor that undoes it is the entry ``scale`` of the metadata."""
        d = dict(data)
        kspace = plain_tensor(d["kspace"])
        magnitude = SenseOperator(d["csm"][None], d["mask"][None]).adjoint(kspace[None]).abs()
        scale = _bright(magnitude) or float(magnitude.max())
        if not scale:
            raise ValueError(f"{_file(d)}: its image is zero everywhere")
        for key in ("kspace", "label"):
            if key in d:
                d[key] = d[key] / scale
        d["kspace"].meta["scale"] = scale
        return d


class PackKspaced(Transform):
    """Put ``kspace``, ``csm`` and ``mask`` together into ``image``, see :func:`memnet.nets.packed.pack`."""

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Return ``image``, MetaTensor complex64 ``(2 coils + 1, slices or frames, y, z)``, and what else there was.

        The entry ``sampled`` of the metadata is the share of k-space that was.
        """
        d = dict(data)
        kspace, mask = d.pop("kspace"), d.pop("mask")
        d["image"] = with_meta_of(pack(plain_tensor(kspace), d.pop("csm"), mask), kspace)
        d["image"].meta["sampled"] = float(mask.float().mean())
        return d


def _bright(magnitude: torch.Tensor) -> float:
    """Return the 99th percentile."""
    values = magnitude.flatten()
    return float(values.kthvalue(max(1, round(0.99 * values.numel()))).values)


def _fitting(d: Data, mask: torch.Tensor) -> torch.Tensor:
    """Return a mask that k-space can be multiplied by.

    Raises:
        ValueError: it has other sides than k-space, where none of them is 1, naming the file and both shapes.
    """
    expected = (1, *d["kspace"].shape[1:])
    if mask.dim() != len(expected) or any(m not in (1, n) for m, n in zip(mask.shape, expected, strict=True)):
        raise ValueError(
            f"{_file(d)}: the sampling mask has the shape {tuple(mask.shape)}, k-space {tuple(d['kspace'].shape)}; expected a "
            f"mask of {expected}, or of 1 along dimensions that share it"
        )
    return mask


def _extent(sampled: torch.Tensor) -> tuple[float, float]:
    """Return how much was sampled of the ellipse that reaches as far as the samples, and how far the shorter side reaches."""
    distance, shorter = torch.zeros(sampled.shape), 1.0
    for axis, n in enumerate(sampled.shape):
        places = sampled.any(1 - axis).nonzero().flatten() - n // 2
        if len(places) < 2:
            continue
        reach = -int(places[0]), int(places[-1]) + (n + 1) % 2  # of an even number the last is one nearer
        shorter = min(shorter, max(0, min(reach)) / max(reach))
        offsets = torch.arange(n) - n // 2
        beyond = (offsets < places[0]) | (offsets > places[-1])
        square = (offsets / max(reach)).square() + 2 * beyond
        distance += square.view(-1, 1) if axis == 0 else square
    inside = distance <= 1
    return float(sampled[inside].float().mean()), shorter


def _file(d: Data) -> str:
    return str(d["kspace"].meta["filename_or_obj"])
