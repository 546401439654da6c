"""The baseline U-Net."""

import io

import monai.networks.nets
import pytest
import torch
from checks import differing, step

from memnet import UNet3D


def small(spatial_dims=2, **arguments):
    return UNet3D(spatial_dims, 2, 3, **({"channels": 4, "n_levels": 3} | arguments))


@pytest.mark.parametrize("vae", [False, True])
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_parity_for_every_parameter(spatial_dims, vae):
    net, x = small(spatial_dims, vae=vae), torch.rand(1, 2, *(9, 8, 7)[:spatial_dims])
    stored = step(net, [x], "store")
    assert all(gradient is not None for gradient in stored[1].values())
    for memory in ("checkpoint", "recursive"):
        assert differing(step(net, [x], memory), stored) == [], memory


@pytest.mark.parametrize("sizes", [(1,), (3, 10), (5, 4), (4, 9, 5)])
def test_any_size_comes_back(sizes):
    assert small(len(sizes)).eval()(torch.rand(1, 2, *sizes)).shape == (1, 3, *sizes)


def test_activations_are_those_of_the_papers():
    kinds = {type(module).__name__ for module in small(3).modules()}
    assert {"InstanceNorm3d", "LeakyReLU", "Conv3d", "MaxPool3d"} <= kinds
    assert not {"BatchNorm3d", "ReLU", "PReLU"} & kinds


def test_reachable_from_monai():
    assert monai.networks.nets.UNet3D is UNet3D


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript is deprecated
def test_script_equals_eager():
    net, x = small(vae=True).eval(), torch.rand(1, 2, 9, 8)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(net), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), net(x))


def test_invert_is_refused():
    with pytest.raises(ValueError, match="nothing to invert"):
        small(memory="invert")
    net = small()
    with pytest.raises(ValueError, match="invertible blocks"):
        net.memory = "invert"
    assert net.memory == "store"


@pytest.mark.parametrize("argument", ["in_channels", "out_channels", "channels", "n_levels"])
def test_unusable_arguments_are_refused(argument):
    with pytest.raises(ValueError, match=f"{argument} must be at least 1, got 0"):
        UNet3D(**{argument: 0})


def test_wrong_channels_are_refused():
    with pytest.raises(ValueError, match=r"\(B, 2\)"):
        small()(torch.rand(1, 1, 8, 8))
