"""Tissue volumes, and the selection of one class for MONAI's metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from memnet.transforms.labels import TISSUES

__all__ = ["one_class", "tissue_volumes"]


def one_class(index: int) -> Callable[[Sequence[dict[str, Any]]], tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Return an ``output_transform`` that hands one class of ``pred`` and ``label`` to a metric.

    Args:
        index: the class's channel in the one-hot ``(classes, D, H, W)`` entries.

    Returns:
        A function of an engine's decollated output.
    """

    def select(output: Sequence[dict[str, Any]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        chosen = slice(index, index + 1)
        return [case["pred"][chosen] for case in output], [case["label"][chosen] for case in output]

    return select


def tissue_volumes(labels: np.ndarray, affine: np.ndarray) -> dict[str, float]:
    """Measure the volume of each tissue.

    Args:
        labels: label map ``(D, H, W)``, 1 CSF, 2 GM, 3 WM.
        affine: ``(4, 4)``, mm.

    Returns:
        Millilitres of CSF, GM and WM.
    """
    millilitres = abs(float(np.linalg.det(np.asarray(affine)[:3, :3]))) / 1000
    counts = np.bincount(np.asarray(labels).astype(np.int64).ravel(), minlength=len(TISSUES) + 1)
    return {name: float(counts[value] * millilitres) for name, value in TISSUES.items()}
