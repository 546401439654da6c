"""What a simulation counts: tiles, and what convolutions take inside, beside real runs."""

from collections.abc import Callable, Iterator

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


@pytest.fixture
def use_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


SIZES = [(1, 4, 8, 3), (2, 8, 8, 3), (2, 1, 16, 3), (2, 24, 24, 3), (1, 16, 32, 3), (2, 64, 128, 3)]
SIZES += [(1, 6, 8, 3), (2, 6, 8, 3)]  # planes so small that each thread unfolds one of its own, given samples for them
SIZES += [(2, 8, 3, 1), (2, 24, 48, 1), (1, 32, 3, 1)]
STRIDED = [(2, 16, 32, 3, 2, False), (2, 32, 16, 3, 2, True), (2, 32, 16, 2, 2, True)]


CASES = [(threads, *sizes, 1, False) for threads in (1, 4) for sizes in SIZES]
CASES += [(2, 1, 12, 8, 3, 1, False), *[(threads, *case) for threads in (1, 2) for case in STRIDED]]


@pytest.mark.parametrize(
    ("dtype", "threads", "batch", "n_in", "n_out", "width", "stride", "transposed"),
    [
        *[(dtype, *case) for dtype in (torch.float32, torch.bfloat16) for case in CASES],
        (torch.float32, 2, 2, 32, 3, 3, 2, True),
    ],
)
def test_what_a_convolution_takes_inside(use_threads, dtype, threads, batch, n_in, n_out, width, stride, transposed):
    use_threads(threads)
    side = {6: 12, 64: 8}.get(n_in, 24 // stride if transposed else 24)
    x = torch.randn(batch, n_in, side, side, side).to(dtype)
    weight = torch.randn(*((n_in, n_out) if transposed else (n_out, n_in)), width, width, width).to(dtype)
    extra = [stride - 1 if transposed and width == 3 else 0] * 3
    require_foretold(x, weight, [stride] * 3, [(width - 1) // 2] * 3, [1] * 3, transposed, extra, 1)


def require_foretold(x: torch.Tensor, weight: torch.Tensor, *more: object) -> None:
    forward = x, weight, None, *more
    y = ATEN.convolution(*forward)
    backward = y, *forward, [True, True, False]
    for function, arguments, result, late in (
        (ATEN.convolution.default, forward, y.nbytes, 0),
        (ATEN.convolution_backward.default, backward, x.nbytes, weight.nbytes),
    ):
        peak = peak_live_bytes(lambda function=function, arguments=arguments: function(*arguments))
        assert result + max(bytes_inside(function, arguments, y), late) == pytest.approx(peak, rel=0.05), function


LAYOUTS = [(1, 16, 16, 1, 0, True), (1, 8, 8, 3, 1, True), (1, 16, 32, 2, 0, True)]  # which PyTorch unfolds by itself
if torch.backends.cpu.get_cpu_capability() == "AVX2":  # whose kernels are others
    LAYOUTS += [(2, 16, 32, 3, 1, True), (2, 3, 16, 3, 1, True)]
    LAYOUTS += [(2, 8, 8, 3, 0, False), (2, 6, 50, 3, 0, False), (2, 3, 8, 3, 0, False)]


@pytest.mark.parametrize(("batch", "n_in", "n_out", "width", "padding", "channels_last"), LAYOUTS)
def test_what_a_convolution_takes_of_channels_last_input_and_without_padding(
    use_threads, batch, n_in, n_out, width, padding, channels_last
):
    use_threads(1)
    x, weight = torch.randn(batch, n_in, 24, 24, 24), torch.randn(n_out, n_in, *[width] * 3)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    require_foretold(x, weight, [1] * 3, [padding] * 3, [1] * 3, False, [0] * 3, 1)


def test_inputs_of_two_types_are_cast():
    def make():
        x, y = torch.ones(100_000), torch.ones(100_000, dtype=torch.bfloat16)
        return (lambda: (x * y, ATEN.leaky_relu_backward(x, y, 0.01, True), x.add_(y))[0]), []

    assert dry_run(make).peak == pytest.approx(peak_live_bytes(*make()), rel=0.01)


def test_on_a_gpu_tensors_alone_are_counted():
    def make():
        x, y = torch.ones(1, 8, 20, 20, 20), torch.ones(1, 8, 20, 20, 20, dtype=torch.bfloat16)
        weight = torch.ones(8, 8, 3, 3, 3)
        return (lambda: (x * y, torch.conv3d(x, weight, padding=1))), []

    each = 8 * 20**3 * 4
    assert dry_run(make, "cuda").peak == 2 * each
    assert dry_run(make).peak > 3 * each


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
