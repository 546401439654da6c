"""Makes intensities comparable, of skull-stripped brains however the files were normalised before."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, ScaleIntensityRange
from monai.transforms.utils_pytorch_numpy_unification import percentile

from memnet.metadata import plain_tensor

__all__ = ["BrighterThan", "ScaleBraind", "ScaleModalitiesd", "scale_brain", "zero_background"]

_N_SAMPLES = 200_000


def zero_background(volume: torch.Tensor, share: float = 0.02, ringing: float = 0.2) -> torch.Tensor:
    """Shift a volume so that its least value is 0, and set its constant background to 0.

    The background is the most frequent value on the volume's six faces: 0 in skull-stripped scans, another constant where
    they were z-scored afterwards, as BraTS 2015 often is.

    Args:
        volume: ``(..., D, H, W)`` of one modality.
        share: share of all voxels that must have the face's value; with less there is no constant background.
        ringing: a smaller share of the other voxels that lies below the background was not measured but made by
            interpolation, and becomes 0.

    Returns:
        The volume, least value 0; metadata stay.
    """
    values = plain_tensor(volume)
    faces = torch.cat([values.select(axis, i).flatten() for axis in (-1, -2, -3) for i in (0, -1)])
    found, counts = faces.unique(return_counts=True)
    level = found[counts.argmax()]
    background = values == level
    if float(background.float().mean()) < share:
        return volume - values.min()
    below, others = int((values < level).sum()), int((~background).sum())
    least = level if below < ringing * others else values.min()
    return (volume - least).clamp_min(0).masked_fill(background, 0)


def scale_brain(
    image: torch.Tensor, brain: torch.Tensor | None = None, median: float = 1 / 3, lower: float = 0.5
) -> torch.Tensor:
    """Map the brain's ``lower`` percentile to 0 and its median to ``median``, linearly, cut off at 0 and 1.

    The median hardly depends on a tumour's size, as high percentiles do.

    Args:
        image: one modality ``(D, H, W)``, 0 outside the brain.
        brain: the voxels to measure, bool of the same shape; those above 0 by default.
        median: what the median becomes.
        lower: the percentile that becomes 0.

    Returns:
        Values in [0, 1], exactly 0 where the image is 0; an image without brain stays as it is.
    """
    values = image[image > 0 if brain is None else brain]
    values = values[:: max(1, len(values) // _N_SAMPLES)]
    if len(values) == 0:
        return image
    low, middle = torch.quantile(values.float(), torch.tensor([lower / 100, 0.5], device=values.device))
    low = low if middle > low else torch.zeros_like(low)
    scaled = (image - low) * (median / (middle - low).clamp(min=1e-12))
    return scaled.clamp_(0, 1).masked_fill_(image == 0, 0)


class BrighterThan:
    """Tell which voxels of an image are brighter than ``level``: a ``select_fn`` that processes can hand over."""

    def __init__(self, level: float) -> None:
        self.level = level

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Return bool of the image's shape."""
        return image > self.level


class ScaleBraind(MapTransform):
    """Scale every channel of skull-stripped images by :func:`scale_brain`; a missing (all-zero) one stays zero.

    Args:
        keys: the images, ``(C, D, H, W)``, 0 outside the brain and nowhere below (see :func:`zero_background`).
        median: what the brain's median becomes.
        lower: the percentile of the brain that becomes 0.
    """

    def __init__(self, keys: KeysCollection, median: float = 1 / 3, lower: float = 0.5) -> None:
        super().__init__(keys)
        self.median, self.lower = median, lower

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Scale in float32."""
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key].clone()
            channels = plain_tensor(image)
            for channel in channels:
                channel.copy_(scale_brain(channel, median=self.median, lower=self.lower))
            d[key] = image
        return d


class ScaleModalitiesd(MapTransform):
    """Scale every channel from its 0 and ``upper`` percentile to [0, 1], clipped; a missing (all-zero) one stays zero.

    Args:
        keys: the images, ``(C, D, H, W)``.
        upper: the percentile that becomes 1.
        least_share: where a smaller share of the voxels differs from the least value, as of a small brain in a large field of
            view, the percentile is that of the box around them.
    """

    def __init__(self, keys: KeysCollection, upper: float = 99.5, least_share: float = 0.05) -> None:
        super().__init__(keys)
        self.upper, self.least_share = upper, least_share

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Scale in float32."""
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key].clone()
            channels = plain_tensor(image)
            for channel in channels:
                # MONAI's transform warns of a division by zero where all values are the same
                if channel.min() < channel.max():
                    channel.copy_(self._scaled(channel))
            d[key] = image
        return d

    def _scaled(self, channel: torch.Tensor) -> torch.Tensor:
        filled, part = channel > channel.min(), channel
        if float(filled.float().mean()) < self.least_share:
            part = channel[tuple(slice(int(i.min()), int(i.max()) + 1) for i in filled.nonzero(as_tuple=True))]
        scale = ScaleIntensityRange(float(channel.min()), float(percentile(part, self.upper)), 0.0, 1.0, clip=True)
        return torch.as_tensor(scale(channel))
