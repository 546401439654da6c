"""Keeps the brain of a tissue map: removes false finds elsewhere in the head, fills what a stripped scan shows."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from scipy import ndimage
from torch.nn import functional

from memnet.metadata import plain_tensor
from memnet.transforms.labels import CSF, GM

__all__ = ["FillStrippedd", "KeepBraind"]


class KeepBraind(MapTransform):
    """Set to background what is not connected to the largest piece of brain by a bridge wider than muscle and scalp make.

    The grey and white matter is eroded by ``radius``, its largest connected piece is dilated by ``radius + margin``, and
    grey and white matter outside is removed. Fluid is kept up to ``fluid_margin`` farther out.

    Args:
        keys: class scores ``(C, D, H, W)`` of background, CSF, GM, WM on a grid of 1 mm.
        radius: half the width of the widest bridge that is cut, voxels.
        margin: how far brain may lie outside the dilated piece, voxels.
        fluid_margin: how much farther fluid may lie, voxels.
    """

    def __init__(self, keys: KeysCollection, radius: int = 3, margin: int = 2, fluid_margin: int = 4) -> None:
        super().__init__(keys)
        self.radius, self.margin, self.fluid_margin = radius, margin, fluid_margin

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return scores whose background wins wherever the tissue is removed; shape and metadata stay."""
        d = dict(data)
        for key in self.key_iterator(d):
            scores = d[key].clone()
            values = plain_tensor(scores)
            label = values.argmax(0)
            core = -_dilate(-(label >= GM).float(), self.radius)
            pieces, n_pieces = ndimage.label(core.cpu().numpy() > 0)
            if n_pieces > 0:
                largest = int(np.bincount(pieces.ravel())[1:].argmax()) + 1
                core = torch.from_numpy((pieces == largest).astype(np.float32)).to(values.device)
                near = _dilate(core, self.radius + self.margin)
                nearby = _dilate(near, self.fluid_margin)
                gone = ((label >= GM) & (near == 0)) | ((label == CSF) & (nearby == 0))
                values[0, gone] = values.amax() + 1
            d[key] = scores
        return d


class FillStrippedd(MapTransform):
    """Let every voxel that a skull-stripped scan has left be brain, since the extraction has already decided that.

    A scan counts as stripped where most of what is not black was found to be tissue; in a whole head at most about half
    is. A whole head is left as it is.

    Args:
        keys: class scores ``(C, D, H, W)`` of background, CSF, GM, WM.
        image_key: the scaled images ``(M, D, H, W)`` on the same grid, in [0, 1].
        dark: intensity above which a voxel is not black in some modality.
        share: least share of tissue among the voxels that are not black in a stripped scan.
    """

    def __init__(self, keys: KeysCollection, image_key: str = "image", dark: float = 0.02, share: float = 0.75) -> None:
        super().__init__(keys)
        self.image_key, self.dark, self.share = image_key, dark, share

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return scores whose background loses in the brain of a stripped scan, and wins outside of it."""
        d = dict(data)
        image = d[self.image_key]
        seen = (plain_tensor(image) > self.dark).any(0)
        for key in self.key_iterator(d):
            scores = d[key].clone()
            values = plain_tensor(scores)
            here = seen.to(values.device)
            tissue = values.argmax(0) > 0
            if int((tissue & here).sum()) >= self.share * max(int(here.sum()), 1):
                lowest, highest = values.amin() - 1, values.amax() + 1
                values[0] = torch.where(here, lowest, highest)
            d[key] = scores
        return d


def _dilate(volume: torch.Tensor, radius: int) -> torch.Tensor:
    """Return the maximum over balls of about ``radius`` voxels: steps to the faces' neighbours and to all 26 in turn."""
    x = volume[None, None]
    for step in range(radius):
        if step % 2:
            for axis in range(3):
                kernel = [3 if i == axis else 1 for i in range(3)]
                x = functional.max_pool3d(x, kernel, 1, [k // 2 for k in kernel])
        else:
            lines = [[3 if i == axis else 1 for i in range(3)] for axis in range(3)]
            x = torch.stack([functional.max_pool3d(x, k, 1, [n // 2 for n in k]) for k in lines]).amax(0)
    return x[0, 0]
