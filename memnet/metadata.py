"""MONAI's MetaTensor, put off and on again."""

import torch
from monai.data import MetaTensor

__all__ = ["plain_tensor", "with_meta_of"]


def plain_tensor(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor without metadata."""
    return x.as_tensor() if isinstance(x, MetaTensor) else x


def with_meta_of(x: torch.Tensor, source: MetaTensor) -> MetaTensor:
    """Return a tensor with the affine and the metadata of another."""
    return MetaTensor(x, source.affine.cpu(), meta={k: v for k, v in source.meta.items() if k != "affine"})
