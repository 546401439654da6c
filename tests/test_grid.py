"""The grid makes additions exact, and a step whose streams leave its range is made another way."""

import pytest
import torch
from checks import branch, couplings, differing, step, streams, with_branch
from torch import nn

from memnet import AdditiveCoupling, Chain
from memnet.grid import grid_step, round_to_grid, stream_limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fraction_bits", [4, 12, 16, 22])
def test_addition_on_the_grid_is_undone_exactly(dtype, fraction_bits):
    limit = stream_limit(fraction_bits) / 2
    x, step = (round_to_grid((2 * torch.rand(10000, dtype=dtype) - 1) * limit, fraction_bits) for _ in range(2))
    assert torch.equal((x + step) - step, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_to_the_nearest_multiple(dtype):
    x = torch.randn(1000, dtype=dtype)
    multiples = round_to_grid(x, 16) / grid_step(dtype, 16)
    assert torch.equal(multiples, multiples.round())
    assert (round_to_grid(x, 16) - x).abs().max() <= grid_step(dtype, 16) / 2


def test_rounding_leaves_its_input_and_passes_the_gradient():
    x = torch.randn(10, requires_grad=True)
    before = x.detach().clone()
    round_to_grid(x, 4).square().sum().backward()
    assert torch.equal(x, before)
    torch.testing.assert_close(x.grad, 2 * round_to_grid(before, 4))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_inversion_is_bit_exact_at_depth_128(autocast, device):
    chain, inputs = couplings(128).to(device), streams(device=device)
    stored = step(chain, inputs, "store", autocast)
    assert differing(step(chain, inputs, "invert", autocast), stored) == []


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_restored_activations_are_bit_exact_at_depth_128(autocast, device):
    chain, inputs, seen = couplings(128).to(device), streams(device=device), {"store": [], "invert": []}
    for block in chain:
        for part in (block.f, block.g):
            part.register_forward_pre_hook(lambda _, args: seen[chain.memory].append(args[0].detach().clone()))
    step(chain, inputs, "store", autocast)
    step(chain, inputs, "invert", autocast)
    stored, forward, backward = seen["store"], seen["invert"][:256], seen["invert"][256:]
    assert all(torch.equal(a, b) for a, b in zip(forward, stored, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(reversed(backward), stored, strict=True))


def test_without_the_grid_inversion_drifts(device):
    chain, inputs = couplings(128, fraction_bits=None).to(device), streams(device=device)
    stored, inverted = step(chain, inputs, "store"), step(chain, inputs, "invert")
    assert "input 0" in differing(inverted, stored)
    torch.testing.assert_close(inverted[1]["input 0"], stored[1]["input 0"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("value", [2000.0, float("inf"), float("nan")])
def test_step_out_of_range_is_that_of_the_other_strategies_and_warns(value):
    chain, inputs = couplings(4), streams()
    inputs[0][0, 0, 0] = value
    stored = step(chain, inputs, "store")
    with pytest.warns(
        UserWarning, match=r"(left the range \+-1024 of fraction_bits=14|stream is not finite); .* more memory"
    ):
        inverted = step(chain, inputs, "invert")
    for name, x in (stored[0] | stored[1]).items():
        assert torch.equal(x.nan_to_num(7), (inverted[0] | inverted[1])[name].nan_to_num(7)), name


def test_stream_that_leaves_the_range_half_way_is_noticed():
    grow = nn.Conv1d(3, 3, 1)
    nn.init.constant_(grow.bias, 1000.0)
    shrink = nn.Conv1d(3, 3, 1)
    nn.init.constant_(shrink.bias, -1000.0)
    quiet = [nn.Conv1d(3, 3, 1) for _ in range(2)]
    for conv in (grow, shrink, *quiet):
        nn.init.zeros_(conv.weight)
    couplings = [AdditiveCoupling(grow, quiet[0], 16), AdditiveCoupling(shrink, quiet[1], 16)]
    with pytest.warns(UserWarning, match="left the range"):
        Chain(couplings, "invert")(*streams())


@pytest.mark.filterwarnings("ignore:a residual stream left the range")
def test_step_out_of_range_moves_statistics_and_random_state_once():
    seen = {}
    for memory in ("store", "invert"):
        torch.manual_seed(0)
        chain = with_branch(nn.BatchNorm1d(3), nn.Dropout(0.5))
        outputs = step(chain, [2000 * x for x in streams()], memory)
        seen[memory] = outputs, torch.get_rng_state(), dict(chain.named_buffers())
    assert differing(seen["invert"][0], seen["store"][0]) == []
    assert torch.equal(seen["invert"][1], seen["store"][1])
    assert all(torch.equal(buffer, seen["store"][2][name]) for name, buffer in seen["invert"][2].items())


def test_default_grid_holds_the_streams_of_a_long_training():
    # an input 10 standard deviations bright grew to 300 within two epochs of the hippocampus benchmark
    chain = Chain([AdditiveCoupling(branch(), branch()) for _ in range(2)])
    inputs = [1000 * x / x.abs().max() for x in streams()]
    assert differing(step(chain, inputs, "invert"), step(chain, inputs, "store")) == []


def test_coarser_grid_holds_larger_streams():
    chain, inputs = couplings(2, fraction_bits=12), [200 * x for x in streams()]
    assert differing(step(chain, inputs, "invert"), step(chain, inputs, "store")) == []


def test_blocks_must_share_a_grid():
    with pytest.raises(ValueError, match=r"\[12, 14\]"):
        Chain([*couplings(1, fraction_bits=12), *couplings(1)])
