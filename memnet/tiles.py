"""Computes and differentiates a local module tile by tile, so that one tile's activations are alive at a time."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from memnet.recompute import Gradients, Replay, accumulate, replay_with_grad

__all__ = ["Tiles"]

Slices = tuple[slice, ...]


class Tiles(nn.Module):
    """Run a module whose output depends on a neighbourhood of the input alone in tiles, with the halo they need.

    Outputs and gradients are the module's own to rounding, at the image's border, too, where the module's padding acts.
    Backpropagation keeps the input, and computes each tile again. Batch statistics or instance norm are no matter of a
    neighbourhood: a module that has them must not be tiled.

    Args:
        module: from ``(B, C, *dims)`` to ``(B, C', *dims)``.
        halo: how far the neighbourhood reaches in each direction, voxels: the sum of the radii of its kernels.
        size: voxels of a tile along each of the last ``len(size)`` dimensions, 0 for all; a tile that would be the last and
            smaller than the halo joins the one before.

    Raises:
        ValueError: ``halo`` or ``size`` is negative.
    """

    def __init__(self, module: nn.Module, halo: int, size: Sequence[int]) -> None:
        super().__init__()
        if halo < 0 or min(size, default=0) < 0:
            raise ValueError(f"halo and size must not be negative, got {halo} and {tuple(size)}")
        self.module = module
        self.halo = halo
        self.size = tuple(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the module to ``(B, C, *dims)``."""
        tiles = list(self._tiles(x.shape))
        if len(tiles) == 1 or torch.jit.is_tracing() or torch.compiler.is_exporting():
            return self.module(x)
        parameters = list(self.module.parameters())
        return _Tiled.apply(self.module, tiles, parameters, x, *parameters)

    def _tiles(self, shape: Sequence[int]) -> Iterator[tuple[Slices, Slices, Slices]]:
        """Yield the tile with its halo, the tile, and the tile's place in what the module makes of the first."""
        ranges = []
        for n, size in zip(shape[len(shape) - len(self.size) :], self.size, strict=True):
            starts = list(range(0, n, size or n))
            if len(starts) > 1 and n - starts[-1] < self.halo:
                starts.pop()
            ranges.append(list(zip(starts, [*starts[1:], n], [n] * len(starts), strict=True)))
        for tile in itertools.product(*ranges):
            outer = [slice(max(0, a - self.halo), min(n, b + self.halo)) for a, b, n in tile]
            inner = [slice(a, b) for a, b, _ in tile]
            place = [slice(a - o.start, b - o.start) for (a, b, _), o in zip(tile, outer, strict=True)]
            yield (..., *outer), (..., *inner), (..., *place)  # type: ignore[misc]


class _Tiled(torch.autograd.Function):
    """Keeps the input; the backward pass repeats and differentiates tile after tile."""

    @staticmethod
    def forward(ctx, module: nn.Module, tiles, parameters: list[nn.Parameter], x: torch.Tensor, *_: torch.Tensor):
        ctx.tiles, ctx.parameters = tiles, parameters
        ctx.replays = []
        ctx.save_for_backward(x)
        y: torch.Tensor | None = None
        for outer, inner, place in tiles:
            ctx.replays.append(Replay(module))
            (part,) = ctx.replays[-1].first(x[outer])
            if y is None:
                y = part.new_empty(x.shape[0], part.shape[1], *x.shape[2:])
            y[inner] = part[place]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        (x,) = ctx.saved_tensors
        x_gradient = torch.zeros_like(x) if ctx.needs_input_grad[3] else None
        found: Gradients = {}
        for replay, (outer, inner, place) in zip(ctx.replays, ctx.tiles, strict=True):
            (part,), pull_back = replay_with_grad([replay], [x[outer]])
            part_gradient = torch.zeros_like(part)
            part_gradient[place] = gradient[inner]
            del part
            (tile_gradient,), more = pull_back([part_gradient])
            accumulate(found, more)
            if x_gradient is not None and tile_gradient is not None:
                x_gradient[outer] += tile_gradient
        return None, None, None, x_gradient, *(found.get(p) for p in ctx.parameters)
