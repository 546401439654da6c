"""Metrics of images: against their definitions."""

import pytest
import torch
from monai.metrics import SSIMMetric

from memnet.workflow.image_quality import NRMSEMetric, SliceSSIMMetric


def test_nrmse_is_the_relative_error_of_each_image():
    y = torch.rand(2, 1, 3, 4, 5) + 0.5
    factors = torch.tensor([0.9, 1.3]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(NRMSEMetric(reduction="none")(factors * y, y), torch.tensor([[0.1], [0.3]]))


def test_ssim_is_that_of_the_planes():
    x, y = torch.rand(2, 1, 3, 12, 10), torch.rand(2, 1, 3, 12, 10)
    found = SliceSSIMMetric()(x, y)
    plane = SSIMMetric(2, kernel_type="uniform", win_size=7)
    assert found.shape == (2, 1)
    expected = torch.stack([plane(x[:, :, i], y[:, :, i]) for i in range(3)]).mean(0)
    torch.testing.assert_close(found, expected)
    assert SliceSSIMMetric()(y, y).flatten().tolist() == pytest.approx([1, 1])
