"""Invertible down- and upsampling: exact both ways, orthogonal for good, the four checks."""

from contextlib import nullcontext

import pytest
import torch
from checks import (
    branch,
    check_flat_memory,
    check_gradients,
    check_parity,
    check_round_trip,
    differing,
    step,
    streams,
)
from monai.networks.utils import pixelunshuffle
from torch.utils._python_dispatch import TorchDispatchMode

from memnet import AdditiveCoupling, Chain, InvertibleDownsample, InvertibleUpsample, OrthogonalMixing, Tap
from memnet.grid import FRACTION_BITS, grid_step, round_to_grid
from memnet.resampling import squeeze, unsqueeze

SIZES = {1: (6,), 2: (6, 4), 3: (6, 4, 2)}


def perturb(module):
    """Move the mixings away from their start."""
    for child in module.modules():
        if isinstance(child, OrthogonalMixing):
            with torch.no_grad():
                child.vectors += 0.3 * torch.randn_like(child.vectors)
    return module


def pair(
    spatial_dims: int = 3, channels: int = 3, channels_down: int | None = 2, learned: bool = True, n: int = 1
) -> list:
    """Downsampling and its counterpart."""
    return [
        perturb(c(spatial_dims, channels, channels_down, learned, n))
        for c in (InvertibleDownsample, InvertibleUpsample)
    ]


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_squeeze_is_monais_pixelunshuffle(spatial_dims):
    (x,) = streams(2, 3, *SIZES[spatial_dims], n=1)
    assert torch.equal(squeeze(x, spatial_dims), pixelunshuffle(x, spatial_dims, 2))


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_unsqueeze_undoes_squeeze(spatial_dims):
    (x,) = streams(2, 3, *SIZES[spatial_dims], n=1)
    assert torch.equal(unsqueeze(squeeze(x, spatial_dims), spatial_dims), x)


def test_odd_sizes_are_refused():
    with pytest.raises(ValueError, match=r"even spatial sizes.*5"):
        squeeze(torch.zeros(1, 1, 4, 5), 2)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_mixing_starts_as_the_haar_transform(size):
    matrix = OrthogonalMixing(1, size).matrix()[0].abs()
    torch.testing.assert_close(matrix, torch.full((size, size), size**-0.5))
    means = OrthogonalMixing(1, size)(torch.ones(1, size, 1))[0, :, 0]
    torch.testing.assert_close(means.abs(), torch.tensor([size**0.5] + [0.0] * (size - 1)), atol=1e-6, rtol=1e-6)


def test_mixing_stays_orthogonal_in_training():
    mixing = OrthogonalMixing(4, 8)
    before = mixing.matrix().detach()
    optimizer = torch.optim.Adam(mixing.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        mixing(torch.randn(2, 32, 5)).relu().sum().backward()
        optimizer.step()
    matrix = mixing.matrix()
    assert (matrix - before).abs().max() > 0.1
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(8).expand(4, -1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_matrix_is_the_product_of_the_reflections(size):
    mixing = OrthogonalMixing(3, size)
    with torch.no_grad():
        mixing.vectors.copy_(torch.randn_like(mixing.vectors))
    expected = torch.eye(size, dtype=torch.float64).expand(3, -1, -1)
    for v in mixing.vectors.detach().double().unbind(1):
        reflection = torch.eye(size) - 2 * v[:, :, None] * v[:, None, :] / v.square().sum(1)[:, None, None]
        expected = expected @ reflection
    torch.testing.assert_close(mixing.matrix(), expected.float(), atol=1e-6, rtol=0)


def test_mixing_is_full_precision_under_autocast(device):
    mixing, (x,) = OrthogonalMixing(2, 4).to(device), streams(1, 8, 5, n=1, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        mixed = mixing(x)
    assert torch.equal(mixed, mixing(x))


class _Products(TorchDispatchMode):
    """Notes in which precision a GPU and oneDNN may take each product."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.bmm.default:
            torch.backends.cuda.matmul.allow_tf32  # noqa: B018
            self.found.add((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return function(*arguments, **(keywords or {}))


@pytest.fixture
def precision():
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_mixing_is_full_precision_where_lower_ones_are_allowed(allowed, precision):
    precision(allowed)
    mixing, x = OrthogonalMixing(3, 8), torch.randn(2, 24, 5)
    with _Products() as products:  # whose look at the older setting fails where the newer ones disagree with it
        y = mixing(x)
        mixing.inverse(y.detach())
    assert products.found == {("ieee", "ieee")}
    assert torch.get_float32_matmul_precision() == allowed


def test_mixing_is_full_precision_where_the_newer_setting_lowers_it(precision):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    mixing, x = OrthogonalMixing(3, 8), torch.randn(2, 24, 5)
    found = []
    original = OrthogonalMixing.multiply

    class Seen(OrthogonalMixing):
        def multiply(self, x, transposed):
            found.append(torch.backends.cuda.matmul.fp32_precision)
            return original(self, x, transposed)

    mixing.__class__ = Seen
    mixing(x)
    assert found == ["ieee"] and torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("channels_down", [None, 1, 2])
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_round_trip(spatial_dims, channels_down, learned, dtype, tolerance):
    down, up = (block.to(dtype) for block in pair(spatial_dims, 3, channels_down, learned, n=2))
    inputs = [round_to_grid(x, 16) for x in streams(2, 3, *SIZES[spatial_dims], dtype=dtype)]
    tolerance = tolerance if learned else 0.0
    check_round_trip(down, inputs, tolerance)
    with torch.no_grad():
        coarse = down(*inputs)
    check_round_trip(down, coarse, tolerance, there=False)
    check_round_trip(up, coarse, tolerance)
    check_round_trip(up, inputs, tolerance, there=False)


def test_skip_is_the_rest_of_the_channels():
    (down, _), (x,) = pair(2, 5, 2, learned=False), streams(1, 5, 4, 4, n=1)
    coarse, skip = down(x)
    assert coarse.shape == (1, 8, 2, 2)
    assert torch.equal(skip, x[:, 2:])


@pytest.mark.parametrize("memory", ["store", "invert"])
def test_gradients_are_right(memory):
    check_gradients(Chain(pair(1, 3, 2), memory), streams(1, 3, 4, n=1))


@pytest.mark.parametrize("channels_down", [None, 2])
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_parity_with_store(spatial_dims, channels_down, device):
    down, up = pair(spatial_dims, 3, channels_down, n=2)
    width = (channels_down or 3) * 2**spatial_dims
    chain = Chain(
        [
            AdditiveCoupling(branch(3, spatial_dims), branch(3, spatial_dims)),
            down,
            AdditiveCoupling(branch(width, spatial_dims), branch(width, spatial_dims)),
            up,
            AdditiveCoupling(branch(3, spatial_dims), branch(3, spatial_dims)),
        ]
    ).to(device)
    for autocast in (None, torch.bfloat16):
        check_parity(chain, streams(2, 3, *SIZES[spatial_dims], device=device), autocast)


def test_parity_of_a_bare_shuffle():
    check_parity(
        Chain([AdditiveCoupling(branch(3, 2), branch(3, 2)), *pair(2, 3, 2, learned=False, n=2)]), streams(1, 3, 4, 4)
    )


def test_inversion_stays_bit_exact_through_32_resamplings():
    chain, inputs = Chain([block for _ in range(16) for block in pair(2, 3, 3, n=2)]), streams(1, 3, 8, 8)
    assert differing(step(chain, inputs, "invert"), step(chain, inputs, "store")) == []


def test_memory_of_shuffles_is_flat_in_depth():
    check_flat_memory(lambda: Chain([_coupling(), *pair(1, 8, 8, learned=False, n=2)]), streams(1, 8, 2000))


def test_memory_of_learned_resampling_grows_by_a_byte_a_value():
    inputs = streams(1, 8, 2000)
    values = sum(x.numel() for x in inputs)
    check_flat_memory(lambda: Chain([_coupling(), *pair(1, 8, 8, n=2)]), inputs, per_block=2 * values)


def test_memory_of_a_skip_does_not_hold_the_whole_stream():
    x = torch.randn(1, 8, 2000)
    down, _ = pair(1, 8, 1, learned=False)
    skip = down(x)[1]
    assert skip.untyped_storage().nbytes() == skip.nbytes


def _coupling():
    return AdditiveCoupling(branch(8), branch(8))


def test_tap_appends_copies_that_can_be_read_at_the_end():
    chain = Chain([Tap(2), AdditiveCoupling(branch(), branch())])
    inputs = streams()
    outputs = chain(*inputs)
    assert len(outputs) == 4
    assert all(torch.equal(tap, round_to_grid(x, FRACTION_BITS)) for tap, x in zip(outputs[2:], inputs, strict=True))
    check_parity(chain, inputs)


@pytest.mark.parametrize(("spatial_dims", "channels_down", "said"), [(4, 1, "got 4"), (2, 0, "got 0"), (2, 4, "got 4")])
def test_unusable_arguments_are_refused(spatial_dims, channels_down, said):
    with pytest.raises(ValueError, match=said):
        InvertibleDownsample(spatial_dims, 3, channels_down)


@pytest.mark.parametrize(("steps", "fits"), [(120, True), (136, False)])
def test_inverse_too_far_off_for_the_residual_falls_back_to_checkpoints(monkeypatch, steps, fits):
    chain = Chain([perturb(InvertibleDownsample(1, 3)), InvertibleUpsample(1, 3)])
    inputs = [torch.ones(1, 3, 4)]
    stored = step(chain, inputs, "store")
    inverse = OrthogonalMixing.inverse
    off = steps * grid_step(torch.float32, FRACTION_BITS)
    monkeypatch.setattr(OrthogonalMixing, "inverse", lambda self, y: inverse(self, y).add(off))
    with nullcontext() if fits else pytest.warns(UserWarning, match="too large to be resampled with fraction_bits=14"):
        assert differing(step(chain, inputs, "invert"), stored) == []


def test_streams_out_of_range_fall_back_to_checkpoints():
    chain = Chain([perturb(InvertibleDownsample(1, 3))])
    inputs = [torch.full((1, 3, 4), 1e6)]
    stored = step(chain, inputs, "store")
    with pytest.warns(UserWarning, match="left the range"):
        assert differing(step(chain, inputs, "invert"), stored) == []


@pytest.mark.parametrize("n_levels", [1, 3])
def test_looks_at_the_range_once_a_chain(monkeypatch, n_levels):
    """A GPU stands still for every look at a value."""
    looks = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        look = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, look=look, name=name: looks.append(name) or look(x))
    blocks = [InvertibleDownsample(1, 4 * 2**i, n_streams=2) for i in range(n_levels)]
    chain = Chain([*blocks, AdditiveCoupling(*[branch(4 * 2**n_levels, 1) for _ in range(2)])], "invert")
    chain(*[torch.ones(1, 4, 16, requires_grad=True) for _ in range(2)])
    assert looks == ["tolist"]


def test_a_batch_of_none_is_resampled():
    assert InvertibleDownsample(2, 4)(torch.zeros(0, 4, 8, 8)).shape == (0, 16, 4, 4)
