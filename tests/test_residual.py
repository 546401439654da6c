"""The four checks of the invertible residual block, and how its fixed-point inverse fails."""

import copy

import pytest
import torch
from checks import check_flat_memory, check_gradients, check_round_trip, differing, step, streams
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._pytree import tree_leaves

from memnet import (
    AdditiveCoupling,
    Chain,
    ChannelMerge,
    ChannelSplit,
    DriftError,
    InvertibleDownsample,
    InvertibleResidual,
)
from memnet.grid import round_to_grid


def contraction(channels: int = 3, gain: float = 0.5) -> nn.Sequential:
    """A branch whose Lipschitz constant is about the gain."""
    conv = nn.Conv1d(channels, channels, 3, padding=1)
    with torch.no_grad():
        conv.weight *= gain / conv.weight.abs().sum((1, 2), keepdim=True)
    return nn.Sequential(conv, nn.Tanh())


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_round_trip(dtype, tolerance, there):
    inputs = [round_to_grid(x, 16) for x in streams(n=1, dtype=dtype)]
    check_round_trip(InvertibleResidual(contraction()).to(dtype), inputs, tolerance, there)


def test_formula():
    block, (x,) = InvertibleResidual(contraction(), fraction_bits=None), streams(n=1)
    assert torch.equal(block(x), x + block.f(x))


@pytest.mark.parametrize("memory", ["store", "invert"])
def test_gradients_are_right(memory):
    chain = Chain([InvertibleResidual(contraction(2)) for _ in range(2)], memory)
    check_gradients(chain, streams(1, 2, 4, n=1))


def check_closeness(chain, inputs):
    """Assert parity with store, as near as the grid lets a fixed point come to the input."""
    stored = step(chain, inputs, "store")
    for memory in ("checkpoint", "recursive"):
        assert differing(step(chain, inputs, memory), stored) == []
    tolerance = 1e-3 if inputs[0].dtype == torch.float32 else 1e-10
    torch.testing.assert_close(step(chain, inputs, "invert"), stored, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parity_with_store(dtype, device):
    chain = Chain([InvertibleResidual(contraction()) for _ in range(4)]).to(device, dtype)
    check_closeness(chain, streams(n=1, device=device, dtype=dtype))


def test_parity_with_dropout():
    """The mask must hold through the whole iteration."""
    check_closeness(
        Chain([InvertibleResidual(nn.Sequential(contraction(), nn.Dropout(0.5))) for _ in range(2)]), streams(n=1)
    )


def test_parity_with_spectral_norm():
    """Power iterations move buffers in every forward pass of training: the inverse must use the forward pass's, once."""
    chain = Chain([InvertibleResidual(nn.Sequential(_Half(), spectral_norm(nn.Linear(5, 5)))) for _ in range(2)])
    twin, inputs = copy.deepcopy(chain), streams(n=1)
    stored, inverted = step(twin, inputs, "store"), step(chain, inputs, "invert")
    torch.testing.assert_close(inverted, stored, rtol=1e-3, atol=1e-3)
    for (name, a), b in zip(chain.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), name


class _Half(nn.Module):
    def forward(self, x):
        return x / 2


def test_memory_is_flat_in_depth(device):
    inputs = streams(1, 8, 4000, n=1, device=device)
    check_flat_memory(lambda: InvertibleResidual(contraction(8)), inputs)


def test_expansion_is_refused_with_how_far_it_got():
    block = InvertibleResidual(nn.Conv1d(3, 3, 1), max_iterations=20)
    nn.init.constant_(block.f.weight, 2.0)
    y = block(*streams(n=1)).detach()
    with pytest.raises(RuntimeError, match=r"after 20 .* off by \d\.\d\de[+-]\d+ .*not contractive enough"):
        block.inverse(y)


def test_expansion_is_refused_in_the_backward_pass():
    chain = Chain([InvertibleResidual(nn.Conv1d(3, 3, 1))], "invert")
    nn.init.constant_(chain[0].f.weight, 2.0)
    with pytest.raises(RuntimeError, match="not contractive enough"):
        chain(*streams(n=1)).sum().backward()


def test_slow_convergence_needs_more_iterations():
    (x,) = streams(n=1)
    slow = InvertibleResidual(nn.Conv1d(3, 3, 1, bias=False), max_iterations=5)
    with torch.no_grad():
        slow.f.weight.copy_(0.9 * torch.eye(3).unsqueeze(2))
    with pytest.raises(RuntimeError, match="after 5"):
        slow.inverse(slow(x))
    slow.max_iterations = 1000
    check_round_trip(slow, [x], 1e-3)


def test_tolerance_decides_what_is_accepted():
    (x,) = streams(n=1)
    block = InvertibleResidual(contraction(), tolerance=0.5, max_iterations=3)
    block.inverse(block(x))
    block.tolerance = 1e-6
    with pytest.raises(RuntimeError, match="tolerance 1e-06"):
        block.inverse(block(x))


def test_no_iterations_are_refused():
    with pytest.raises(ValueError, match="got 0"):
        InvertibleResidual(nn.Identity(), max_iterations=0)


def test_a_branch_in_place_leaves_its_input_alone():
    f = nn.Sequential(nn.ELU(inplace=True), nn.Conv1d(3, 3, 1))
    (x,) = streams(n=1)
    with torch.no_grad():
        torch.testing.assert_close(InvertibleResidual(f, fraction_bits=None)(x), x + f(x.clone()))
        with pytest.raises(RuntimeError, match="ReLU_ changes its input in place"):
            InvertibleResidual(ReLU_())(x)


class ReLU_(nn.Module):  # noqa: N801 (as PyTorch names what works in place)
    def forward(self, x):
        return x.relu_()


@pytest.mark.parametrize("fraction_bits", [4, 8, 10, 22])
def test_a_coarse_grid_is_within_the_tolerance(fraction_bits):
    torch.manual_seed(0)
    f = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Tanh())
    with torch.no_grad():
        f[0].weight.mul_(0.5)
    chain = Chain([InvertibleResidual(f, fraction_bits=fraction_bits) for _ in range(2)], "invert")
    chain(torch.rand(2, 4, 16, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("fraction_bits", [3, 23])
def test_a_grid_without_room_is_refused(fraction_bits):
    with pytest.raises(ValueError, match="between 4 and 22"):
        InvertibleResidual(nn.Identity(), fraction_bits=fraction_bits)
    with pytest.raises(ValueError, match="between 4 and 22"):
        InvertibleDownsample(1, 2, fraction_bits=fraction_bits)


def test_what_goes_along_with_the_state_comes_back(device):
    f = nn.Sequential(spectral_norm(nn.Conv1d(4, 4, 3, padding=1)), nn.Tanh())
    chain = Chain([InvertibleDownsample(1, 8, 2), InvertibleResidual(f), InvertibleResidual(copy.deepcopy(f))]).to(
        device
    )
    inputs = (torch.randn(2, 8, 16, device=device),)
    names = ("store", "invert")
    stored, inverted = (step(chain, inputs, memory) for memory in names)
    for a, b in zip(tree_leaves(stored), tree_leaves(inverted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def contractions_and_others():
    free = nn.Conv1d(4, 4, 3, padding=1)
    with torch.no_grad():
        free.weight.mul_(4)
    residual = InvertibleResidual(nn.Sequential(free, nn.Dropout(0.2)), max_iterations=5)
    coupling = AdditiveCoupling(nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 3, padding=1))
    return {
        "couplings": [ChannelSplit(), coupling, ChannelMerge(), residual],
        "nested": [Chain([residual])],
        "resampling": [InvertibleDownsample(1, 2, 2), residual],
    }


@pytest.mark.parametrize("kind", list(contractions_and_others()))
def test_any_chain_is_run_again_where_an_inverse_has_drifted(kind):
    torch.manual_seed(0)
    inputs = (torch.randn(2, 2 if kind == "resampling" else 4, 16),)
    chain = Chain(contractions_and_others()[kind], on_drift="rerun")
    with pytest.raises(DriftError):
        step(Chain(contractions_and_others()[kind]), inputs, "invert")
    assert differing(step(chain, inputs, "invert"), step(chain, inputs, "store")) == []
