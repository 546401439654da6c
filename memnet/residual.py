"""Residual blocks inverted by fixed-point iteration."""

import torch
from torch import nn

from memnet.grid import FRACTION_BITS, add_on_grid, as_stream, check_fraction_bits, grid_step
from memnet.invertible import DriftError, Invertible, Recorded
from memnet.recompute import guarded

__all__ = ["InvertibleResidual"]

_TOLERANCE = {torch.float32: 5e-4, torch.float64: 1e-10}  # several steps of the default grid


class InvertibleResidual(Invertible):
    r"""Residual block :math:`y = x + [f(x)]`, inverted by iterating :math:`x \leftarrow y - [f(x)]`.

    The iteration converges where ``f`` is a contraction (Lipschitz constant below 1), by that factor a step.
    :math:`[\cdot]` rounds to the grid of :mod:`memnet.grid`; on it the iteration ends at most values' very input, and a step or
    two beside it at the others: unlike a coupling, the block is not inverted bit for bit.

    Args:
        f: module from a tensor to an increment of the same shape.
        tolerance: largest accepted ``max|x + f(x) - y| / max(1, max|y|)``; where None 5e-4 in float32 and 1e-10 in float64, or
            four steps of a grid that is coarser.
        max_iterations: limit of fixed-point iterations.
        fraction_bits: see :class:`memnet.AdditiveCoupling`.

    Raises:
        ValueError: ``max_iterations`` is less than 1, or ``fraction_bits`` is not between 4 and 22.
        RuntimeError: at run time, if ``f`` changes its input in place.
        memnet.DriftError: at run time, when the inverse has not reached the tolerance; the message says how far it got.

    References:
        Invertible residual networks (Behrmann et al., 2019), https://arxiv.org/abs/1811.00995
    """

    exact = False

    def __init__(
        self,
        f: nn.Module,
        tolerance: float | None = None,
        max_iterations: int = 50,
        fraction_bits: int | None = FRACTION_BITS,
    ) -> None:
        super().__init__()
        if max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
        check_fraction_bits(fraction_bits)
        self.f = f
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.fraction_bits = fraction_bits

    @torch.jit.export
    def plain(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Map ``[x, *rest]`` to ``[y, *rest]``, ``x`` of shape ``(B, C, ...)``."""
        x = as_stream(state[0])
        increment = self.f(x) if torch.jit.is_scripting() else guarded(self.f, x)
        return [add_on_grid(x, increment, self.fraction_bits)] + state[1:]

    @torch.jit.unused
    def inverse(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map ``(y, *rest)`` back to ``(x, *rest)``."""
        return self._solve(lambda x: self(x, *state[1:]), *state)

    @torch.jit.unused
    def restore(self, recorded: Recorded) -> tuple[torch.Tensor, ...]:
        """See :meth:`memnet.Invertible.restore`; ``f`` runs as it ran in the forward pass (autocast, dropout masks)."""
        rest = recorded.state[1:]
        return self._solve(lambda x: recorded.replays.again(x, *rest), *recorded.state)

    @torch.jit.unused
    @torch.no_grad()
    def _solve(self, forward, y: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scale = max(1.0, torch.linalg.vector_norm(y, float("inf")).item())
        tolerance = self._largest_error(y.dtype, scale)
        x, error = y, float("inf")
        for _ in range(self.max_iterations):
            image = forward(x)
            residual = y - (image if isinstance(image, torch.Tensor) else image[0])
            largest = torch.linalg.vector_norm(residual, float("inf"))
            previous, error = error, largest.item() / scale
            # On past the tolerance for as long as it gains: the last bits decide whether the grid gives x back exactly.
            if error == 0 or (error <= tolerance and error >= previous):
                break
            x = x + residual
        if not bool(largest <= tolerance * scale):  # asked of the tensor, which a simulation without data takes to hold
            raise DriftError(
                f"InvertibleResidual: after {self.max_iterations} fixed-point iterations the inverse is still off by {error:.2e} "
                f"of the largest value (tolerance {tolerance:.0e}). f is not contractive enough: constrain it (e.g. "
                'torch.nn.utils.parametrizations.spectral_norm), raise max_iterations, or use memory="checkpoint".'
            )
        return x, *rest

    @torch.jit.unused
    def _largest_error(self, dtype: torch.dtype, scale: float) -> float:
        if self.tolerance is not None:
            return self.tolerance
        step = 0.0 if self.fraction_bits is None else grid_step(dtype, self.fraction_bits)
        return max(_TOLERANCE.get(dtype, 5e-4), 4 * step / scale)
