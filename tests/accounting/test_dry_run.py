"""What a simulation counts: tiles, and what convolutions take inside, beside real runs."""

import pytest
import torch
from checks import couplings

from memnet import AdditiveCoupling, Chain, ChannelMerge, ChannelSplit
from memnet.accounting.convolution_memory import bytes_inside
from memnet.accounting.dry_run import dry_run
from memnet.accounting.live_memory import peak_live_bytes
from memnet.nets.segmentation import norm_act_conv

ATEN = torch.ops.aten


@pytest.mark.parametrize(("batch", "side", "memory"), [(1, 36, "invert"), (2, 12, "invert"), (2, 12, "store")])
def test_couplings_in_tiles_are_foretold(batch, side, memory):
    def make():
        chain = Chain([ChannelSplit(), *couplings(2, lambda: norm_act_conv(3, 16, 16)), ChannelMerge()], memory)
        for module in chain.modules():
            if isinstance(module, AdditiveCoupling):
                module.tile = "auto"
        x = torch.randn(batch, 32, side, side, 32, requires_grad=True)
        return (lambda: chain(x).sum().backward()), list(chain.parameters())

    assert dry_run(make).peak == pytest.approx(peak_live_bytes(*make()), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "n_in", "n_out", "width"),
    [(1, 4, 8, 3), (2, 8, 8, 3), (2, 24, 24, 3), (1, 16, 32, 3), (2, 8, 3, 1), (2, 24, 48, 1), (1, 32, 3, 1)],
)
def test_what_a_convolution_takes_inside(dtype, batch, n_in, n_out, width):
    x = torch.randn(batch, n_in, 24, 24, 24).to(dtype)
    weight = torch.randn(n_out, n_in, width, width, width).to(dtype)
    more = None, [1] * 3, [width // 2] * 3, [1] * 3, False, [0] * 3, 1
    forward = x, weight, *more
    y = ATEN.convolution(*forward)
    backward = y, *forward[:2], *more, [True, True, False]
    for function, arguments, results in (
        (ATEN.convolution.default, forward, y.nbytes),
        (ATEN.convolution_backward.default, backward, x.nbytes + weight.nbytes),
    ):
        peak = peak_live_bytes(lambda function=function, arguments=arguments: function(*arguments))
        assert results + bytes_inside(function, arguments, y) == pytest.approx(peak, rel=0.05), function


def test_the_dead_are_buried_before_they_count():
    """Many small operations between large ones that follow one another in the same memory."""

    def make():
        def run():
            for _ in range(5):
                large = torch.ones(1_000_000)
                for _ in range(20):
                    large[:1000] += torch.ones(1000)
                del large

        return run, []

    assert 4_000_000 <= dry_run(make).peak <= 1.01 * 4_000_000
