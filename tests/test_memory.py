"""The proof by live bytes: with ``invert`` the peak of forward and backward does not grow with depth."""

import os
import subprocess
import sys

import pytest
import torch
from checks import couplings, peak, streams
from torch import nn

from memnet import Chain, ChannelMerge, ChannelSplit
from memnet.accounting.live_memory import _Allocation, _peak_of_totals, peak_live_bytes
from memnet.nets.segmentation import norm_act_conv


def test_peak_counts_what_is_alive_at_once(device):
    def run():
        a = torch.zeros(1024, device=device)
        b = torch.zeros(2048, device=device)
        del a
        c = torch.zeros(512, device=device)
        del b
        return c

    assert peak_live_bytes(run, device=device.type) == 4 * (1024 + 2048)


def test_peak_ignores_what_was_alive_before():
    before = [torch.zeros(4096)]

    def run():
        before.clear()
        torch.zeros(1024)

    assert peak_live_bytes(run) == 4 * 1024


def test_peak_counts_results():
    assert peak_live_bytes(lambda: [torch.zeros(256) for _ in range(3)]) == 3 * 4 * 256


def test_measuring_says_nothing():
    script = "import torch, memnet.accounting.live_memory as m; m.peak_live_bytes(lambda: torch.ones(3))"
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, env=environment, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_peak_leaves_out_parameter_gradients_alone():
    weight, x = nn.Parameter(torch.ones(1024)), torch.ones(1024)

    def run():
        product = weight * x
        product.sum().backward()
        return product

    assert peak_live_bytes(run) - peak_live_bytes(run, [weight]) == 0  # there already
    weight.grad = None
    counted = peak_live_bytes(run)
    weight.grad = None
    assert counted - peak_live_bytes(run, [weight]) == 4096


def test_peak_where_the_end_of_an_allocation_is_not_told():
    """A profile leaves out what a GPU frees between operations; what its allocator has given out says it all the same."""
    events = [
        _Allocation(address=1, size=400, total=1400),
        _Allocation(address=2, size=300, total=1700),
        # address 1 is freed
        _Allocation(address=3, size=200, total=1500),
        _Allocation(address=4, size=500, total=2000),
        _Allocation(address=3, size=-200, total=1800),
        _Allocation(address=1, size=100, total=1900),
    ]
    assert _peak_of_totals(events, set(), before=1000) == 1000
    assert _peak_of_totals(events, {4}, before=1000) == 700
    assert _peak_of_totals(events, {1}, before=1000) == 1000, "an address counts from its latest allocation on"
    assert _peak_of_totals(events[:1], {1}, before=1000) == 0
    assert _peak_of_totals([], set(), before=1000) == 0


def _branch(channels=8):
    norm = nn.InstanceNorm3d(channels, affine=True)
    return nn.Sequential(norm, nn.LeakyReLU(inplace=True), nn.Conv3d(channels, channels, 3, padding=1, bias=False))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_peak_does_not_grow_with_depth(autocast, device):
    """The bound of the design: depth 32 within 1.02 of depth 2."""
    inputs, peaks = streams(1, 8, 24, 24, 24, device=device), {}
    for memory, n_blocks in (("invert", 2), ("invert", 32), ("store", 2), ("store", 8)):
        chain = couplings(n_blocks, _branch).to(device)
        chain.memory = memory
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            peaks[memory, n_blocks] = peak(chain, inputs)
    assert peaks["invert", 32] <= 1.02 * peaks["invert", 2], peaks
    assert peaks["store", 8] > 1.5 * peaks["store", 2], peaks


def test_order_of_the_strategies():
    """Peaks of 64 light blocks: store, checkpoint, recursive, invert, each clearly below the one before."""
    chain, inputs, peaks = couplings(64, lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.Tanh())), streams(1, 4, 5000), []
    for memory in ("store", "checkpoint", "recursive", "invert"):
        chain.memory = memory
        peaks.append(peak(chain, inputs) / inputs[0].nbytes / 2)
    assert all(after < 0.8 * before for before, after in zip(peaks, peaks[1:], strict=False)), peaks
    # The input, the state and its gradient, and what one branch needs; 5 if autograd's engine held the output's gradient.
    assert peaks[-1] <= 1.03 * 4, peaks


@pytest.mark.parametrize("norm", [nn.GroupNorm, nn.InstanceNorm3d, nn.BatchNorm3d])
def test_a_plain_branch_keeps_one_activation(norm):
    """Peak in units of the state, 2 with its gradient: half of one each for the activation, its gradient, and two copies of
    the library's; without the leaky ReLU in its input's memory, another half."""

    def make():
        normalization = norm(4, 16) if norm is nn.GroupNorm else norm(16)
        return nn.Sequential(normalization, nn.LeakyReLU(), nn.Conv3d(16, 16, 3, padding=1))

    inner, x = couplings(2, make), torch.randn(2, 32, 16, 16, 16)
    sandwich = Chain([ChannelSplit(), *inner, ChannelMerge()], "invert")

    def run() -> None:
        sandwich(x.requires_grad_()).sum().backward()

    assert peak_live_bytes(run, sandwich.parameters()) <= 4.2 * x.nbytes


def test_splitting_and_merging_move_gradients_without_scattering_them():
    x, chain = torch.randn(1, 8, 50000), Chain([ChannelSplit(), ChannelMerge()] * 3, "invert")

    def run() -> None:
        chain(x.requires_grad_()).sum().backward()

    # the state, its gradient, and both anew in the other layout, one after the other
    assert peak_live_bytes(run) <= 3.05 * x.nbytes


def test_the_networks_branch_keeps_one_activation():
    """Peak in units of the state: half of one each for a branch's activation, its gradient, and what the library copies."""
    chain, inputs = couplings(2, lambda: norm_act_conv(3, 16, 16)), streams(2, 16, 16, 16, 16)
    chain.memory = "invert"
    assert peak(chain, inputs) <= 1.03 * 5.03 * 2 * inputs[0].nbytes
