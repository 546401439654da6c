"""Memory and computation of a chain against its depth, under each memory strategy: ``python -m memnet depth``."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from memnet.benchmarks.measurement import measure_in_turn
from memnet.benchmarks.records import write_whole
from memnet.benchmarks.tables import machine, markdown_table, shown
from memnet.chain import Chain, Memory
from memnet.couplings import AdditiveCoupling
from memnet.nets.segmentation import norm_act_conv

__all__ = ["GROWTH", "DepthCost", "Fit", "draw_depths", "fit_depths", "measure_depths", "table"]

GROWTH: dict[Memory, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "store": ("L", lambda depth: depth),
    "checkpoint": ("sqrt(L)", np.sqrt),
    "recursive": ("log2(L)", np.log2),
    "invert": ("1", np.ones_like),
}
"""How the memory of each strategy should grow with the depth L, in words and as a function."""


@dataclass(frozen=True)
class DepthCost:
    """One forward and backward pass of a chain.

    Attributes:
        memory: the strategy.
        depth: the number of couplings.
        peak: bytes alive at once beyond the input, parameters and their gradients apart.
        flops: floating-point operations of the convolutions.
        seconds: median time; only to be compared with that of other strategies of the same depth, measured in turn.
    """

    memory: Memory
    depth: int
    peak: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class Fit:
    """How the memory of one strategy grows with the depth L.

    Attributes:
        memory: the strategy.
        exponent: p of the least-squares line of log(peak) against log(L), peak ~ L^p.
        growth: the law expected, g(L).
        offset: a of the least-squares fit peak = a + b g(L), bytes.
        slope: b, bytes; 0 for g(L) = 1.
        r_squared: the share of the peaks' variance that a + b g(L) explains; None for g(L) = 1, which explains none.
    """

    memory: Memory
    exponent: float
    growth: str
    offset: float
    slope: float
    r_squared: float | None


def measure_depths(
    depths: Sequence[int], channels: int = 16, size: int = 16, rounds: int = 3, device: str = "cpu"
) -> list[DepthCost]:
    """Measure a chain of additive couplings of instance norm, leaky ReLU and 3^3 convolution, under every strategy.

    Args:
        depths: numbers of couplings.
        channels: channels of each of the two streams, ``(2, channels, size, size, size)`` in float32.
        size: side of the cube, voxels.
        rounds: each times one pass under every strategy in turn.
        device: ``cpu`` or ``cuda``.

    Returns:
        A measurement for each depth and strategy, in this order.

    Raises:
        ValueError: a depth is less than 1.
    """
    costs = []
    for depth in depths:
        if depth < 1:
            raise ValueError(f"depth is {depth}, expected at least 1")
        torch.manual_seed(0)
        chain = Chain(
            AdditiveCoupling(norm_act_conv(3, channels, channels), norm_act_conv(3, channels, channels))
            for _ in range(depth)
        ).to(device)
        state = [torch.randn(2, channels, size, size, size, device=device, requires_grad=True) for _ in range(2)]
        upstream = [torch.randn_like(x) for x in state]
        run = partial(_forward_and_backward, state, upstream)
        chains = {memory: copy.deepcopy(chain) for memory in get_args(Memory)}
        for memory, network in chains.items():
            network.memory = memory
        for memory, cost in measure_in_turn(run, chains, rounds, device).items():
            costs.append(DepthCost(memory, depth, cost.peak, cost.flops, cost.median))  # type: ignore[arg-type]
    return costs


def fit_depths(costs: Sequence[DepthCost]) -> list[Fit]:
    """Fit the growth of the peak memory with the depth, for each strategy measured.

    Raises:
        ValueError: fewer than three depths were measured, through which any line would fit.
    """
    fits = []
    for memory, (growth, law) in GROWTH.items():
        mine = [cost for cost in costs if cost.memory == memory]
        if len({cost.depth for cost in mine}) < 3:
            raise ValueError(f"{len(mine)} depths were measured under {memory}, expected at least 3")
        depth, peak = (np.array([getattr(cost, key) for cost in mine], float) for key in ("depth", "peak"))
        exponent = np.polyfit(np.log(depth), np.log(peak), 1)[0]
        offset, slope, r_squared = peak.mean(), 0.0, None
        if np.ptp(law(depth)) > 0:
            slope, offset = np.polyfit(law(depth), peak, 1)
            residual = peak - offset - slope * law(depth)
            r_squared = float(1 - residual.var() / peak.var())
        fits.append(Fit(memory, float(exponent), growth, float(offset), float(slope), r_squared))
    return fits


def table(costs: Sequence[DepthCost], fits: Sequence[Fit]) -> str:
    """Return two markdown tables: the measurements by depth, and the fits."""
    by_depth: dict[int, dict[str, DepthCost]] = {}
    for cost in costs:
        by_depth.setdefault(cost.depth, {})[cost.memory] = cost
    rerun = [memory for memory in GROWTH if memory != "store"]
    columns = [f"{m}, MiB" for m in GROWTH] + [f"FLOPs, {m}" for m in rerun] + [f"time, {m}" for m in rerun]
    rows = []
    for depth, found in by_depth.items():
        stored = found["store"]
        cells = [shown(found[m].peak / 2**20, 1) for m in GROWTH]
        cells += [shown(found[m].flops / stored.flops, 2) for m in rerun]
        rows.append([depth, *cells, *(shown(found[m].seconds / stored.seconds, 2) for m in rerun)])
    growth = []
    for fit in fits:
        term = f" + {fit.slope / 2**20:.2f} {fit.growth}" if fit.r_squared is not None else ""
        exponent = shown(round(fit.exponent, 2) + 0.0, 2)
        growth.append([fit.memory, exponent, fit.growth, f"{fit.offset / 2**20:.1f}{term}", shown(fit.r_squared, 4)])
    titles = ["`memory`", "memory ~ L^p, p", "expected growth", "fit, MiB", "R²"]
    return f"{markdown_table(['L', *columns], rows)}\n\n{markdown_table(titles, growth)}"


def draw_depths(costs: Sequence[DepthCost], fits: Sequence[Fit], file: str | Path) -> None:
    """Draw memory and computation against depth: dots are measured, lines are fits.

    Args:
        costs: from :func:`measure_depths`.
        fits: from :func:`fit_depths`; the line of each strategy's memory is a + b g(L).
        file: the picture to write, PNG.
    """
    from matplotlib.figure import Figure  # takes seconds to import

    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=110)
    memory_axes, work_axes = figure.subplots(1, 2)
    stored = {cost.depth: cost.flops for cost in costs if cost.memory == "store"}
    for i, fit in enumerate(fits):
        mine = [cost for cost in costs if cost.memory == fit.memory]
        depth = np.array([cost.depth for cost in mine], float)
        fine = np.geomspace(depth.min(), depth.max(), 100)
        line = (fit.offset + fit.slope * GROWTH[fit.memory][1](fine)) / 2**20
        # hollow and dashed, so that what lies under it is seen
        marker, style = (("o", "-"), ("o", "-"), ("o", "-"), ("s", "--"))[i]
        dots = {"ls": "", "marker": marker, "color": f"C{i}", "mfc": "none" if style == "--" else None, "ms": 5 + i}
        memory_axes.plot(depth, [cost.peak / 2**20 for cost in mine], **dots)
        term = "" if fit.r_squared is None else f" + {fit.slope / 2**20:.2f} {fit.growth}"
        label = f"{fit.memory}: {fit.offset / 2**20:.1f}{term}"
        memory_axes.plot(fine, line, style, lw=1, color=f"C{i}", label=label)
        ratios = [cost.flops / stored[cost.depth] for cost in mine]
        slope, offset = np.polyfit(np.log2(depth), ratios, 1)
        label = f"{fit.memory}: {offset:.2f}" + (f" + {slope:.2f} log2(L)" if abs(slope) > 0.005 else "")
        work_axes.plot(depth, ratios, **dots)
        work_axes.plot(fine, offset + slope * np.log2(fine), style, lw=1, color=f"C{i}", label=label)
    memory_axes.set(yscale="log", ylabel="peak memory of activations, MiB", title="memory")
    work_axes.set(ylabel="FLOPs, relative to store", title="computation")
    for axes in (memory_axes, work_axes):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(stored), [str(depth) for depth in sorted(stored)])
        axes.set_xlabel("couplings in the chain, L")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file)


def add_parser(commands: Any) -> None:
    """Add the command ``depth`` to the subparsers of the command line."""
    parser = commands.add_parser("depth", help="measure memory and computation of a chain against its depth")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64], help="numbers of couplings")
    parser.add_argument("--channels", type=int, default=16, help="channels of each stream")
    parser.add_argument("--size", type=int, default=16, help="side of the cube, voxels")
    parser.add_argument("--rounds", type=int, default=3, help="timed passes of each")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", help="folder to write depth.json and depth.png to")
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
    a = arguments
    if len(set(a.depths)) < 3:
        raise ValueError(f"--depths: growth is fitted to at least 3 depths, got {' '.join(map(str, a.depths))}")
    costs = measure_depths(a.depths, a.channels, a.size, a.rounds, a.device)
    fits = fit_depths(costs)
    print(table(costs, fits))
    if a.output_dir:
        folder = Path(a.output_dir)
        content = {
            "machine": machine(a.device),
            "channels": a.channels,
            "size": a.size,
            "costs": [asdict(cost) for cost in costs],
            "fits": [asdict(fit) for fit in fits],
        }
        write_whole(folder / "depth.json", json.dumps(content, indent=1) + "\n")
        draw_depths(costs, fits, folder / "depth.png")


def _forward_and_backward(state: Sequence[torch.Tensor], upstream: Sequence[torch.Tensor], chain: Chain) -> None:
    torch.autograd.backward(chain(*state), upstream)
    for tensor in state:
        tensor.grad = None  # now, so that none is alive where the next step's memory begins to count
