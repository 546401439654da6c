"""The partially and fully invertible U-Nets: the same under every strategy, whatever the input's size."""

import io

import pytest
import torch
from checks import differing, step, streams
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from torch import nn

from memnet import FullyInvResUNet, InvResLoss, OrthogonalMixing, PartiallyInvResUNet, UNet3D
from memnet.accounting.live_memory import peak_live_bytes

NETWORKS = [FullyInvResUNet, PartiallyInvResUNet]
every_network = pytest.mark.parametrize("network", NETWORKS)


def small(network=FullyInvResUNet, spatial_dims=2, **arguments):
    """A network of three levels that runs in milliseconds."""
    return network(spatial_dims, 2, 3, **({"channels": 4, "n_levels": 3, "n_couplings": 1} | arguments))


def image(*sizes, channels=2):
    return torch.rand(1, channels, *sizes)


@pytest.mark.parametrize("vae", [False, True])
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@every_network
def test_parity_for_every_parameter(network, spatial_dims, vae):
    net, x = small(network, spatial_dims, vae=vae), image(*(9, 8, 7)[:spatial_dims])
    stored = step(net, [x], "store")
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in stored[1].values())
    for memory in ("checkpoint", "recursive", "invert"):
        assert differing(step(net, [x], memory), stored) == [], memory


@pytest.mark.parametrize("autocast", [torch.bfloat16])
@every_network
def test_parity_under_autocast(network, autocast):
    net, x = small(network), image(8, 8)
    assert differing(step(net, [x], "invert", autocast), step(net, [x], "store", autocast)) == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"share_down": 0.5},
        {"share_down": 1.0},
        {"downsampling": "shuffle"},
        {"n_levels": 1},
        {"n_couplings": (1, 3, 2)},
        {"channels": 10},
    ],
)
def test_parity_of_the_fully_invertible_networks_variants(arguments):
    net, x = small(**arguments), image(6, 5)
    assert differing(step(net, [x], "invert"), step(net, [x], "store")) == []


@pytest.mark.parametrize("sizes", [(1,), (2,), (7,), (1, 1), (3, 10), (5, 4), (1, 2, 3), (4, 9, 5)])
@every_network
def test_any_size_comes_back(network, sizes):
    net = small(network, len(sizes)).eval()
    assert net(image(*sizes)).shape == (1, 3, *sizes)


@every_network
def test_padding_does_not_move_the_image(network):
    """An input that needs no padding and its copy padded by hand give the same logits in the middle."""
    net, x = small(network, 1).eval(), image(9)
    assert net.multiple == 4
    padded = nn.functional.pad(x, (1, 2), mode="replicate")
    torch.testing.assert_close(net(x), net(padded)[:, :, 1:-2])


@every_network
def test_batch_is_independent(network):
    net = small(network).eval()
    x = torch.rand(2, 2, 8, 8)
    torch.testing.assert_close(net(x), torch.cat([net(x[:1]), net(x[1:])]), rtol=1e-3, atol=1e-3)


@every_network
def test_metatensor_in_and_out(network):
    x = MetaTensor(image(8, 8), affine=torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])))
    for memory in ("store", "invert"):
        y = small(network, memory=memory)(x)
        assert isinstance(y, MetaTensor) and torch.equal(y.affine, x.affine)


@every_network
def test_memory_is_switchable(network):
    net = small(network, memory="checkpoint")
    assert net.memory == "checkpoint"
    net.memory = "invert"
    assert {m.memory for m in net.modules() if hasattr(m, "segment")} == {"invert"}


@pytest.mark.parametrize("module", ["memnet", "monai.networks.nets"])
@every_network
def test_reachable_from_a_config(network, module):
    config = {"_target_": f"{module}.{network.__name__}", "channels": 4, "n_levels": 2, "memory": "recursive"}
    net = ConfigParser({"network": config}).get_parsed_content("network")
    assert isinstance(net, network) and net.memory == "recursive"


@every_network
def test_state_dict_has_no_wrappers_and_strategies_share_it(network):
    keys = list(small(network, memory="invert").state_dict())
    assert keys == list(small(network, memory="store").state_dict())
    assert not [key for key in keys if "module" in key or "chain" in key]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript is deprecated
@pytest.mark.parametrize("vae", [False, True])
@pytest.mark.parametrize("spatial_dims", [2, 3])
@every_network
def test_script_equals_eager(network, spatial_dims, vae):
    net, x = small(network, spatial_dims, vae=vae).eval(), image(*(9, 8, 7)[:spatial_dims])
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(net), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), net(x))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_channels_last_images_are_inverted_exactly(autocast):
    """What comes back from a coarser level is in another memory format, in which convolutions sum up in another order."""
    net = FullyInvResUNet(3, 2, 3, channels=8, n_levels=2, n_couplings=1)
    x = torch.randn(2, 2, 8, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    assert differing(step(net, [x], "invert", autocast), step(net, [x], "store", autocast)) == []


def test_channels_last_weights_are_inverted_exactly():
    net = FullyInvResUNet(3, 2, 3, channels=8, n_levels=2, n_couplings=1).to(memory_format=torch.channels_last_3d)
    x = torch.randn(2, 2, 8, 8, 8)
    # gradients of the mixing alone are sums whose order is that of their own strides
    found = differing(step(net, [x], "invert"), step(net, [x], "store"))
    assert {name for name in found if "mixings" not in name} == set()


def test_mixing_stays_orthogonal_in_training():
    net = small(vae=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    labels = torch.randint(0, 3, (1, 1, 8, 8))
    for _ in range(3):
        optimizer.zero_grad()
        InvResLoss()(net(image(8, 8)), labels).backward()
        optimizer.step()
    mixings = [m for m in net.modules() if isinstance(m, OrthogonalMixing)]
    assert len(mixings) == 8
    for mixing in mixings:
        matrix = mixing.matrix()
        torch.testing.assert_close(matrix @ matrix.mT, torch.eye(4).expand_as(matrix), atol=1e-5, rtol=0)


def test_training_lowers_the_loss():
    net, x, labels = small(channels=8), image(8, 8), torch.randint(0, 3, (1, 1, 8, 8))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = InvResLoss()(net(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@every_network
def test_couplings_cost_no_activations(network):
    """More couplings a level, the same peak; the parameters' gradients apart."""
    peaks = {}
    for memory in ("invert", "store"):
        for n_couplings in (1, 4):
            net, x = (
                small(network, 3, channels=16, n_levels=2, n_couplings=n_couplings, memory=memory),
                image(16, 16, 16),
            )
            peaks[memory, n_couplings] = peak_live_bytes(lambda net=net, x=x: net(x).sum().backward(), net.parameters())
    assert peaks["invert", 4] <= 1.02 * peaks["invert", 1], peaks
    assert peaks["store", 4] > 1.3 * peaks["store", 1], peaks


def test_resampling_does_not_copy_the_state_at_once():
    """In units of the state at full resolution, 2 with its gradient; 4.3 where streams and gradients are copied together."""
    net, x = FullyInvResUNet(3, 4, 3, channels=32, tile="auto"), torch.rand(2, 4, 48, 32, 32)
    peak = peak_live_bytes(lambda: net(x).sum().backward(), net.parameters())
    assert peak <= 3.4 * 8 * x.nbytes


@pytest.mark.parametrize("kind", [FullyInvResUNet, PartiallyInvResUNet, UNet3D])
def test_two_planes_are_not_left_to_bfloat16(kind):
    """PyTorch 2.13's convolutions on a CPU take the weights' gradient of two planes from memory that nobody wrote."""
    net, x = kind(3, 2, 3, channels=32, n_levels=2, vae=True), torch.rand(1, 2, 3, 8, 8)
    gradients = []
    for amp in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            logits, losses = net(x)
        gradients.append(torch.autograd.grad(logits.float().square().mean() + losses.sum(), net.parameters()))
    for exact, found in zip(*gradients, strict=True):
        assert (found - exact).norm() <= 0.1 * exact.norm() + 1e-6


@pytest.mark.parametrize("sizes", [(3, 8, 8), (2, 8), (2, 8, 8, 8)])
@every_network
def test_wrong_input_is_refused(network, sizes):
    with pytest.raises(ValueError, match=r"expected an input of shape \(B, 2\) and 2 spatial sizes"):
        small(network)(torch.rand(1, *sizes))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"memory": "magic"}, "magic"),
        ({"channels": 5}, "got 5"),
        ({"channels": 2}, "got 2"),
        ({"n_levels": 0}, "got 0"),
        ({"n_couplings": 0}, "got 0"),
        ({"n_couplings": (2, 2)}, r"each of 4 levels, got \(2, 2\)"),
        ({"out_channels": 0}, "got 0"),
        ({"spatial_dims": 4}, "got 4"),
    ],
)
@every_network
def test_unusable_arguments_are_refused(network, arguments, said):
    with pytest.raises(ValueError, match=said):
        network(**({"spatial_dims": 2} | arguments))


@pytest.mark.parametrize("arguments", [{"share_down": 0.0}, {"share_down": 1.5}, {"downsampling": "pool"}])
def test_unusable_resampling_is_refused(arguments):
    with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
        FullyInvResUNet(**arguments)


def test_streams_survive_a_training_step_in_half_precision():
    """The stem is in bfloat16 under autocast; the streams are float32."""
    net, seen = small(), []
    net.body[0].register_forward_pre_hook(lambda _, state: seen.append({x.dtype for x in state}))
    net.memory = "store"
    with torch.autocast("cpu", torch.bfloat16):
        net(*streams(1, 2, 8, 8, n=1))
    assert seen == [{torch.float32}]
