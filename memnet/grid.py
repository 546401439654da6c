"""The fixed grid on which additions of floating-point numbers, and so their inverses, are exact."""

import math
from typing import Any

import torch

from memnet.tracing import is_differentiated_forwards

__all__ = [
    "OutOfRangeError",
    "add_on_grid",
    "add_on_grid_",
    "as_stream",
    "check_fraction_bits",
    "check_range",
    "magnitude",
    "grid_step",
    "round_to_grid",
    "stream_limit",
]

FRACTION_BITS = 14
"""Default grid: multiples of 2^-14 in float32, which holds streams of magnitude below 2^(24-14) = 1024."""

_SIGNIFICAND_BITS = 24  # of float32
_EXTRA_FRACTION_BITS_FLOAT64 = 29  # 53 - 24: float64 has the same range on a finer grid


def as_stream(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in the precision of a residual stream: half precisions become float32, the others stay."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return x.float()
    return x


def check_fraction_bits(fraction_bits: int | None) -> None:
    """Refuse a grid so fine that streams have no room, or so coarse that they have no values.

    Raises:
        ValueError: ``fraction_bits`` is a number not between 4 and 22.
    """
    if fraction_bits is not None and not 4 <= fraction_bits <= 22:
        raise ValueError(f"fraction_bits must be between 4 and 22, got {fraction_bits}")


def grid_step(dtype: torch.dtype, fraction_bits: int) -> float:
    """Return the distance of neighbouring grid points: ``2^-k`` in float32, ``2^-(k+29)`` in float64."""
    if dtype == torch.float64:
        return 2.0 ** (-(fraction_bits + 29))
    return 2.0 ** (-fraction_bits)


def stream_limit(fraction_bits: int) -> float:
    """Return the magnitude below which every multiple of the grid step is a floating-point number, ``2^(24-k)``."""
    return 2.0 ** (_SIGNIFICAND_BITS - fraction_bits)


def round_to_grid(x: torch.Tensor, fraction_bits: int) -> torch.Tensor:
    """Round ``x`` to the nearest multiple of the grid step; the gradient passes straight through.

    Args:
        x: a tensor of any shape, float32 or float64.
        fraction_bits: ``k``; see :func:`grid_step`.
    """
    if not torch.jit.is_scripting():
        if _differentiates([x]):
            return _RoundToGrid.apply(x, fraction_bits)
    return _rounded(x, fraction_bits)


def _rounded(x: torch.Tensor, fraction_bits: int) -> torch.Tensor:
    step = grid_step(x.dtype, fraction_bits)
    # Powers of two: the products are exact, only the rounding itself changes the value.
    return (x * (1.0 / step)).round_().mul_(step)


class _RoundToGrid(torch.autograd.Function):
    """Rounding whose gradient is that of the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, fraction_bits: int) -> torch.Tensor:
        return _rounded(x, fraction_bits)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient, None

    @staticmethod
    def jvp(ctx, tangent: torch.Tensor, _) -> torch.Tensor:
        return tangent.clone()  # not the input's own, which autograd refuses


def add_on_grid(
    stream: torch.Tensor, branch: torch.Tensor, fraction_bits: int | None, sign: float = 1.0
) -> torch.Tensor:
    """Add a branch's output, brought to the stream's precision and rounded to the grid, to a residual stream.

    Args:
        stream: ``(B, C, ...)``, float32 or float64.
        branch: the increment, of the same shape and any floating-point dtype.
        fraction_bits: ``k``; see :func:`grid_step`. None adds without rounding.
        sign: 1 to add, -1 to subtract.

    Returns:
        ``stream + sign * [branch]``; for multiples of the grid step the two signs undo each other exactly. The gradient is
        that of the unrounded sum.
    """
    if fraction_bits is None:
        return torch.add(stream, branch.to(stream.dtype), alpha=sign)
    if not torch.jit.is_scripting():
        if _differentiates([stream, branch]):
            return _AddOnGrid.apply(stream, branch, fraction_bits, sign)
    return _added(stream, branch, fraction_bits, sign)


def _added(stream: torch.Tensor, branch: torch.Tensor, fraction_bits: int, sign: float) -> torch.Tensor:
    step = grid_step(stream.dtype, fraction_bits)
    counts = (branch.to(stream.dtype) * (1.0 / step)).round_()
    return counts.mul_(sign * step).add_(stream)


def add_on_grid_(
    stream: torch.Tensor, branch: torch.Tensor, fraction_bits: int | None, sign: float = 1.0
) -> torch.Tensor:
    """Do what :func:`add_on_grid` does, bit for bit, in the memory of the stream, without a gradient."""
    if fraction_bits is None:
        return stream.add_(branch.to(stream.dtype), alpha=sign)
    step = grid_step(stream.dtype, fraction_bits)
    return stream.add_((branch.to(stream.dtype) * (1.0 / step)).round_().mul_(sign * step))


class _AddOnGrid(torch.autograd.Function):
    """Addition on the grid, with the gradient of an addition."""

    generate_vmap_rule = True

    @staticmethod
    def forward(stream: torch.Tensor, branch: torch.Tensor, fraction_bits: int, sign: float) -> torch.Tensor:
        return _added(stream, branch, fraction_bits, sign)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.dtype, ctx.stream_dtype, ctx.sign = inputs[1].dtype, inputs[0].dtype, inputs[3]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient, (gradient if ctx.sign == 1 else gradient * ctx.sign).to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx, stream: torch.Tensor, branch: torch.Tensor, *_) -> torch.Tensor:
        return torch.add(stream, branch.to(ctx.stream_dtype), alpha=ctx.sign)  # a missing tangent comes as zeros


def _differentiates(tensors: list[torch.Tensor]) -> bool:
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return False
    if is_differentiated_forwards():  # which no_grad does not turn off
        return True
    if not torch.is_grad_enabled():
        return False
    # Under torch.func a tensor does not say whether an outer transform differentiates it.
    return torch._C._are_functorch_transforms_active() or any(x.requires_grad for x in tensors)


class OutOfRangeError(OverflowError):
    """A residual stream is not finite, or too large for its grid; a chain answers by keeping checkpoints instead."""


def magnitude(x: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude in a tensor, NaN where it has one; a pass without a copy, many times faster than a norm."""
    least, largest = torch.aminmax(x)
    return torch.maximum(-least, largest)


def check_range(magnitudes: list[torch.Tensor], shares: list[torch.Tensor], fraction_bits: int) -> None:
    """Refuse streams that left the range in which the grid is exact.

    Args:
        magnitudes: the largest magnitude of each stream, as tensors of one element.
        shares: see :class:`memnet.invertible.Recorded`, likewise.
        fraction_bits: ``k``; the limit is ``2^(24-k)``.

    Raises:
        OutOfRangeError: a stream is not finite, or as large as the limit, or a share is above 1.
    """
    if not magnitudes:
        return
    limit = stream_limit(fraction_bits)
    most = [torch.stack([x.double() for x in found]).amax() for found in (magnitudes, shares) if found]
    largest, share = [*torch.stack(most).tolist(), 0.0][:2]  # one look for both
    if not math.isfinite(largest):
        raise OutOfRangeError("a residual stream is not finite")
    if not largest < limit:
        raise OutOfRangeError(f"a residual stream left the range +-{limit:g} of fraction_bits={fraction_bits}")
    if not share <= 1:
        raise OutOfRangeError(f"a residual stream is too large to be resampled with fraction_bits={fraction_bits}")
