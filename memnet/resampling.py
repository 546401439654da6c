"""Invertible down- and upsampling: pixel shuffles with an optional learned orthogonal mixing of each cube of voxels."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from memnet.grid import FRACTION_BITS, as_stream, check_fraction_bits, grid_step, magnitude, round_to_grid
from memnet.invertible import Invertible, Recorded
from memnet.recompute import Gradients, Replay, accumulate, replay_with_grad

__all__ = ["InvertibleDownsample", "InvertibleUpsample", "OrthogonalMixing", "Tap", "squeeze", "unsqueeze"]


def squeeze(x: torch.Tensor, spatial_dims: int) -> torch.Tensor:
    """Rearrange each cube of ``2^spatial_dims`` voxels into channels: ``(B, C, 2 D, ...)`` to ``(B, C * 2^d, D, ...)``.

    Scriptable, otherwise as MONAI's ``pixelunshuffle`` with a factor of 2.

    Raises:
        ValueError: a spatial size is odd.
    """
    split: list[int] = [x.shape[0], x.shape[1]]
    joined: list[int] = [x.shape[0], x.shape[1] << spatial_dims]
    order: list[int] = [0, 1]
    for i in range(spatial_dims):
        if x.shape[2 + i] % 2 != 0:
            raise ValueError(f"squeeze needs even spatial sizes, got {x.shape[2:]}")
        split += [x.shape[2 + i] // 2, 2]
        joined += [x.shape[2 + i] // 2]
        order += [3 + 2 * i]
    for i in range(spatial_dims):
        order += [2 + 2 * i]
    return x.reshape(split).permute(order).reshape(joined)


def unsqueeze(x: torch.Tensor, spatial_dims: int) -> torch.Tensor:
    """Invert :func:`squeeze`: ``(B, C * 2^d, D, ...)`` to ``(B, C, 2 D, ...)``."""
    channels = x.shape[1] >> spatial_dims
    split: list[int] = [x.shape[0], channels]
    joined: list[int] = [x.shape[0], channels]
    order: list[int] = [0, 1]
    for i in range(spatial_dims):
        split += [2]
        joined += [x.shape[2 + i] * 2]
        order += [2 + spatial_dims + i, 2 + i]
    for i in range(spatial_dims):
        split += [x.shape[2 + i]]
    return x.reshape(split).permute(order).reshape(joined)


class OrthogonalMixing(nn.Module):
    r"""Learned orthogonal matrix for each channel's group of ``n`` values, a product of Householder reflections.

    .. math:: Q = \prod_{i=1}^{n-1} \left(I - 2 \frac{v_i v_i^T}{v_i^T v_i}\right)

    Orthogonal whatever the vectors, so it stays so in training. It starts as the Haar transform: averages and differences,
    up to signs.

    Args:
        channels: number of groups, each with its own matrix.
        size: ``n``, a power of two.
        transposed: multiply by the transpose, that is start as the inverse Haar transform.

    References:
        iUNets: learnable invertible up- and downsampling (Etmann et al., 2020), https://arxiv.org/abs/2005.05220
    """

    def __init__(self, channels: int, size: int, transposed: bool = False) -> None:
        super().__init__()
        # On the CPU even under another default device, the meta device has no QR.
        exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], **exact) / math.sqrt(2.0)
        haar = torch.ones(1, 1, **exact)
        for _ in range(size.bit_length() - 1):
            haar = torch.kron(step, haar)
        reflections, _ = torch.geqrf(haar)  # LAPACK's QR: the Householder vectors stand below the diagonal
        vectors = (reflections.tril(-1) + torch.eye(size, **exact)).T[: size - 1]
        # Reversed, for the transpose of QR's Q: its rows, not its columns, are the Haar transform's up to signs.
        vectors = vectors.flip(0)
        vectors = vectors.to(torch.get_default_device(), torch.float32)
        self.vectors = nn.Parameter(vectors.repeat(channels, 1, 1))
        self.transposed = transposed

    def matrix(self) -> torch.Tensor:
        r"""Return ``Q``, of shape ``(channels, n, n)``, computed in float64.

        All reflections at once: :math:`Q = I - 2 V^T (I + N)^{-1} V` with the unit vectors as rows of :math:`V` and :math:`N`
        twice the part of :math:`V V^T` above the diagonal, some power of which is zero, so that
        :math:`(I + N)^{-1} = (I - N)(I + N^2)(I + N^4) \cdots`.
        """
        v = self.vectors.double()
        v = v * (v * v).sum(2, keepdim=True).rsqrt()
        power = 2.0 * torch.triu(v @ v.transpose(1, 2), 1)
        one = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
        inverse = one - power
        n = 2
        while n < v.shape[1]:
            power = power @ power
            inverse = inverse @ (one + power)
            n *= 2
        q = torch.eye(v.shape[2], dtype=v.dtype, device=v.device) - 2.0 * v.transpose(1, 2) @ inverse @ v
        return q.to(self.vectors.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply each group of channels by ``Q``: ``(B, channels * n, ...)`` to the same shape, in x's precision."""
        if torch.jit.is_scripting():
            return self.multiply(x, self.transposed)
        return self._multiply_precisely(x, self.transposed)

    @torch.jit.unused
    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by the inverse, which is the transpose."""
        return self._multiply_precisely(x, not self.transposed)

    @torch.jit.unused
    def _multiply_precisely(self, x: torch.Tensor, transposed: bool) -> torch.Tensor:
        # What the inverse misses must fit a byte: no bfloat16 of autocast, no TF32 of set_float32_matmul_precision("high").
        with torch.autocast(x.device.type, enabled=False), _float32_products():
            return self.multiply(x, transposed)

    @torch.jit.export
    def multiply(self, x: torch.Tensor, transposed: bool) -> torch.Tensor:
        """Multiply by ``Q`` or its transpose."""
        q = self.matrix().to(x.dtype)
        if transposed:
            q = q.transpose(1, 2)
        # contiguous, since the products' last bits depend on the strides, and an inverse must have the same
        n_others = x.numel() // max(1, x.shape[0] * q.shape[0] * q.shape[1])
        return (q @ x.contiguous().reshape(x.shape[0], q.shape[0], q.shape[1], n_others)).reshape(x.shape)


@contextmanager
def _float32_products() -> Iterator[None]:
    """Take float32 products in float32, whatever PyTorch was told to do with them.

    What ``torch.set_float32_matmul_precision`` has lowered is raised and lowered by it again, since PyTorch's own checks of that
    setting fail as long as it disagrees with the newer ones.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with ExitStack() as stack:
        told = _told_precision()
        if told is not None:
            stack.callback(torch.set_float32_matmul_precision, told)
            torch.set_float32_matmul_precision("highest")
        backends: list[Any] = [getattr(torch.backends, name).matmul for name in ("cuda", "mkldnn")]
        for backend in backends:
            if backend.fp32_precision not in ("ieee", "none"):
                stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = "ieee"
        yield


def _told_precision() -> str | None:
    """Return what ``torch.set_float32_matmul_precision`` lowered float32 products to, if it did."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer settings were used
        return None
    return None if precision == "highest" else precision


class _Resampling(Invertible):
    """What down- and upsampling share.

    Both change between a fine side (streams with the channels of their skips) and a coarse side (streams, then skips), and
    mix the coarse streams. The mixing is rounded to the grid; what its inverse misses then, a few grid steps, is kept.
    """

    __constants__ = ["downwards"]

    downwards: bool

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        channels_down: int | None = None,
        learned: bool = True,
        n_streams: int = 1,
        fraction_bits: int | None = FRACTION_BITS,
    ) -> None:
        super().__init__()
        channels_down = channels if channels_down is None else channels_down
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims}")
        if not 1 <= channels_down <= channels:
            raise ValueError(f"channels_down must be between 1 and channels={channels}, got {channels_down}")
        check_fraction_bits(fraction_bits)
        self.spatial_dims = spatial_dims
        self.channels = channels
        self.channels_down = channels_down
        self.n_streams = n_streams
        # A bare shuffle moves values and adds nothing: exact on any grid.
        self.fraction_bits = fraction_bits if learned else None
        self.exact = not learned or fraction_bits is not None
        self.renews = learned and n_streams > 1
        size = 2**spatial_dims
        mixings = [
            OrthogonalMixing(channels_down, size, not self.downwards) for _ in range(n_streams if learned else 0)
        ]
        self.mixings = nn.ModuleList(mixings)

    @torch.jit.export
    def split(self, state: list[torch.Tensor], fine: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Split the state of the fine or the coarse side into coarse streams and the rest, skips first.

        Takes each stream out of ``state``, so that it can go before the next one is copied.
        """
        c = self.channels_down
        coarse: list[torch.Tensor] = []
        skips: list[torch.Tensor] = []
        for _ in range(self.n_streams):
            x = as_stream(state.pop(0))
            coarse.append(squeeze(x[:, :c], self.spatial_dims) if fine else x)
            if fine and c < self.channels:
                # A copy, since a view (contiguous() makes one of a batch of 1) would keep the whole stream alive.
                skips.append(x[:, c:].clone())
        return coarse, skips + state

    @torch.jit.export
    def join(self, coarse: list[torch.Tensor], rest: list[torch.Tensor], fine: bool) -> list[torch.Tensor]:
        """Invert :meth:`split`, taking each stream and skip out of the lists."""
        if not fine:
            return coarse + rest
        streams: list[torch.Tensor] = []
        while len(coarse) > 0:
            x = unsqueeze(coarse.pop(0), self.spatial_dims)
            if self.channels_down < self.channels:
                x = torch.cat([x, as_stream(rest.pop(0))], 1)
            streams.append(x)
        return streams + rest

    @torch.jit.export
    def plain(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Resample the streams; see the class for the shapes."""
        coarse, rest = self.split(state, self.downwards)
        for i, mixing in enumerate(self.mixings):
            coarse[i] = self.on_grid(mixing(coarse[i]))
        return self.join(coarse, rest, not self.downwards)

    @torch.jit.export
    def on_grid(self, x: torch.Tensor) -> torch.Tensor:
        """Round to the block's grid."""
        bits = self.fraction_bits
        return x if bits is None else round_to_grid(x, bits)

    @torch.jit.unused
    def inverse(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Bring back the inputs, up to the rounding of the mixing."""
        coarse, rest = self.split(list(state), not self.downwards)
        for i, mixing in enumerate(self.mixings):
            coarse[i] = self.on_grid(mixing.inverse(coarse[i]))
        return tuple(self.join(coarse, rest, self.downwards))

    @torch.jit.unused
    def record(self, *state: torch.Tensor) -> Recorded:
        """See :meth:`memnet.Invertible.record`; keeps one byte a resampled value, the rounding error of the inverse."""
        coarse, rest = self.split(list(state), self.downwards)
        replays = [Replay(mixing) for mixing in self.mixings]
        kept, shares = [], []
        for i, (mixing, replay) in enumerate(zip(self.mixings, replays, strict=True)):
            before = coarse[i]
            coarse[i] = self.on_grid(*replay.first(before))
            if self.fraction_bits is not None:
                step = grid_step(before.dtype, self.fraction_bits)
                steps = _missed(before, mixing.inverse(coarse[i]), step)
                shares.append(magnitude(steps) / 127)
                kept.append(steps.to(torch.int8))
                del steps  # as large as a stream
        state = tuple(self.join(coarse, rest, not self.downwards))
        return Recorded(state, replays, tuple(kept), shares=tuple(shares))

    @torch.jit.unused
    def pull_back(
        self, recorded: Recorded, gradients: Sequence[torch.Tensor | None]
    ) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor | None], Gradients]:
        """See :meth:`memnet.Invertible.pull_back`."""
        state, replays, kept = list(recorded.state), recorded.replays, recorded.kept
        filled = [torch.zeros_like(x) if d is None else d for x, d in zip(state, gradients, strict=True)]
        del recorded, gradients
        coarse, rest = self.split(state, not self.downwards)
        d_coarse, d_rest = self.split(filled, not self.downwards)
        del state, filled
        parameter_gradients: Gradients = {}
        for i, (mixing, replay) in enumerate(zip(self.mixings, replays, strict=True)):
            coarse[i] = self.on_grid(mixing.inverse(coarse[i]))
            if self.fraction_bits is not None:
                coarse[i].add_(kept[i], alpha=grid_step(coarse[i].dtype, self.fraction_bits))
            _, pull = replay_with_grad([replay], [coarse[i]])
            (step,), more = pull([d_coarse[i]])
            d_coarse[i] = torch.zeros_like(coarse[i]) if step is None else step
            accumulate(parameter_gradients, more)
            del _, pull, step
        inputs = tuple(self.join(coarse, rest, self.downwards))
        return inputs, [*self.join(d_coarse, d_rest, self.downwards)], parameter_gradients


def _missed(x: torch.Tensor, inverted: torch.Tensor, step: float) -> torch.Tensor:
    """Return how many grid steps an inverse, whose memory is used up, is off once rounded."""
    return inverted.div_(step).round_().neg_().add_(x, alpha=1 / step)


class InvertibleDownsample(_Resampling):
    r"""Halve the resolution of a share of each stream's channels, the rest becomes a skip connection.

    .. math:: (x_1, .., x_n, ..) \mapsto (Q_1 S x_1^{[:c]}, .., Q_n S x_n^{[:c]},\; x_1^{[c:]}, .., x_n^{[c:]},\; ..)

    :math:`S` rearranges each cube of ``2^spatial_dims`` voxels into channels, :math:`Q_i` mixes them orthogonally (Haar at
    first, then learned), so that no information is lost and backpropagation can go back exactly: for the grid's rounding
    of :math:`Q_i` one byte a value is kept.

    Args:
        spatial_dims: 1, 2 or 3.
        channels: channels ``C`` of each stream.
        channels_down: channels ``c`` of each stream that go down; all where None, and then there is no skip.
        learned: mix by a learned orthogonal matrix; a bare pixel shuffle otherwise.
        n_streams: number ``n`` of streams, the first tensors of the state.
        fraction_bits: see :class:`memnet.AdditiveCoupling`.

    Raises:
        ValueError: an argument is out of range, or at run time a spatial size is odd.

    References:
        iUNets: learnable invertible up- and downsampling (Etmann et al., 2020), https://arxiv.org/abs/2005.05220
    """

    downwards = True


class InvertibleUpsample(_Resampling):
    """Double the resolution of each stream and join it with its skip: :class:`InvertibleDownsample` reversed.

    Args:
        spatial_dims: 1, 2 or 3.
        channels: channels ``C`` of each stream after joining.
        channels_down: channels ``c`` of each stream that come from below; all where None, and then there is no skip.
        learned: mix by a learned orthogonal matrix; a bare pixel shuffle otherwise.
        n_streams: number of streams, the first tensors of the state.
        fraction_bits: see :class:`memnet.AdditiveCoupling`.

    Raises:
        ValueError: an argument is out of range.
    """

    downwards = False


class Tap(Invertible):
    """Append copies of the first streams to the state, so that they can be read at the end of the chain.

    Args:
        n_streams: number of streams to copy.
    """

    def __init__(self, n_streams: int = 1) -> None:
        super().__init__()
        self.n_streams = n_streams

    @torch.jit.export
    def plain(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Map ``[x_1, .., x_n, *rest]`` to ``[x_1, .., x_n, *rest, x_1, .., x_n]``."""
        return state + [x.clone() for x in state[: self.n_streams]]

    @torch.jit.unused
    def inverse(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Drop the copies."""
        return state[: -self.n_streams]
