"""Volumes of label maps, and what MONAI's metrics leave to the user: one class alone, distances of what is not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics import HausdorffDistanceMetric

__all__ = ["BoundedHausdorff", "label_volumes", "one_class"]


def one_class(index: int) -> Callable[[Sequence[dict[str, Any]]], tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Return an ``output_transform`` that hands one class of ``pred`` and ``label`` to a metric.

    Args:
        index: the class's channel in the ``(classes, D, H, W)`` entries.

    Returns:
        A function of an engine's decollated output.
    """

    def select(output: Sequence[dict[str, Any]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        chosen = slice(index, index + 1)
        return [case["pred"][chosen] for case in output], [case["label"][chosen] for case in output]

    return select


class BoundedHausdorff(HausdorffDistanceMetric):
    """MONAI's Hausdorff distance, finite where one of the two regions is empty, as BraTS scores it.

    Args:
        percentile: the percentile of the distances to take rather than the largest, such as 95.
        missed: the distance where one region is empty, mm: in BraTS the diagonal of its 240 x 240 x 155 mm volumes. Where
            both are, the distance is 0.
        include_background: measure the first channel, too; without it the metric has a channel less.

    References:
        Identifying the Best Machine Learning Algorithms for Brain Tumor Segmentation (Bakas et al., 2018),
        https://arxiv.org/abs/1811.02629
    """

    def __init__(
        self, percentile: float | None = None, missed: float = 373.13, include_background: bool = True
    ) -> None:
        super().__init__(include_background=True, percentile=percentile)
        self.first = 0 if include_background else 1
        self.missed = missed

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Measure ``(B, C, D, H, W)`` masks; ``(B, C)`` in voxels, that is in mm on a grid of 1 mm."""
        y_pred, y = y_pred[:, self.first :], y[:, self.first :]
        there = [mask.flatten(2).any(2) for mask in (y_pred, y)]
        distances = torch.where(there[0] ^ there[1], self.missed, 0.0)
        for case, region in (there[0] & there[1]).nonzero().tolist():
            masks = (m[case : case + 1, region : region + 1] for m in (y_pred, y))
            distances[case, region] = super()._compute_tensor(*masks, **kwargs).squeeze()
        return distances


def label_volumes(labels: np.ndarray, affine: np.ndarray, groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Measure the volumes of groups of labels.

    Args:
        labels: label map ``(D, H, W)``.
        affine: ``(4, 4)``, mm.
        groups: the values that each group takes in.

    Returns:
        Millilitres of each group.
    """
    millilitres = abs(float(np.linalg.det(np.asarray(affine)[:3, :3]))) / 1000
    n_values = 1 + max(value for values in groups.values() for value in values)
    counts = np.bincount(np.asarray(labels).astype(np.int64).ravel(), minlength=n_values)
    return {name: float(counts[list(values)].sum() * millilitres) for name, values in groups.items()}
