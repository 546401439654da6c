"""Invertible down- and upsampling: pixel shuffles with an optional learned orthogonal mixing of each cube of voxels."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from memnet.grid import FRACTION_BITS, as_stream, grid_step, round_to_grid
from memnet.invertible import Invertible, Recorded

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

    Orthogonal whatever the vectors, so it stays so in training. It starts as the Haar transform: averages and differences.

    Args:
        channels: number of groups, each with its own matrix.
        size: ``n``, a power of two.

    References:
        iUNets: learnable invertible up- and downsampling (Etmann et al., 2020), https://arxiv.org/abs/2005.05220
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        haar = torch.ones(1, 1, dtype=torch.float64)
        for _ in range(int(math.log2(size))):
            haar = torch.cat([torch.kron(haar, torch.tensor([[1.0, s]]).double()) for s in (1.0, -1.0)]) / math.sqrt(
                2.0
            )
        reflections, _ = torch.geqrf(haar)  # LAPACK's QR: the Householder vectors stand below the diagonal
        vectors = (reflections.tril(-1) + torch.eye(size, dtype=torch.float64)).T[: size - 1]
        self.vectors = nn.Parameter(vectors.float().repeat(channels, 1, 1))

    def matrix(self) -> torch.Tensor:
        """Return ``Q``, of shape ``(channels, n, n)``."""
        v = self.vectors
        q = torch.eye(v.shape[2], dtype=v.dtype, device=v.device).expand(v.shape[0], -1, -1)
        for i in range(v.shape[1]):
            w = v[:, i, :].unsqueeze(2)
            q = q - (q @ w) @ (2.0 * w / (w * w).sum(1, keepdim=True)).transpose(1, 2)
        return q

    def forward(self, x: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """Multiply groups of channels by ``Q``, or its transpose: ``(B, channels * n, ...)`` to the same shape."""
        if torch.jit.is_scripting():
            return self._multiply(x, transposed)
        with torch.autocast(x.device.type, enabled=False):
            return self._multiply(x, transposed)

    def _multiply(self, x: torch.Tensor, transposed: bool) -> torch.Tensor:
        q = self.matrix().to(x.dtype)
        if transposed:
            q = q.transpose(1, 2)
        return (q @ x.reshape(x.shape[0], q.shape[0], q.shape[1], -1)).reshape(x.shape)


class _Resampling(Invertible):
    """What down- and upsampling share: the mixings, and exact inversion with the help of a kept rounding residual."""

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
        self.spatial_dims = spatial_dims
        self.channels = channels
        self.channels_down = channels_down
        self.n_streams = n_streams
        # A bare shuffle moves values and adds nothing: exact on any grid.
        self.fraction_bits = fraction_bits if learned else None
        mixings = [OrthogonalMixing(channels_down, 2**spatial_dims) for _ in range(n_streams)] if learned else []
        self.mixings = nn.ModuleList(mixings)

    def _on_grid(self, x: torch.Tensor) -> torch.Tensor:
        bits = self.fraction_bits
        if bits is not None:
            x = round_to_grid(x, bits)
        return x

    @torch.jit.export
    def down(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Resample downwards: ``n`` streams, then the rest, to ``n`` coarse streams, their skips, then the rest."""
        coarse: list[torch.Tensor] = []
        for x in state[: self.n_streams]:
            coarse.append(squeeze(as_stream(x)[:, : self.channels_down], self.spatial_dims))
        for i, mixing in enumerate(self.mixings):
            coarse[i] = self._on_grid(mixing(coarse[i]))
        if self.channels_down < self.channels:
            # Copies, since a view would keep the whole stream alive.
            coarse += [as_stream(x)[:, self.channels_down :].contiguous() for x in state[: self.n_streams]]
        return coarse + state[self.n_streams :]

    @torch.jit.export
    def up(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Invert :meth:`down`, up to rounding."""
        n = self.n_streams
        fine: list[torch.Tensor] = [as_stream(x) for x in state[:n]]
        for i, mixing in enumerate(self.mixings):
            fine[i] = self._on_grid(mixing(fine[i], True))
        fine = [unsqueeze(x, self.spatial_dims) for x in fine]
        if self.channels_down == self.channels:
            return fine + state[n:]
        return [torch.cat([fine[i], as_stream(state[n + i])], 1) for i in range(n)] + state[2 * n :]

    @torch.jit.unused
    def record(self, *state: torch.Tensor) -> Recorded:
        """See :meth:`memnet.Invertible.record`; keeps one byte a resampled value, the rounding residual of the inverse."""
        recorded = super().record(*state)
        if self.fraction_bits is None:
            return recorded
        kept = []
        inverted = self.inverse(*recorded.state)
        for x, y in zip(self._resampled(state), self._resampled(inverted), strict=True):
            steps = (as_stream(x) - y).div_(grid_step(y.dtype, self.fraction_bits))
            if not torch.linalg.vector_norm(steps, float("inf")).item() <= 127:
                raise OverflowError(
                    f"{type(self).__name__}: the inverse is more than 127 grid steps off, the streams are too large for "
                    f'fraction_bits={self.fraction_bits}. Use a coarser grid or memory="checkpoint".'
                )
            kept.append(steps.to(torch.int8))
        return recorded._replace(kept=tuple(kept))

    @torch.jit.unused
    def restore(self, recorded: Recorded) -> tuple[torch.Tensor, ...]:
        """See :meth:`memnet.Invertible.restore`."""
        inputs = self.inverse(*recorded.state)
        if self.fraction_bits is not None:
            for y, steps in zip(self._resampled(inputs), recorded.kept, strict=True):
                y.add_(steps, alpha=grid_step(y.dtype, self.fraction_bits))
        return inputs

    @torch.jit.unused
    def _resampled(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return views of the parts of the block's inputs that are resampled."""
        return [x[:, : self.channels_down] for x in inputs[: self.n_streams]]


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

    @torch.jit.export
    def plain(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Map streams ``(B, C, 2 D, ...)`` to streams ``(B, c * 2^d, D, ...)`` and skips ``(B, C - c, 2 D, ...)``."""
        return self.down(state)

    @torch.jit.unused
    def inverse(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Bring back the streams."""
        return tuple(self.up(list(state)))


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

    @torch.jit.export
    def plain(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Map streams ``(B, c * 2^d, D, ...)`` and skips ``(B, C - c, 2 D, ...)`` to streams ``(B, C, 2 D, ...)``."""
        return self.up(state)

    @torch.jit.unused
    def inverse(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Bring back the coarse streams and the skips."""
        return tuple(self.down(list(state)))

    @torch.jit.unused
    def _resampled(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(inputs[: self.n_streams])


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
