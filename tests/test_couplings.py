"""The four checks of the additive coupling, and of splitting and merging channels."""

import pytest
import torch
from checks import (
    MEMORIES,
    branch,
    check_flat_memory,
    check_gradients,
    check_parity,
    check_round_trip,
    couplings,
    streams,
)
from torch import nn

from memnet import AdditiveCoupling, Chain, ChannelMerge, ChannelSplit
from memnet.grid import round_to_grid


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_exact_on_the_grid(dtype, there):
    block = AdditiveCoupling(branch(), branch()).to(dtype)
    check_round_trip(block, [round_to_grid(x, 16) for x in streams(dtype=dtype)], 0.0, there)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_round_trip_without_the_grid(dtype, tolerance):
    check_round_trip(AdditiveCoupling(branch(), branch(), None).to(dtype), streams(dtype=dtype), tolerance)


def test_formula():
    f, g = nn.Conv1d(3, 3, 1), nn.Conv1d(3, 3, 1)
    x1, x2 = streams()
    y1, y2 = AdditiveCoupling(f, g, None)(x1, x2)
    torch.testing.assert_close(y1, x1 + f(x2))
    torch.testing.assert_close(y2, x2 + g(y1))


@pytest.mark.parametrize("memory", ["store", "invert"])
def test_gradients_are_right(memory):
    chain = couplings(2, lambda: nn.Sequential(nn.Conv1d(2, 2, 3, padding=1), nn.Tanh()))
    chain.memory = memory
    check_gradients(chain, streams(1, 2, 4))


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_parity_with_store(spatial_dims, device):
    chain = couplings(3, lambda: branch(3, spatial_dims)).to(device)
    check_parity(chain, streams(2, 3, *(5, 4, 3)[:spatial_dims], device=device))


def test_memory_is_flat_in_depth(device):
    check_flat_memory(lambda: AdditiveCoupling(branch(8), branch(8)), streams(1, 8, 20000, device=device))


@pytest.mark.parametrize("fraction_bits", [3, 23])
def test_unusable_grid_is_refused(fraction_bits):
    with pytest.raises(ValueError, match=f"got {fraction_bits}"):
        AdditiveCoupling(branch(), branch(), fraction_bits)


@pytest.mark.parametrize("first", [None, 1])
def test_split_and_merge_are_inverse(first):
    split, merge = ChannelSplit(first), ChannelMerge(first)
    (x,) = streams(2, 5, 4, n=1)
    assert [y.shape[1] for y in split(x)] == ([2, 3] if first is None else [1, 4])
    assert torch.equal(merge(*split(x)), x)
    assert torch.equal(split.inverse(*split(x))[0], x)
    check_round_trip(merge, split(x), 0.0)


def test_parity_with_split_and_merge():
    chain = Chain([ChannelSplit(), AdditiveCoupling(branch(2), branch(2)), ChannelMerge()])
    check_parity(chain, streams(2, 4, 5, n=1))


def test_memory_of_split_and_merge_is_flat_in_depth():
    def block():
        return Chain([ChannelSplit(), AdditiveCoupling(branch(4), branch(4)), ChannelMerge()])

    check_flat_memory(block, streams(1, 8, 20000, n=1))


@pytest.mark.parametrize("memory", ["store", *MEMORIES])
def test_one_stream_is_told_how_to_become_two(memory):
    chain = couplings(2)
    chain.memory = memory
    with pytest.raises(ValueError, match="needs two streams.*ChannelSplit"):
        chain(torch.rand(1, 3, 5))
    with pytest.raises(TypeError, match="state is tensors, got Tensor, NoneType"):
        chain(torch.rand(1, 3, 5), None)
