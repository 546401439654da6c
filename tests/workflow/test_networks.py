"""The networks by name, and the ones that are as large as the baseline."""

import pytest
import torch

from memnet import FullyInvResUNet, UNet3D
from memnet.workflow.networks import segmentation_network


def _size(*arguments, **more):
    with torch.device("meta"):
        return sum(p.numel() for p in segmentation_network(*arguments, **more).parameters())


@pytest.mark.parametrize(
    "arguments", [{}, {"channels": 16, "n_levels": 3, "vae": True}, {"channels": 8, "n_levels": 2}]
)
def test_networks_match_the_baseline(arguments):
    baseline = _size("baseline", True, **arguments)
    assert baseline == _size("baseline", **arguments)
    for name in ("partially", "fully"):
        assert abs(_size(name, True, **arguments) / baseline - 1) < 0.1, name
    assert _size("fully", **arguments) < 0.9 * baseline


def test_matching_leaves_full_resolution_as_it_is():
    """Depth is added where it is cheap in time."""
    net = segmentation_network("fully", True, channels=8, n_levels=2)
    assert [block.f[1].in_channels for block in net.body if hasattr(block, "f")] == [4] * 2 + [8] * 4 + [4] * 2


def test_what_cannot_match_is_refused():
    with pytest.raises(ValueError, match="one of the two"):
        segmentation_network("fully", True, n_couplings=3)
    with pytest.raises(ValueError, match="cannot match the baseline: .* n_couplings="):
        segmentation_network("fully", True, channels=8, n_levels=2, spatial_dims=1)  # a quarter down: narrower below


def test_names_and_arguments():
    assert isinstance(segmentation_network("baseline", channels=4, n_levels=1, memory=None), UNet3D)
    assert isinstance(segmentation_network("fully", channels=4, n_levels=1), FullyInvResUNet)
    with pytest.raises(ValueError, match="expected one of baseline, partially, fully"):
        segmentation_network("completely")
    with pytest.raises(ValueError, match="UNet3D .*n_couplings"):
        segmentation_network("baseline", n_couplings=2)
