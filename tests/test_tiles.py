"""Tiles: the module's own numbers, in a fraction of the memory."""

import copy

import pytest
import torch
from checks import MEMORIES, check_round_trip, couplings, differing, step, streams
from monai.data import MetaTensor
from torch import nn

from memnet import AdditiveCoupling, Chain, ChannelMerge, ChannelSplit, FullyInvResUNet
from memnet.accounting.live_memory import peak_live_bytes
from memnet.grid import round_to_grid
from memnet.nets.segmentation import norm_act_conv
from memnet.tiles import _automatic_starts, _starts, _tiles, run_in_tiles


class Tiles(nn.Module):
    """A module that runs in tiles."""

    def __init__(self, module: nn.Module, halo: int, size: tuple[int, ...]) -> None:
        super().__init__()
        self.module, self.halo, self.size = module, halo, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run_in_tiles(self.module, x, self.halo, self.size)


def network(n_layers: int = 3, channels: int = 4, padding_mode: str = "replicate", spatial_dims: int = 2, *more):
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims]
    widths = [2, *[channels] * (n_layers - 1), 2]
    layers = [
        m
        for a, b in zip(widths, widths[1:], strict=False)
        for m in (conv(a, b, 3, padding=1, padding_mode=padding_mode), nn.Softplus(), *more)
    ]
    return nn.Sequential(*layers)


def differentiate(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("padding_mode", ["zeros", "replicate"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 2, 9, 17), (0, 5)),
        ((1, 2, 9, 17), (4, 6)),
        ((1, 2, 23), (4,)),
        ((1, 2, 4, 5, 13), (5,)),
        ((1, 2, 3, 14), (7,)),
    ],
)
def test_outputs_and_gradients_are_those_of_the_module(float64, shape, size, padding_mode):
    plain = network(padding_mode=padding_mode, spatial_dims=len(shape) - 2)
    tiled = Tiles(copy.deepcopy(plain), 3, size)
    x = torch.randn(shape)
    for expected, got in zip(differentiate(plain, x), differentiate(tiled, x), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_halo_too_small_changes_the_numbers(float64):
    plain = network()
    x = torch.randn(1, 2, 9, 17)
    assert not torch.allclose(plain(x), Tiles(plain, 2, (5,))(x))


def test_gradients_are_those_of_finite_differences(float64):
    tiled = Tiles(network(2, 2), 2, (3, 4))
    assert torch.autograd.gradcheck(tiled, torch.randn(1, 2, 5, 9, requires_grad=True))


def test_dropout_falls_on_the_same_places_in_the_repetition(float64):
    tiled = Tiles(network(2, 4, "zeros", 1, nn.Dropout(0.5)), 2, (6,))
    x = torch.randn(1, 2, 24, requires_grad=True)
    torch.manual_seed(1)
    (gradient,) = torch.autograd.grad(tiled(x).square().sum(), x)
    torch.manual_seed(1)
    cut = _tiles(_starts(x.shape, [2], (6,)), x.shape, [2])
    parts = [tiled.module(x[outer])[place] for outer, _, place in cut]
    (expected,) = torch.autograd.grad(torch.cat(parts, -1).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_memory_is_that_of_a_tile():
    module = network(4, 16)
    x = torch.randn(1, 2, 32, 256)

    def peak(run: nn.Module) -> int:
        leaf = x.clone().requires_grad_()
        return peak_live_bytes(lambda: run(leaf).sum().backward(), module.parameters())

    whole, tiled = peak(module), peak(Tiles(module, 4, (32,)))
    assert tiled < 0.3 * whole


def test_one_tile_is_the_module_itself():
    module = network()
    x = torch.randn(1, 2, 8, 8)
    assert torch.equal(Tiles(module, 3, (8, 0))(x), module(x))


@pytest.mark.parametrize(("halo", "size"), [(-1, (4,)), (1, (-4,)), (1, (4, 4, 4))])
def test_sizes_that_make_no_sense_are_refused(halo, size):
    with pytest.raises(ValueError, match="up to 2 sizes"):
        run_in_tiles(nn.Identity(), torch.zeros(1, 1, 8, 8), halo, size)


def group_norm_branch(channels: int = 4) -> nn.Sequential:
    """Statistics of groups of channels, and two convolutions of different widths with a bias."""
    first = nn.Conv3d(channels, channels, (1, 3, 5), padding=(0, 1, 2))
    second = nn.Conv3d(channels, channels, 3, padding=2, dilation=2, padding_mode="replicate")
    return nn.Sequential(nn.GroupNorm(2, channels), nn.LeakyReLU(inplace=True), first, nn.Sequential(nn.SiLU(), second))


BRANCHES = {
    "instance norm": lambda: norm_act_conv(3, 4, 4),
    "group norm": group_norm_branch,
    "norm without scale": lambda: nn.Sequential(nn.InstanceNorm3d(4), nn.ReLU(), nn.Conv3d(4, 4, 3, padding="same")),
    "no norm": lambda: nn.Sequential(nn.LeakyReLU(inplace=True), nn.Conv3d(4, 4, 3, padding=1)),
}


def in_tiles(chain: nn.Module, tile) -> nn.Module:
    """A copy of a chain or network whose couplings run in tiles."""
    chain = copy.deepcopy(chain)
    for module in chain.modules():
        if isinstance(module, AdditiveCoupling):
            module.tile = tile
    return chain


def shifted(chain: Chain) -> Chain:
    """The same with weights, scales and shifts that are no special values."""
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return chain


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize(("batch", "tile"), [(2, (4,)), (1, (3, 0, 5)), (2, "auto")])
def test_couplings_in_tiles_are_those_of_the_whole(float64, name, batch, tile):
    whole = shifted(couplings(2, BRANCHES[name]).double())
    inputs = [0.5 + x for x in streams(batch, 4, 7, 6, 13, dtype=torch.float64)]
    expected, got = step(whole, inputs, "store"), step(in_tiles(whole, tile), inputs, "invert")
    for name, value in (expected[0] | expected[1]).items():
        torch.testing.assert_close((got[0] | got[1])[name], value, rtol=1e-7, atol=1e-8, msg=name)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("fraction_bits", [14, None])
def test_every_strategy_has_the_bits_of_store_with_the_same_tiles(autocast, fraction_bits, device):
    chain = shifted(couplings(2, lambda: norm_act_conv(3, 4, 4), fraction_bits)).to(device)
    chain, inputs = (
        in_tiles(Chain([ChannelSplit(), *chain, ChannelMerge()]), (4,)),
        streams(2, 8, 5, 6, 9, n=1, device=device),
    )
    stored = step(chain, inputs, "store", autocast)
    for memory in MEMORIES if fraction_bits else MEMORIES[:2]:
        assert differing(step(chain, inputs, memory, autocast), stored) == [], memory
    if not fraction_bits and not autocast:  # the inversion drifts
        for got, value in zip(step(chain, inputs, "invert")[1].values(), stored[1].values(), strict=True):
            torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Identity, nn.GELU, nn.LeakyReLU])
@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(2, 4), lambda: nn.InstanceNorm3d(4, affine=True)])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_of_channels_last_input(norm, activation, batch):
    """PyTorch's batch norm is wrong in its backward pass for some strides of a batch of one, and all strategies were."""
    torch.manual_seed(1)
    f, g = (nn.Sequential(norm(), activation(), nn.Conv3d(4, 4, 3, padding=1)) for _ in range(2))
    x = [torch.randn(batch, 4, 9, 7, 6).to(memory_format=torch.channels_last_3d) for _ in range(2)]
    found, expected = (step(Chain([AdditiveCoupling(f, g, None, tile)]), x, "store") for tile in ((3,), None))
    for tiled, whole in zip(found, expected, strict=True):
        for name, value in whole.items():
            torch.testing.assert_close(tiled[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))


def test_the_inverse_is_exact():
    block = in_tiles(couplings(1, lambda: norm_act_conv(3, 4, 4)), "auto")[0]
    check_round_trip(block, [round_to_grid(x, 14) for x in streams(2, 4, 5, 6, 9)], 0.0)


def test_float32_is_as_near_to_float64_as_the_whole():
    whole = shifted(couplings(4, lambda: norm_act_conv(3, 4, 4)))
    inputs = [3 + x for x in streams(1, 4, 8, 8, 16)]
    exact = step(copy.deepcopy(whole).double(), [x.double() for x in inputs])[1]

    def error(chain: nn.Module) -> float:
        found = step(chain, inputs, "invert")[1]
        return sum(((found[k] - exact[k]).norm() / exact[k].norm()).item() for k in exact)

    assert error(in_tiles(whole, (4,))) < 1.5 * error(whole)


def test_neither_outputs_nor_their_gradients_are_written_over():
    chain, inputs = in_tiles(couplings(2, lambda: norm_act_conv(3, 4, 4)), (4,)), streams(1, 4, 5, 6, 9)
    chain.memory = "invert"
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs, upstream = chain(*leaves), streams(1, 4, 5, 6, 9)
    before = [x.detach().clone() for x in (*leaves, *outputs, *upstream)]
    gradients = [torch.autograd.grad(outputs, leaves, upstream, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(torch.equal(x, y) for x, y in zip((*leaves, *outputs, *upstream), before, strict=True))


@pytest.mark.parametrize(("batch", "side"), [(1, 36), (2, 12)])
def test_working_memory_of_couplings_in_tiles(batch, side):
    """Peak in units of the state, 2 with its gradient; 4.0 at least without tiles (tests/test_memory.py)."""
    inner = couplings(3, lambda: norm_act_conv(3, 16, 16))
    sandwich = in_tiles(Chain([ChannelSplit(), *inner, ChannelMerge()], "invert"), "auto")
    x = torch.randn(batch, 32, side, side, 64)

    def run() -> None:
        sandwich(x.requires_grad_()).sum().backward()

    assert peak_live_bytes(run, sandwich.parameters()) <= 2.5 * x.nbytes


@pytest.mark.parametrize(
    ("shape", "n_slabs", "dim"),
    [
        ((1, 16, 64, 64, 64), 8, 4),  # slabs of the first dimension would be thin for the kernel
        ((1, 32, 64, 64, 64), 6, 2),
        ((1, 16, 96, 96, 96), 7, 2),
        ((2, 16, 64, 64, 64), 8, 2),
        ((1, 16, 128, 128, 128), 8, 2),
        ((1, 64, 16, 16, 16), 4, 4),
        ((1, 4, 3, 3, 3), 1, 4),
    ],
)
def test_automatic_slabs_have_no_slow_kernel(shape, n_slabs, dim):
    starts = _automatic_starts(shape, [1, 1, 1])
    assert [len(mine) for mine in starts] == [n_slabs if dim == 2 + i else 1 for i in range(3)]
    for outer, _, _ in _tiles(starts, shape, [1, 1, 1]) if dim == 2 else ():
        depth = outer[1].stop - outer[1].start
        assert shape[0] > 1 or shape[1] * depth * shape[3] > 20480


@pytest.mark.parametrize(
    ("name", "branch"),
    {
        "Dropout": nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.Dropout(0.5)),
        "BatchNorm3d": nn.Sequential(nn.BatchNorm3d(4), nn.Conv3d(4, 4, 3, padding=1)),
        "InstanceNorm3d": nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.InstanceNorm3d(4)),
        "Conv3d": nn.Sequential(nn.Conv3d(4, 4, 3)),
        "buffers": nn.Sequential(nn.InstanceNorm3d(4, track_running_stats=True), nn.Conv3d(4, 4, 3, padding=1)),
    }.items(),
)
def test_branches_that_are_not_local_are_refused(name, branch):
    with pytest.raises(ValueError, match=f"{name}.*give tile=None"):
        AdditiveCoupling(branch, norm_act_conv(3, 4, 4), tile=(4,))


def test_layers_stay_as_they_are_while_tiles_run():
    branch = norm_act_conv(3, 4, 4)
    conv, seen = branch[-1], set()
    conv.register_forward_pre_hook(lambda called, _: seen.add((called.padding, conv.padding)))
    chain = Chain([AdditiveCoupling(branch, nn.Identity(), tile=(4,))], memory="invert")
    sum(y.sum() for y in chain(*streams(1, 4, 5, 6, 12))).backward()
    assert seen == {((1, 1, 1), (1, 1, 1)), ((1, 1, 0), (1, 1, 1))}


def test_frozen_parameters_get_no_gradient():
    chain, inputs = in_tiles(couplings(1, lambda: norm_act_conv(3, 4, 4)), (4,)), streams(1, 4, 5, 6, 9)
    expected = step(chain, inputs, "invert")[1]
    chain[0].f[0].requires_grad_(False)
    chain[0].g[1].requires_grad_(False)
    for name, gradient in step(chain, inputs, "invert")[1].items():
        frozen = name.startswith(("0.f.0", "0.g.1"))
        assert gradient is None if frozen else torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("layer", [0, 1])
def test_changed_parameters_are_refused(layer):
    chain, inputs = in_tiles(couplings(1, lambda: norm_act_conv(3, 4, 4)), (4,)), streams(1, 4, 5, 6, 9)
    chain.memory = "invert"
    loss = sum(y.sum() for y in chain(*inputs))
    with torch.no_grad():
        next(chain[0].g[layer].parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


@pytest.mark.parametrize("memory", ["store", "invert"])
def test_metatensors_keep_their_affine(memory):
    chain = in_tiles(couplings(1, lambda: norm_act_conv(3, 4, 4)), (4,))
    chain.memory = memory
    outputs = chain(*(MetaTensor(x, affine=2 * torch.eye(4)) for x in streams(1, 4, 5, 6, 9)))
    assert all(isinstance(y, MetaTensor) and torch.equal(y.affine, 2 * torch.eye(4)) for y in outputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript is deprecated
def test_a_network_in_tiles():
    """Ownership of the streams across resampling, skips and heads; and TorchScript, which sees no tiles."""
    torch.manual_seed(0)
    network = FullyInvResUNet(3, 1, 2, channels=8, n_levels=2, n_couplings=2, tile=(4,))
    inputs = streams(2, 1, 8, 8, 12, n=1)
    stored = step(network, inputs, "store")
    for memory in ("invert", "checkpoint"):
        assert differing(step(network, inputs, memory), stored) == [], memory
    torch.testing.assert_close(torch.jit.script(network)(*inputs), stored[0]["output 0"], rtol=1e-3, atol=1e-3)
    whole = step(in_tiles(network, None), inputs, "store")
    for name, value in stored[1].items():
        torch.testing.assert_close(value, whole[1][name], rtol=2e-2, atol=1e-3, msg=name)


def test_a_convolution_that_sees_the_other_side_is_refused():
    convolution, x = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), torch.rand(1, 1, 16, 16)
    assert torch.equal(run_in_tiles(convolution, x, 1, (0,)), convolution(x))
    with pytest.raises(ValueError, match="circular"):
        run_in_tiles(convolution, x, 1, (4,))


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (nn.InstanceNorm2d(2), "InstanceNorm2d sees the whole image"),
        (nn.GroupNorm(1, 2), "GroupNorm sees the whole image"),
        (nn.BatchNorm2d(2), "BatchNorm2d in training sees the whole image"),
        (nn.MaxPool2d(2), "MaxPool2d changes the resolution"),
        (nn.Conv2d(2, 2, 2, stride=2), "Conv2d changes the resolution"),
        (nn.Upsample(scale_factor=2), "Upsample changes the resolution"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_that_a_tile_would_change_are_refused(layer, told):
    with pytest.raises(ValueError, match=told):
        run_in_tiles(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), layer), torch.rand(1, 2, 16, 16), 1, (8,))


def test_batch_norm_in_evaluation_is_local():
    module = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)).eval()
    x = torch.rand(1, 2, 16, 16)
    torch.testing.assert_close(run_in_tiles(module, x, 1, (8,)), module(x))


def test_metadata_go_through_tiles():
    module, x = network(), torch.rand(1, 2, 16, 16)
    meta = MetaTensor(x, affine=torch.diag(torch.tensor([2.0, 1, 1, 1])))
    for given in (meta, meta.clone().requires_grad_()):
        y = run_in_tiles(module, given, 3, (8,))
        assert isinstance(y, MetaTensor) and torch.equal(y.affine, meta.affine)
        torch.testing.assert_close(y.as_tensor(), module(x))
