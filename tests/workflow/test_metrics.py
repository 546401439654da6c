"""Distances of regions that may be absent."""

import pytest
import torch

from memnet.workflow.metrics import BoundedHausdorff

# MONAI on its own deprecations
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:monai")


def test_distance_of_what_is_not_there_is_finite() -> None:
    empty, cube = torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8)
    cube[..., 2:4, 2:4, 2:4] = 1
    moved = cube.roll(3, -1)
    metric = BoundedHausdorff(missed=50)
    pairs = [(empty, empty, 0), (cube, empty, 50), (empty, cube, 50), (cube, cube, 0), (cube, moved, 3)]
    for prediction, reference, expected in pairs:
        assert metric(prediction, reference).item() == expected
    assert metric.aggregate().item() == pytest.approx(103 / 5)
    regions = BoundedHausdorff(missed=50)
    assert regions(torch.cat([cube, empty], 1), torch.cat([moved, cube], 1)).tolist() == [[3, 50]]
    foreground = BoundedHausdorff(missed=50, include_background=False)
    assert foreground(torch.cat([cube, empty], 1), torch.cat([moved, cube], 1)).tolist() == [[50]]


def test_percentile_leaves_the_farthest_out() -> None:
    mask, other = torch.zeros(1, 1, 20, 8, 8), torch.zeros(1, 1, 20, 8, 8)
    mask[..., 2:6, 2:6, 2:6] = other[..., 2:6, 2:6, 2:6] = 1
    other[..., 18, 4, 4] = 1
    assert BoundedHausdorff()(mask, other).item() == 13
    assert BoundedHausdorff(percentile=95)(mask, other).item() == 0
