"""Computes and differentiates a local module tile by tile, so that one tile's activations are alive at a time."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from memnet.recompute import Gradients, Replay, accumulate, replay_with_grad

__all__ = ["run_in_tiles"]

Slices = tuple[Any, ...]  # of an ellipsis and slices


def run_in_tiles(module: nn.Module, x: torch.Tensor, halo: int, size: Sequence[int]) -> torch.Tensor:
    """Apply a module whose output depends on a neighbourhood of the input alone in tiles, with the halo they need.

    Output and gradients are the module's own to rounding, at the image's border, too, where the module's padding acts.
    Backpropagation keeps the input, and computes each tile again. Batch statistics and instance norm see more than a
    neighbourhood: a module that has them must not be tiled.

    Args:
        module: from ``(B, C, *dims)`` to ``(B, C', *dims)``.
        x: its input.
        halo: how far the neighbourhood reaches in each direction, voxels: the sum of the radii of the module's kernels.
        size: voxels of a tile along each of the last ``len(size)`` dimensions, 0 for all; a last tile that would be smaller
            than the halo joins the one before.

    Returns:
        The module's output.

    Raises:
        ValueError: ``halo`` or ``size`` is negative, or there are more sizes than dimensions.
    """
    if halo < 0 or min(size, default=0) < 0 or len(size) > x.dim() - 2:
        raise ValueError(
            f"expected halo and up to {x.dim() - 2} sizes not to be negative, got {halo} and {tuple(size)}"
        )
    tiles = list(_tiles(x.shape, halo, size))
    if len(tiles) == 1 or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return module(x)
    parameters = list(module.parameters())
    return _Tiled.apply(module, tiles, parameters, x, *parameters)


def _tiles(shape: Sequence[int], halo: int, size: Sequence[int]) -> Iterator[tuple[Slices, Slices, Slices]]:
    """Yield each tile with its halo, the tile, and the tile's place in what the module makes of the first."""
    ranges = []
    for n, extent in zip(shape[len(shape) - len(size) :], size, strict=True):
        starts = list(range(0, n, extent or n))
        if len(starts) > 1 and n - starts[-1] < halo:
            starts.pop()
        ranges.append([(a, b, n) for a, b in zip(starts, [*starts[1:], n], strict=True)])
    for tile in itertools.product(*ranges):
        outer = [slice(max(0, a - halo), min(n, b + halo)) for a, b, n in tile]
        inner = [slice(a, b) for a, b, _ in tile]
        place = [slice(a - o.start, b - o.start) for (a, b, _), o in zip(tile, outer, strict=True)]
        yield (..., *outer), (..., *inner), (..., *place)


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
