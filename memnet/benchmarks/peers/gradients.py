"""How exact the gradients of a deep chain are in each implementation, and how far inversion without a grid drifts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from memnet.benchmarks.peers.implementations import IMPLEMENTATIONS, Branches, norm_act_conv_branches
from memnet.benchmarks.tables import markdown_table
from memnet.chain import Chain, Memory
from memnet.couplings import AdditiveCoupling, ChannelMerge, ChannelSplit

__all__ = ["Drift", "GradientError", "drift_table", "gradient_table", "measure_drift", "measure_gradients"]

_FRACTION_BITS = (14, 18)


@dataclass(frozen=True)
class GradientError:
    """The gradient of one chain in float32.

    Attributes:
        title: the implementation.
        error: distance of all parameters' gradients together to those of plain autograd in float64, relative to their norm.
        equals_store: whether all gradients are bit for bit those of memnet's ``store``; None for other libraries.
    """

    title: str
    error: float
    equals_store: bool | None = None


@dataclass(frozen=True)
class Drift:
    """A chain run forward and inverted.

    Attributes:
        title: how the streams are added.
        error: distance of the input that comes back to the input, relative to its norm.
    """

    title: str
    error: float


def measure_gradients(depth: int = 128, channels: int = 16, size: int = 12) -> list[GradientError]:
    """Compare the gradients of one chain, same weights and input, with those of plain autograd in float64.

    Args:
        depth: couplings of group norm, leaky ReLU and 3^3 convolution.
        channels: of both streams together; the state is ``(2, channels, size, size, size)``.
        size: side of the cube, voxels.

    Returns:
        Plain autograd, then each implementation that is installed, then memnet on each grid.
    """
    torch.manual_seed(0)
    branches = norm_act_conv_branches(depth, channels // 2)
    x, target = torch.randn(2, 2, channels, size, size, size)

    def gradients(network: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        network = network.to(dtype)
        image = x.to(dtype).requires_grad_()
        functional.mse_loss(
            network(image * 1), target.to(dtype)
        ).backward()  # some take the memory of what they are given
        order = [p for pair in mine for branch in pair for p in branch.parameters()]
        return torch.cat([p.grad.flatten().double() for p in order if p.grad is not None])

    mine = copy.deepcopy(branches)
    exact = gradients(IMPLEMENTATIONS["plain"].build(mine), torch.float64)

    def error(found: torch.Tensor) -> float:
        return float((found - exact).norm() / exact.norm())

    results = []
    for name in ("plain", "memcnn", "revtorch", "iunets", "revlib"):
        if IMPLEMENTATIONS[name].missing is None:
            mine = copy.deepcopy(branches)
            results.append(
                GradientError(IMPLEMENTATIONS[name].title, error(gradients(IMPLEMENTATIONS[name].build(mine))))
            )
    for bits in _FRACTION_BITS:
        stored: torch.Tensor | None = None
        memories: tuple[Memory, ...] = ("store", "invert")
        for memory in memories:
            mine = copy.deepcopy(branches)
            found = gradients(_on_grid(mine, bits, memory))
            stored = found if stored is None else stored
            title = f"memnet `{memory}`, fraction_bits={bits}"
            results.append(GradientError(title, error(found), torch.equal(found, stored)))
    return results


def measure_drift(depth: int = 128, channels: int = 16, size: int = 12) -> list[Drift]:
    """Invert a chain after running it, with streams added in floating point and on the grid.

    Args:
        depth: see :func:`measure_gradients`.
        channels: likewise.
        size: likewise.
    """
    torch.manual_seed(0)
    branches = norm_act_conv_branches(depth, channels // 2)
    start = torch.randn(2, 2, channels // 2, size, size, size).unbind()
    results = []
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            mine = [(f.to(dtype), g.to(dtype)) for f, g in copy.deepcopy(branches)]
            back = _there_and_back(mine, *(x.to(dtype) for x in start))
            results.append(Drift(f"floating point, streams in {_name(dtype)}", _distance(back, start, dtype)))
        for dtype in (torch.float32, torch.bfloat16):
            chain = Chain(AdditiveCoupling(f, g) for f, g in branches)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                first = chain._on_grid(list(start))
                back = chain.inverse(*chain(*start))
            how = "float32" if dtype == torch.float32 else "float32, branches in bfloat16"
            results.append(Drift(f"memnet's grid, streams in {how}", _distance(back, first, torch.float32)))
    return results


def gradient_table(errors: Sequence[GradientError]) -> str:
    """Return a markdown table; the first row, plain autograd in float32, is what the others are compared with."""
    rows = []
    for found in errors:
        equal = {None: "-", True: "yes", False: "no"}[found.equals_store]
        rows.append([found.title, f"{found.error:.1e}", f"{found.error / errors[0].error:.1f}", equal])
    return markdown_table(["implementation", "error against float64", "to plain's own", "equals `store`"], rows)


def drift_table(drifts: Sequence[Drift]) -> str:
    """Return a markdown table of the inversion errors."""
    return markdown_table(["addition", "relative error of the input"], [[d.title, f"{d.error:.1e}"] for d in drifts])


def _on_grid(branches: Branches, fraction_bits: int, memory: Memory) -> nn.Module:
    couplings = [AdditiveCoupling(f, g, fraction_bits) for f, g in branches]
    return Chain([ChannelSplit(), *couplings, ChannelMerge()], memory)


def _there_and_back(branches: Branches, x1: torch.Tensor, x2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    for f, g in branches:
        x1 = x1 + f(x2)
        x2 = x2 + g(x1)
    for f, g in reversed(branches):
        x2 = x2 - g(x1)
        x1 = x1 - f(x2)
    return x1, x2


def _distance(back: Sequence[torch.Tensor], start: Sequence[torch.Tensor], dtype: torch.dtype) -> float:
    a, b = (torch.cat([x.to(dtype).double().flatten() for x in tensors]) for tensors in (back, start))
    return float((a - b).norm() / b.norm())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
