"""How near an image is to its reference: metrics of reconstruction and super-resolution that MONAI lacks."""

from __future__ import annotations

import torch
from monai.metrics import SSIMMetric
from monai.metrics.regression import RegressionMetric

__all__ = ["NRMSEMetric", "SliceSSIMMetric"]


class NRMSEMetric(RegressionMetric):
    r"""Normalised root mean squared error, :math:`\lVert \hat x - x \rVert / \lVert x \rVert` of each image."""

    def _compute_metric(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Compare ``(B, C, *dims)``; ``(B, 1)``."""
        error, norm = ((y_pred - y).flatten(1).norm(dim=1), y.flatten(1).norm(dim=1))
        return (error / norm)[:, None]


class SliceSSIMMetric(SSIMMetric):
    """Structural similarity of the planes along the first dimension, averaged, as the field reports it.

    Of values from 0 to 1, in uniform windows of 7 x 7 voxels.

    References:
        fastMRI: an open dataset and benchmarks for accelerated MRI (Zbontar et al., 2018), https://arxiv.org/abs/1811.08839
    """

    def __init__(self) -> None:
        super().__init__(spatial_dims=2, data_range=1.0, kernel_type="uniform", win_size=7)

    def _compute_metric(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Compare real ``(B, C, D, H, W)``; ``(B, 1)``."""
        planes = (x.movedim(2, 1).flatten(0, 1) for x in (y_pred, y))
        return super()._compute_metric(*planes).reshape(len(y), -1).mean(1, keepdim=True)
