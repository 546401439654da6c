"""Dictionary transforms from a network's reconstruction to an image in space, and to what it is compared with."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Transform

from memnet.metadata import plain_tensor, with_meta_of
from memnet.mri.operators import SenseOperator
from memnet.nets.packed import unpack
from memnet.transforms.kspace import Data

__all__ = ["CompareMagnitudesd", "ToVolumed", "ZeroFilledd"]


class ToVolumed(MapTransform):
    """Turn a network's output into an image in space, with the scale of the raw data.

    Args:
        keys: real and imaginary part, ``(2, slices or frames, y, z)``.
        image_key: the network's input, which has the metadata.
        movie: whether the first dimension is the frames; they become the channels, which writers put last.
        phase: add the phase, rad, as entry ``phase``.
    """

    def __init__(
        self, keys: KeysCollection, image_key: str = "image", movie: bool = False, phase: bool = False
    ) -> None:
        super().__init__(keys)
        self.image_key, self.movie, self.phase = image_key, movie, phase

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Return magnitudes, MetaTensor float32 ``(1, x, y, z)`` or ``(frames, x, y, 1)``."""
        d = dict(data)
        source = d[self.image_key]
        for key in self.key_iterator(d):
            value = torch.complex(*plain_tensor(d[key]).float().cpu().unbind())
            value = value[..., None] if self.movie else value[None]
            d[key] = with_meta_of(value.abs() * source.meta.get("scale", 1.0), source)
            if self.phase:
                d["phase"] = with_meta_of(value.angle(), source)
        return d


class ZeroFilledd(Transform):
    """Add ``zero_filled``, what the adjoint makes of the network's input ``image``: the least that a network must beat."""

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Add ``zero_filled`` float32 ``(2, slices or frames, y, z)``, real and imaginary part."""
        d = dict(data)
        kspace, csm, mask = unpack(plain_tensor(d["image"])[None])
        d["zero_filled"] = torch.view_as_real(SenseOperator(csm, mask).adjoint(kspace)[0]).movedim(-1, 0)
        return d


class CompareMagnitudesd(MapTransform):
    """Make images comparable: magnitudes, relative to the largest of the reference.

    Args:
        keys: real and imaginary part, ``(2, slices or frames, y, z)``.
        reference_key: the one whose largest magnitude becomes 1.
    """

    def __init__(self, keys: KeysCollection = ("pred", "label"), reference_key: str = "label") -> None:
        super().__init__(keys)
        self.reference_key = reference_key

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Return magnitudes float32 ``(1, slices or frames, y, z)``."""
        d = dict(data)
        largest = plain_tensor(d[self.reference_key]).norm(dim=0).max().clamp_min(torch.finfo(torch.float32).tiny)
        for key in self.key_iterator(d):
            d[key] = plain_tensor(d[key]).float().norm(dim=0, keepdim=True) / largest
        return d
