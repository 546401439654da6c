from __future__ import annotations

import copy
import io

import pytest
import torch
from checks import MEMORIES, check_parity, differing, peak, step
from monai.bundle import ConfigParser
from torch import nn

from memnet import ESPCN, ESPCNRevNet


def small(spatial_dims: int = 2, n_blocks: int = 2, **arguments) -> ESPCNRevNet:
    return ESPCNRevNet(spatial_dims, **({"in_channels": 4, "n_blocks": n_blocks, "channels": (6, 8)} | arguments))


def image(*sizes: int, channels: int = 4, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, *sizes)


def kinds(net: nn.Module) -> list[nn.Conv3d]:
    return [m for m in net.modules() if isinstance(m, nn.Conv3d)]


def test_layers_are_the_papers():
    """Valid convolutions 6 - 50 - 100 - 48 of width 3, 1, 3; N blocks in front of each, bottlenecks at half the channels."""
    net = ESPCNRevNet(n_blocks=1)
    shapes = [(c.in_channels, c.out_channels, c.kernel_size[0], c.padding[0]) for c in kinds(net)]

    def stack(half: int) -> list[tuple[int, int, int, int]]:
        return [(half, half, 1, 0), (half, half, 3, 1), (half, half, 1, 0)] * 2

    assert shapes == [*stack(3), (6, 50, 3, 0), *stack(25), (50, 100, 1, 0), *stack(50), (100, 48, 3, 0)]
    assert net(torch.randn(1, 6, 11, 11, 11)).shape == (1, 6, 14, 14, 14)
    plain = [(c.in_channels, c.out_channels, c.kernel_size[0], c.padding[0]) for c in kinds(ESPCN())]
    assert plain == [shape for shape in shapes if shape[:2] in ((6, 50), (50, 100), (100, 48))]


@pytest.mark.parametrize(("spatial_dims", "rate", "channels"), [(1, 1, 4), (2, 3, 2), (3, 2, 4)])
def test_output_is_finer_by_the_rate_without_the_border(spatial_dims, rate, channels):
    net = small(spatial_dims, out_channels=channels, upsampling_rate=rate)
    sizes = (5, 7, 6)[:spatial_dims]
    assert net(image(*sizes)).shape == (2, channels, *(rate * (n - 4) for n in sizes))


def test_voxels_lie_where_they_belong():
    """A network that repeats its centre voxel enlarges the middle of the image as nearest-neighbour interpolation does."""
    net = ESPCN(2, in_channels=3, channels=(3, 3))
    for convolution in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        nn.init.zeros_(convolution.weight)
        nn.init.zeros_(convolution.bias)
        per_channel, middle = convolution.out_channels // 3, convolution.kernel_size[0] // 2
        for i in range(convolution.out_channels):
            convolution.weight.data[i, i // per_channel, middle, middle] = 1
    x = torch.rand(1, 3, 6, 7)
    assert torch.equal(net(x), x[..., 2:-2, 2:-2].repeat_interleave(2, -1).repeat_interleave(2, -2))


@pytest.mark.parametrize(("in_channels", "channels"), [(4, (6, 8)), (1, (6, 8)), (3, (7, 5))])
def test_strategies_agree_bit_for_bit(in_channels, channels):
    check_parity(small(in_channels=in_channels, channels=channels), [image(7, 6, channels=in_channels)])


def test_strategies_agree_without_stacks_and_in_three_dimensions():
    check_parity(ESPCN(2, 4, channels=(6, 8)), [image(7, 6)])
    check_parity(small(3), [image(6, 5, 5)], torch.bfloat16)


@pytest.mark.parametrize("memory", MEMORIES)
def test_batch_statistics_move_once(memory):
    nets = {name: small() for name in ("store", memory)}
    nets[memory].load_state_dict(copy.deepcopy(nets["store"].state_dict()))
    x = image(7, 6)
    for name, net in nets.items():
        step(net, [x], name)
        net.eval()  # between two passes, and back
        net(x)
        net.train()
        step(net, [x], name)
    stored, other = (dict(net.named_buffers()) for net in nets.values())
    assert int(stored["layers.0.1.f.0.num_batches_tracked"]) == 2
    assert [name for name in stored if not torch.equal(stored[name], other[name])] == []


def test_statistics_stay_if_the_network_is_set_to_evaluate_before_the_backward_pass():
    net = small(memory="invert")
    loss = net(image(7, 6)).sum()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.eval()
    loss.backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


def test_peak_is_flat_in_depth():
    peaks = {
        (memory, n): peak(small(3, n, channels=(8, 16), memory=memory), [image(9, 9, 9)])
        for memory in ("invert", "store")
        for n in (2, 4, 16)
    }
    assert peaks["invert", 16] <= 1.02 * peaks["invert", 2], peaks
    assert peaks["store", 4] > 1.5 * peaks["store", 2], peaks


def test_convolutions_keep_their_inputs_alone():
    """Between the passes: what enters each convolution, and the output."""
    net, kept = small(3, memory="invert"), {}
    x = image(9, 9, 9)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        net(x)
    voxels = 2 * 4 * (4 * 9**3 + 6 * 7**3 + 8 * 7**3)  # batch, bytes, channels and voxels of the three
    assert sum(size for pointer, size in kept.items() if pointer not in parameters) <= voxels + 2 * 4 * 4 * 9**3


def test_a_thousand_blocks_a_stack_train():
    net = small(1, 1000, in_channels=1, channels=(1, 2), memory="invert")  # one stack, since one channel gets none
    optimizer = torch.optim.Adam(net.parameters(), 1e-5)
    x, target = image(8, channels=1), torch.rand(2, 1, 8)
    before = (net(x) - target).square().mean()
    before.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    optimizer.step()
    with torch.no_grad():
        assert (net(x) - target).square().mean() < before


def test_stacks_are_there_where_there_are_blocks():
    names = [name for name, _ in small().named_parameters()]
    assert len({name.split(".")[1] for name in names}) == 6
    assert differing(step(small(n_blocks=0), [image(6, 6)], "invert"), step(small(n_blocks=0), [image(6, 6)])) != []
    assert small(in_channels=1).layers[0][0][0].in_channels == 1  # one channel has no halves


def test_identity_start_is_espcn():
    x, net, espcn = image(7, 6), small(start="identity"), small(n_blocks=0)
    convolutions = [layer[0].state_dict() for layer in net.layers if len(layer) == 1]
    for layer, weights in zip(espcn.layers, convolutions, strict=True):
        layer[0].load_state_dict(weights)
    assert torch.allclose(net(x), espcn(x), atol=1e-4)  # but for the rounding to the grid
    gradients = step(net, [x], "invert")[1]
    assert all(
        gradients[name].any() for name in gradients if name.endswith("f.8.weight") or name.endswith("g.8.weight")
    )


@pytest.mark.parametrize("name", ["ESPCN", "ESPCNRevNet"])
def test_is_reachable_from_configs(name):
    config = {"_target_": f"memnet.{name}", "in_channels": 4, "memory": "recursive"}
    net = ConfigParser({"network": config}).get_parsed_content("network")
    assert type(net).__name__ == name and net.memory == "recursive"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript is deprecated
@pytest.mark.parametrize("n_blocks", [0, 2])
def test_script_equals_eager(n_blocks):
    net, x = small(3, n_blocks).eval(), image(6, 5, 7)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(net), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), net(x))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"spatial_dims": 4}, "got 4"),
        ({"in_channels": 0}, "got 0"),
        ({"upsampling_rate": 1.5}, "got 1.5"),
        ({"upsampling_rate": 0}, "got 0"),
        ({"n_blocks": -1}, "got -1"),
        ({"channels": (5, 0)}, r"got \(5, 0\)"),
        ({"memory": "magic"}, "magic"),
    ],
)
def test_unusable_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        ESPCNRevNet(**arguments)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 4, 8), (1, 4, 8, 4)])
def test_wrong_input_is_refused(shape):
    with pytest.raises(ValueError, match=r"shape \(B, 4\) and 2 spatial sizes of at least 5"):
        small()(torch.rand(shape))


@pytest.mark.parametrize(("spatial_dims", "rate"), [(1, 3), (2, 2), (3, 2)])
def test_interpolation_start_is_linear_interpolation(spatial_dims: int, rate: int):
    arguments = {"in_channels": 2, "channels": (6, 5), "upsampling_rate": rate, "start": "interpolation"}
    net = small(spatial_dims, **arguments)
    x = image(*(8, 7, 6)[:spatial_dims], channels=2)
    mode = ("linear", "bilinear", "trilinear")[spatial_dims - 1]
    expected = nn.functional.interpolate(x, scale_factor=rate, mode=mode)
    inner = (..., *[slice(2 * rate, -2 * rate)] * spatial_dims)
    torch.testing.assert_close(net.eval()(x), expected[inner], atol=1e-3, rtol=0)  # but for the rounding to the grid
    gradients = step(net.train(), [x], "invert")[1]
    assert all(gradients[f"layers.{i}.0.0.weight"].any() for i in (1, 3, 5))


def test_start_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="start must be one of random, identity, interpolation, got 'zero'"):
        small(start="zero")
    with pytest.raises(ValueError, match="needs as many of the output and 8 channels between, got 4 and"):
        small(start="interpolation")
