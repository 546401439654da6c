"""Additive couplings: residual blocks on two streams that are inverted by subtraction."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from memnet.grid import FRACTION_BITS, add_on_grid, as_stream
from memnet.invertible import Invertible, Recorded
from memnet.recompute import Gradients, Replay, accumulate, replay_with_grad

__all__ = ["AdditiveCoupling", "ChannelMerge", "ChannelSplit"]


class AdditiveCoupling(Invertible):
    r"""Additive coupling of two streams, exactly invertible for any ``f`` and ``g``.

    .. math:: y_1 = x_1 + [f(x_2)], \qquad y_2 = x_2 + [g(y_1)]

    :math:`[\cdot]` rounds to multiples of :math:`2^{-k}`, on which additions and subtractions are exact, with the gradient
    of the identity. The streams stay in float32 under autocast. Backpropagation through a chain with ``memory="invert"``
    runs ``f`` and ``g`` once more each: the run that gives the inverse also gives the graph for the gradient.

    Args:
        f: module from ``x2`` to an increment of ``x1``, of the same shape.
        g: module from ``y1`` to an increment of ``x2``, of the same shape.
        fraction_bits: ``k`` in float32 (``k + 29`` in float64); the streams must stay below ``2^(24-k)``. None adds plain
            floating-point increments, whose inversion drifts with depth.

    Raises:
        ValueError: ``fraction_bits`` is not between 4 and 22.
        RuntimeError: at run time, if ``f`` or ``g`` changes its input in place.

    References:
        NICE: Non-linear independent components estimation (Dinh et al., 2014), https://arxiv.org/abs/1410.8516
        The reversible residual network (Gomez et al., 2017), https://arxiv.org/abs/1707.04585
    """

    def __init__(self, f: nn.Module, g: nn.Module, fraction_bits: int | None = FRACTION_BITS) -> None:
        super().__init__()
        if fraction_bits is not None and not 4 <= fraction_bits <= 22:
            raise ValueError(f"fraction_bits must be between 4 and 22, got {fraction_bits}")
        self.f = f
        self.g = g
        self.fraction_bits = fraction_bits
        self.exact = fraction_bits is not None

    @torch.jit.export
    def plain(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Map ``[x1, x2, *rest]`` to ``[y1, y2, *rest]``, each stream ``(B, C, ...)``."""
        x1, x2 = as_stream(state[0]), as_stream(state[1])
        if torch.jit.is_scripting():
            y1 = add_on_grid(x1, self.f(x2), self.fraction_bits)
            y2 = add_on_grid(x2, self.g(y1), self.fraction_bits)
        else:
            y1 = add_on_grid(x1, _guarded(self.f, x2), self.fraction_bits)
            y2 = add_on_grid(x2, _guarded(self.g, y1), self.fraction_bits)
        return [y1, y2] + state[2:]

    @torch.jit.unused
    def inverse(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map ``(y1, y2, *rest)`` back to ``(x1, x2, *rest)``."""
        y1, y2, *rest = state
        x2 = add_on_grid(y2, _guarded(self.g, y1), self.fraction_bits, -1.0)
        x1 = add_on_grid(y1, _guarded(self.f, x2), self.fraction_bits, -1.0)
        return x1, x2, *rest

    @torch.jit.unused
    def record(self, *state: torch.Tensor) -> Recorded:
        """See :meth:`memnet.Invertible.record`."""
        x1, x2, *rest = state
        x1, x2 = as_stream(x1), as_stream(x2)
        replay_f, replay_g = Replay(_Guarded(self.f)), Replay(_Guarded(self.g))
        y1 = add_on_grid(x1, replay_f.first(x2)[0], self.fraction_bits)
        y2 = add_on_grid(x2, replay_g.first(y1)[0], self.fraction_bits)
        return Recorded((y1, y2, *rest), (replay_f, replay_g))

    @torch.jit.unused
    def pull_back(
        self, recorded: Recorded, gradients: Sequence[torch.Tensor | None]
    ) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor | None], Gradients]:
        """See :meth:`memnet.Invertible.pull_back`."""
        y1, y2, *rest = recorded.state
        replay_f, replay_g = recorded.replays
        d_rest = gradients[2:]
        d1, d2 = _filled((y1, y2), gradients)
        del recorded, gradients

        (branch,), pull = replay_with_grad([replay_g], [y1])
        x2 = add_on_grid(y2, branch, self.fraction_bits, -1.0)
        del branch, y2
        (step,), parameter_gradients = pull([d2])
        d1 = _sum(d1, step, [d2, *parameter_gradients.values()])
        del pull, step

        (branch,), pull = replay_with_grad([replay_f], [x2])
        x1 = add_on_grid(y1, branch, self.fraction_bits, -1.0)
        del branch, y1
        (step,), more = pull([d1])
        d2 = _sum(d2, step, [d1, *more.values()])
        accumulate(parameter_gradients, more)
        return (x1, x2, *rest), [d1, d2, *d_rest], parameter_gradients


def _guarded(branch: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Call a branch so that its input survives, or refuse."""
    first = branch
    while isinstance(first, nn.Sequential) and len(first) > 0:
        first = first[0]
    if getattr(first, "inplace", False):
        return branch(x.clone())
    version = x._version
    y = branch(x)
    if x._version != version:
        raise RuntimeError(
            f"{type(branch).__name__}, a branch of AdditiveCoupling, changes its input in place; the coupling still needs "
            "that input. Make the branch's first operation out of place."
        )
    return y


def _sum(gradient: torch.Tensor, step: torch.Tensor | None, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add what came back through a branch to a stream's gradient, in the memory of ``step`` where no other has it too."""
    if step is None:
        return gradient
    storage = step.untyped_storage()
    # Autograd may hand one tensor to several: the identity hands on the source, a sum the same to both of its terms.
    shared = any(storage._cdata == other.untyped_storage()._cdata for other in others)
    if storage.nbytes() == step.nbytes and not shared:
        return step.add_(gradient)
    return gradient + step


class _Guarded(nn.Module):
    """A branch as a module whose input survives, for :class:`Replay`."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.training = branch.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with _in_place(self.branch):
            return _guarded(self.branch, x)


@contextmanager
def _in_place(branch: nn.Module) -> Iterator[None]:
    """Let each leaky ReLU that follows a layer which does not need its own output write over that."""
    changed = [
        after
        for module in branch.modules()
        if type(module) is nn.Sequential
        for before, after in pairwise(module)
        if type(after) is nn.LeakyReLU and after.negative_slope >= 0 and not after.inplace
        if isinstance(before, nn.GroupNorm | _NormBase | _ConvNd)
        if not (before._forward_hooks or after._forward_hooks or after._forward_pre_hooks)
    ]
    for module in changed:
        module.forward = partial(_overwrite, slope=module.negative_slope)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _overwrite(x: torch.Tensor, slope: float) -> torch.Tensor:
    return _Overwrite.apply(x, slope)


class _Overwrite(torch.autograd.Function):
    """Leaky ReLU in the memory of its input: the gradient depends on the sign alone, which input and output share.

    An in-place operation would do for autograd, too, if it were not for instance norm's output, a view, of which autograd
    then makes copies.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, slope: float) -> torch.Tensor:
        y = torch.nn.functional.leaky_relu_(x.detach(), slope)
        ctx.slope = slope
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return torch.ops.aten.leaky_relu_backward(gradient, *ctx.saved_tensors, ctx.slope, True), None


class ChannelSplit(Invertible):
    """Split a tensor into two streams along the channels.

    Args:
        first: number of channels of the first stream; half of them (rounded down) where None.
    """

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
        filled = _filled(recorded.state[:2], gradients)
        rest, inputs = gradients[2:], self.inverse(*recorded.state)
        del recorded, gradients
        return inputs, [torch.cat(filled, 1), *rest], {}


class ChannelMerge(Invertible):
    """Concatenate two streams along the channels: the inverse of :class:`ChannelSplit`.

    Args:
        first: number of channels of the first stream; half of them (rounded down) where None.
    """

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
