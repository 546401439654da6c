"""The variational branch: in training alone, of no cost to the memory peak."""

import pytest
import torch

from memnet import FullyInvResUNet, InvResLoss, PartiallyInvResUNet, UNet3D
from memnet.accounting.live_memory import peak_live_bytes

every_network = pytest.mark.parametrize("network", [FullyInvResUNet, PartiallyInvResUNet, UNet3D])


def small(network, vae, spatial_dims=2, **arguments):
    return network(spatial_dims, 2, 3, **({"channels": 4, "n_levels": 3} | arguments), vae=vae)


@every_network
def test_tuple_in_training_and_logits_in_evaluation(network):
    net, x = small(network, True), torch.rand(2, 2, 9, 8)
    logits, regularisation = net(x)
    assert logits.shape == (2, 3, 9, 8) and regularisation.shape == (2, 2)
    assert torch.equal(net.eval()(x), logits)


@every_network
def test_weights_with_the_branch_load_without_it(network):
    trained, x = small(network, True).eval(), torch.rand(1, 2, 9, 8)
    net = small(network, False).eval()
    net.load_state_dict(trained.state_dict())
    assert torch.equal(net(x), trained(x))


def test_other_unknown_weights_are_refused():
    net = small(UNet3D, False)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other\.weight"):
        net.load_state_dict(net.state_dict() | {"other.weight": torch.zeros(1)})


def test_regularisation_is_finite_and_of_the_right_sign():
    for n_levels in (1, 2, 4):
        net = small(PartiallyInvResUNet, True, n_levels=n_levels)
        _, regularisation = net(torch.rand(2, 2, 17, 5))
        assert (regularisation >= 0).all() and regularisation.isfinite().all()


def test_divergence_of_wild_features_is_finite_under_autocast():
    net = small(UNet3D, True)
    with torch.no_grad():
        net.vae.encode.weight *= 1e4
    with torch.autocast("cpu", torch.bfloat16):
        _, regularisation = net(torch.rand(1, 2, 16, 16))
    assert regularisation.isfinite().all()


@pytest.mark.parametrize("memory", ["store", "invert"])
def test_the_branch_is_recomputed_whatever_the_networks_strategy(memory):
    net = small(FullyInvResUNet, True, memory=memory)
    net.memory = memory
    assert net.vae.upsample.memory == "checkpoint"


@pytest.mark.parametrize("network", [FullyInvResUNet, PartiallyInvResUNet])
def test_the_branch_does_not_set_the_memory_peak(network):
    x, labels, peaks = torch.rand(1, 2, 32, 32, 32), torch.randint(0, 3, (1, 1, 32, 32, 32)), {}
    for vae in (False, True):
        net = small(network, vae, 3, channels=16, n_couplings=1, memory="invert")
        peaks[vae] = peak_live_bytes(lambda net=net: InvResLoss()(net(x), labels).backward(), net.parameters())
    assert peaks[True] <= 1.01 * peaks[False], peaks
