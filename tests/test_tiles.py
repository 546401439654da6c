"""Tiles: the module's own numbers, in a fraction of the memory."""

import copy

import pytest
import torch
from torch import nn

from memnet.accounting.live_memory import peak_live_bytes
from memnet.tiles import _tiles, run_in_tiles


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
    parts = [tiled.module(x[outer])[place] for outer, _, place in _tiles(x.shape, 2, (6,))]
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
