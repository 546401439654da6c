"""Conjugate gradients for the data consistency of unrolled networks, and their two gradients."""

from typing import Literal, get_args

import torch
from torch.autograd.function import once_differentiable

from memnet.mri.operators import Map

__all__ = ["ConjugateGradientGradient", "conjugate_gradient"]

ConjugateGradientGradient = Literal["unrolled", "implicit"]


def conjugate_gradient(
    normal: Map,
    right: torch.Tensor,
    mu: torch.Tensor | float,
    max_iterations: int = 10,
    tolerance: float = 0.0,
    gradient: ConjugateGradientGradient = "unrolled",
) -> torch.Tensor:
    r"""Solve :math:`(N + \mu I) x = b` by conjugate gradients from zero, every item of the batch by itself.

    An item stops where :math:`|r| \le t |b|`, or, as squares would underflow, where :math:`|r|^2 \le \epsilon^3 |b|^2` with the
    machine's :math:`\epsilon`, well past the best that it can do; what follows leaves it as it is.

    The ``unrolled`` gradient is that of the iterations as they ran, whether they converged or not; autograd keeps about four
    images an iteration, which a checkpoint around the solve makes passing. The ``implicit`` one is
    :math:`\bar b = (N + \mu I)^{-1} \bar x`, :math:`\bar\mu = -\mathrm{Re}\, x^H \bar b` by the same iterations; it keeps
    the solution alone, and is exact only as far as both solves converge.

    Args:
        normal: :math:`N`, linear, self-adjoint and positive semidefinite, as :meth:`memnet.SenseOperator.normal`.
        right: :math:`b`, ``(B, *dims)``, complex or real.
        mu: :math:`\mu`, at least 0; a scalar tensor to learn it.
        max_iterations: limit of iterations.
        tolerance: :math:`t`, relative to the norm of the right side; 0 never waits for a GPU to see whether all have stopped.
        gradient: ``unrolled`` or ``implicit``.

    Returns:
        :math:`x`, of the shape of ``right``.

    Raises:
        ValueError: ``max_iterations`` is less than 1, ``tolerance`` is negative or ``gradient`` unknown.

    References:
        Methods of conjugate gradients for solving linear systems (Hestenes and Stiefel, 1952),
        https://doi.org/10.6028/jres.049.044
    """
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    if tolerance < 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
    if gradient not in get_args(ConjugateGradientGradient):
        raise ValueError(f"gradient must be one of {', '.join(get_args(ConjugateGradientGradient))}, got {gradient!r}")
    mu = torch.as_tensor(mu, dtype=right.real.dtype, device=right.device)
    if gradient == "unrolled":
        return _iterate(normal, right, mu, max_iterations, tolerance)
    return _Implicit.apply(right, mu, normal, max_iterations, tolerance)


def _iterate(normal: Map, right: torch.Tensor, mu: torch.Tensor, max_iterations: int, tolerance: float) -> torch.Tensor:
    x, residual, direction = torch.zeros_like(right), right, right
    power = _dot(residual, residual)
    least = (max(tolerance**2, torch.finfo(right.dtype).eps ** 3) * power).detach()
    for _ in range(max_iterations):
        active = (power > least) | ~power.isfinite()  # what is not finite goes on, and shows
        if tolerance > 0 and not bool(active.any()):  # a look at the values, for which a GPU stands still
            break
        image = torch.addcmul(normal(direction), direction, mu.to(right.dtype))
        # Divisors of finished items are replaced, not only their quotients: a gradient through 0 / 0 is NaN even if unused.
        step = torch.where(active, power, 0) / torch.where(active, _dot(direction, image), 1)
        x = torch.addcmul(x, direction, _like(step, right))
        residual = torch.addcmul(residual, image, _like(-step, right))
        previous, power = power, torch.where(active, _dot(residual, residual), power)
        turn = torch.where(active, power, 0) / torch.where(active, previous, 1)
        direction = torch.addcmul(residual, direction, _like(turn, right))
    return x


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(x.flatten(1), y.flatten(1)).real


def _like(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return factor.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


class _Implicit(torch.autograd.Function):
    """Solves forwards and, for the gradient, backwards; keeps the solution alone."""

    @staticmethod
    def forward(ctx, right: torch.Tensor, mu: torch.Tensor, normal: Map, max_iterations: int, tolerance: float):
        x = _iterate(normal, right, mu, max_iterations, tolerance)
        ctx.save_for_backward(x, mu)
        ctx.arguments = normal, max_iterations, tolerance
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        x, mu = ctx.saved_tensors
        normal, max_iterations, tolerance = ctx.arguments
        adjoint = _iterate(normal, gradient, mu, max_iterations, tolerance)
        return adjoint, -_dot(x, adjoint).sum(), None, None, None
