"""What becomes of a network's output: its logits alone in training, small false finds dropped from a label map."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from scipy import ndimage

from memnet.metadata import plain_tensor

__all__ = ["KeepLargePiecesd", "KeepLogitsd"]


class KeepLargePiecesd(MapTransform):
    """Set connected pieces of foreground that are small beside the largest one to background.

    Args:
        keys: label maps ``(1, D, H, W)``; every value but 0 is foreground.
        share: least size of a piece relative to the largest; 0 keeps all, 1 the largest alone.

    Raises:
        ValueError: if the share is not between 0 and 1.
    """

    def __init__(self, keys: KeysCollection, share: float = 0.1) -> None:
        super().__init__(keys)
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}, expected a number between 0 and 1")
        self.share = share

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the maps with fewer pieces; shape, dtype and metadata stay."""
        d = dict(data)
        for key in self.key_iterator(d):
            labels = d[key]
            values = plain_tensor(labels)
            # voxels that touch at a face alone are one piece
            pieces, n_pieces = ndimage.label(values[0].cpu().numpy() > 0)
            if n_pieces > 1:
                sizes = np.bincount(pieces.ravel())
                sizes[0] = 0
                keep = torch.from_numpy(sizes >= self.share * sizes.max())[torch.from_numpy(pieces).long()]
                d[key] = labels * keep[None].to(values)
        return d


class KeepLogitsd(MapTransform):
    """Keep the logits of a network's output in training, which with the variational branch is a tuple.

    Args:
        keys: the predictions: logits, or the logits and the branch's losses.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the first of the tuple."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = d[key][0] if isinstance(d[key], (tuple, list)) else d[key]
        return d
