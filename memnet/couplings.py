"""Additive couplings: residual blocks on two streams that are inverted by subtraction."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from torch import nn
from torch.autograd.function import once_differentiable

from memnet.grid import FRACTION_BITS, add_on_grid, add_on_grid_, as_stream, check_fraction_bits
from memnet.invertible import Invertible, Recorded
from memnet.metadata import plain_tensor
from memnet.normalization import run_in_place
from memnet.recompute import Gradients, Guarded, Replay, accumulate, guarded, replay_with_grad
from memnet.tiles import Slices, Tile, TiledCall, require_tileable
from memnet.tracing import is_traced

__all__ = ["AdditiveCoupling", "ChannelMerge", "ChannelSplit"]

_ALONE = 2  # references to what one has, and to count which another is needed


class AdditiveCoupling(Invertible):
    r"""Additive coupling of two streams, exactly invertible for any ``f`` and ``g``.

    .. math:: y_1 = x_1 + [f(x_2)], \qquad y_2 = x_2 + [g(y_1)]

    :math:`[\cdot]` rounds to multiples of :math:`2^{-k}`, on which additions and subtractions are exact, with the gradient
    of the identity. The streams stay in float32 under autocast. Backpropagation through a chain with ``memory="invert"``
    runs ``f`` and ``g`` once more each: the run that gives the inverse also gives the graph for the gradient.

    With ``tile`` both runs go tile by tile, and with ``memory="invert"`` they write over the streams and their gradients, so
    that besides these only a tile's activations are alive. The function is that of the whole to rounding, and one and the
    same under every strategy; gradients and inversion are bit for bit those of ``store`` with the same tiles.

    Args:
        f: module from ``x2`` to an increment of ``x1``, of the same shape.
        g: module from ``y1`` to an increment of ``x2``, of the same shape.
        fraction_bits: ``k`` in float32 (``k + 29`` in float64); the streams must stay below ``2^(24-k)``. None adds plain
            floating-point increments, whose inversion drifts with depth.
        tile: the tiles in which ``f`` and ``g`` are computed and differentiated, see :data:`memnet.tiles.Tile`; None for none.

    Raises:
        ValueError: ``fraction_bits`` is not between 4 and 22, or ``f`` or ``g`` cannot be computed in tiles.
        RuntimeError: at run time, if ``f`` or ``g`` changes its input in place.

    References:
        NICE: Non-linear independent components estimation (Dinh et al., 2014), https://arxiv.org/abs/1410.8516
        The reversible residual network (Gomez et al., 2017), https://arxiv.org/abs/1707.04585
    """

    __jit_unused_properties__ = ["renews"]

    def __init__(
        self, f: nn.Module, g: nn.Module, fraction_bits: int | None = FRACTION_BITS, tile: Tile | None = None
    ) -> None:
        super().__init__()
        check_fraction_bits(fraction_bits)
        self.f = f
        self.g = g
        self.fraction_bits = fraction_bits
        self.exact = fraction_bits is not None
        self.tile = tile
        for branch in (f, g) if tile is not None else ():
            require_tileable(branch)

    @property
    def renews(self) -> bool:
        """See :class:`memnet.Invertible`."""
        return self.tile is not None

    @torch.jit.export
    def plain(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Map ``[x1, x2, *rest]`` to ``[y1, y2, *rest]``, each stream ``(B, C, ...)``."""
        if len(state) < 2:
            raise ValueError(
                "a coupling needs two streams; begin the chain with ChannelSplit to make them of one tensor"
            )
        x1, x2 = as_stream(state[0]), as_stream(state[1])
        if torch.jit.is_scripting():
            y1 = add_on_grid(x1, self.f(x2), self.fraction_bits)
            y2 = add_on_grid(x2, self.g(y1), self.fraction_bits)
        elif self.tile is not None and not is_traced():
            return self._plain_in_tiles(x1, x2) + state[2:]
        else:
            y1 = add_on_grid(x1, guarded(self.f, x2), self.fraction_bits)
            y2 = add_on_grid(x2, guarded(self.g, y1), self.fraction_bits)
        return [y1, y2] + state[2:]

    @torch.jit.unused
    def inverse(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map ``(y1, y2, *rest)`` back to ``(x1, x2, *rest)``."""
        y1, y2, *rest = state
        if self.tile is not None:
            x1, x2 = y1.detach().clone(), y2.detach().clone()
            self._add(x2, TiledCall(self.g, x1.shape, self.tile).first(x1), -1.0)
            self._add(x1, TiledCall(self.f, x2.shape, self.tile).first(x2), -1.0)
            return x1, x2, *rest
        x2 = add_on_grid(y2, guarded(self.g, y1), self.fraction_bits, -1.0)
        x1 = add_on_grid(y1, guarded(self.f, x2), self.fraction_bits, -1.0)
        return x1, x2, *rest

    @torch.jit.unused
    def record(self, *state: torch.Tensor) -> Recorded:
        """See :meth:`memnet.Invertible.record`."""
        if len(state) < 2:
            raise ValueError(
                "a coupling needs two streams; begin the chain with ChannelSplit to make them of one tensor"
            )
        x1, x2, *rest = state
        if self.tile is not None:
            return self.record_over(x1.clone(), x2.clone(), *rest)
        x1, x2 = as_stream(x1), as_stream(x2)
        replay_f, replay_g = (Replay(Guarded(branch, run_in_place)) for branch in (self.f, self.g))
        y1 = add_on_grid(x1, replay_f.first(x2)[0], self.fraction_bits)
        y2 = add_on_grid(x2, replay_g.first(y1)[0], self.fraction_bits)
        return Recorded((y1, y2, *rest), (replay_f, replay_g))

    @torch.jit.unused
    def record_over(self, *state: torch.Tensor) -> Recorded:
        """See :meth:`memnet.Invertible.record_over`."""
        if self.tile is None:
            return self.record(*state)
        y1, y2 = as_stream(state[0]), as_stream(state[1])
        calls = TiledCall(self.f, y2.shape, self.tile), TiledCall(self.g, y1.shape, self.tile)
        self._add(y1, calls[0].first(y2))
        self._add(y2, calls[1].first(y1))
        return Recorded((y1, y2, *state[2:]), calls)

    @torch.jit.unused
    def pull_back(
        self, recorded: Recorded, gradients: Sequence[torch.Tensor | None]
    ) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor | None], Gradients]:
        """See :meth:`memnet.Invertible.pull_back`."""
        if self.tile is not None:
            held: list[Any] = [gradients, recorded]
            del recorded, gradients
            return self._pull_back_in_tiles(held.pop(), held.pop())
        y1, y2, *rest = recorded.state
        replay_f, replay_g = recorded.replays
        d_rest = gradients[2:]
        d1, d2 = _filled((y1, y2), gradients)
        del recorded, gradients

        (branch,), pull = replay_with_grad([replay_g], [y1])
        x2 = add_on_grid(y2, branch, self.fraction_bits, -1.0)
        del branch, y2
        steps, parameter_gradients = pull([d2])
        d1 = _sum(d1, steps)
        del pull

        (branch,), pull = replay_with_grad([replay_f], [x2])
        x1 = add_on_grid(y1, branch, self.fraction_bits, -1.0)
        del branch, y1
        steps, more = pull([d1])
        d2 = _sum(d2, steps)
        accumulate(parameter_gradients, more)
        return (x1, x2, *rest), [d1, d2, *d_rest], parameter_gradients

    @torch.jit.unused
    def _plain_in_tiles(self, x1: torch.Tensor, x2: torch.Tensor) -> list[torch.Tensor]:
        streams = [plain_tensor(x) for x in (x1, x2)]
        if torch.is_grad_enabled():
            parameters = list(self.parameters())
            outputs = _InTiles.apply(self, parameters, *streams, *parameters)
        else:
            outputs = self.record(*streams).state
        if not isinstance(x1, MetaTensor):
            return list(outputs)
        return [MetaTensor(y).copy_meta_from(x1) for y in outputs]

    @torch.jit.unused
    def _pull_back_in_tiles(
        self, recorded: Recorded, gradients: Sequence[torch.Tensor | None]
    ) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor | None], Gradients]:
        """Turn the outputs and their gradients into the inputs and theirs, in their memory."""
        held = [*recorded.state[:2], *_filled(recorded.state[:2], gradients)]
        rest, d_rest, (call_f, call_g), owned = recorded.state[2:], gradients[2:], recorded.replays, recorded.owned
        del recorded, gradients
        for i in range(0 if owned else 4):  # one by one, so that each can go
            held[i] = held[i].clone()
        stream1, stream2, d1, d2 = held
        found = call_g.pull_back(stream1, d2, d1, lambda inner, part: self._add(stream2, [(inner, part)], -1.0))
        accumulate(
            found, call_f.pull_back(stream2, d1, d2, lambda inner, part: self._add(stream1, [(inner, part)], -1.0))
        )
        return (stream1, stream2, *rest), [d1, d2, *d_rest], found

    @torch.jit.unused
    def _add(self, stream: torch.Tensor, tiles: Iterable[tuple[Slices, torch.Tensor]], sign: float = 1.0) -> None:
        for inner, increment in tiles:
            add_on_grid_(stream[inner], increment, self.fraction_bits, sign)


class _InTiles(torch.autograd.Function):
    """A coupling in tiles under plain autograd: keeps what its branches see, and goes the way of ``invert`` from there."""

    @staticmethod
    def forward(ctx, coupling: AdditiveCoupling, parameters, x1: torch.Tensor, x2: torch.Tensor, *_: torch.Tensor):
        recorded = coupling.record(x1, x2)
        ctx.calls, ctx.parameters = recorded.replays, parameters
        ctx.save_for_backward(recorded.state[0], x2)
        return recorded.state

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: torch.Tensor):
        y1, x2 = ctx.saved_tensors
        d1, d2 = (gradient.clone() for gradient in gradients)
        call_f, call_g = ctx.calls
        found = call_g.pull_back(y1, d2, d1)
        accumulate(found, call_f.pull_back(x2, d1, d2))
        return None, None, d1, d2, *(found.get(p) for p in ctx.parameters)


def _sum(gradient: torch.Tensor, steps: list[torch.Tensor | None]) -> torch.Tensor:
    """Add what came back through a branch, taken out of a list, to a stream's gradient; in its memory if nobody else has it.

    Autograd hands one tensor to several (the identity hands on the source, a sum the same to both of its terms), and a hook
    may keep it.
    """
    step = steps.pop()
    if step is None:
        return gradient
    if torch._C._functorch.is_legacy_batchedtensor(step):  # of is_grads_batched, which has no memory to look at
        return gradient + step
    storage = step.untyped_storage()
    alone = sys.getrefcount(step) <= _ALONE and torch._C._storage_Use_Count(storage._cdata) <= _ALONE
    return step.add_(gradient) if alone and storage.nbytes() == step.nbytes else gradient + step


class ChannelSplit(Invertible):
    """Split a tensor into two streams along the channels.

    Args:
        first: number of channels of the first stream; half of them (rounded down) where None.
    """

    renews = True

    def __init__(self, first: int | None = None) -> None:
        super().__init__()
        self.first = first

    @torch.jit.export
    def plain(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Map ``[x, *rest]`` to ``[x1, x2, *rest]``, ``x`` of shape ``(B, C, ...)``."""
        x = state[0]
        first = self.first
        n = x.shape[1] // 2 if first is None else first
        # Copies: a view, which contiguous() returns of a batch of 1, would keep the other half alive too.
        return [x[:, :n].clone(), x[:, n:].clone()] + state[1:]

    @torch.jit.unused
    def inverse(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map ``(x1, x2, *rest)`` back to ``(x, *rest)``."""
        return torch.cat(state[:2], 1), *state[2:]

    @torch.jit.unused
    def pull_back(
        self, recorded: Recorded, gradients: Sequence[torch.Tensor | None]
    ) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor | None], Gradients]:
        """See :meth:`memnet.Invertible.pull_back`; the gradient is moved as the state is, and nothing runs again."""
        filled, rest = _filled(recorded.state[:2], gradients), gradients[2:]
        inputs = self.inverse(*recorded.state) if recorded.wanted else ()
        del recorded, gradients
        return inputs, [torch.cat(filled, 1), *rest], {}


class ChannelMerge(Invertible):
    """Concatenate two streams along the channels: the inverse of :class:`ChannelSplit`.

    Args:
        first: number of channels of the first stream; half of them (rounded down) where None.
    """

    renews = True

    def __init__(self, first: int | None = None) -> None:
        super().__init__()
        self.first = first

    @torch.jit.export
    def plain(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Map ``[x1, x2, *rest]`` to ``[x, *rest]``."""
        return [torch.cat(state[:2], 1)] + state[2:]

    @torch.jit.unused
    def inverse(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map ``(x, *rest)`` back to ``(x1, x2, *rest)``."""
        x = state[0]
        n = x.shape[1] // 2 if self.first is None else self.first
        return x[:, :n].clone(), x[:, n:].clone(), *state[1:]

    @torch.jit.unused
    def pull_back(
        self, recorded: Recorded, gradients: Sequence[torch.Tensor | None]
    ) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor | None], Gradients]:
        """See :meth:`memnet.Invertible.pull_back`; the gradient is moved as the state is, and nothing runs again."""
        (gradient,) = _filled(recorded.state[:1], gradients)
        rest, inputs = gradients[1:], self.inverse(*recorded.state)
        del recorded, gradients
        return inputs, [*self.inverse(gradient), *rest], {}


def _filled(state: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Return the gradients of the first tensors of a state, zeros where the loss does not use one."""
    return [torch.zeros_like(x) if d is None else d for x, d in zip(state, gradients, strict=False)]
