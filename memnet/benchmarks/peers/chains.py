"""Memory, time and computation of a chain of couplings in each implementation, against its depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from memnet.benchmarks.measurement import Cost, measure_in_turn
from memnet.benchmarks.peers.implementations import IMPLEMENTATIONS, norm_act_conv_branches
from memnet.benchmarks.tables import markdown_table, shown, shown_range

__all__ = ["NAMES", "ChainCost", "chain_table", "draw_chains", "measure_chains"]

NAMES = tuple(name for name in IMPLEMENTATIONS if name != "store")  # which keeps what plain autograd keeps


@dataclass(frozen=True)
class ChainCost:
    """A training step of one chain.

    Attributes:
        name: a word of :data:`IMPLEMENTATIONS`.
        depth: the number of couplings.
        activations: the peak of the bytes alive at once, in units of the chain's state.
        cost: the same in bytes, time and operations.
    """

    name: str
    depth: int
    activations: float
    cost: Cost


def measure_chains(
    depths: Sequence[int],
    timed_depth: int = 16,
    channels: int = 32,
    size: int = 48,
    rounds: int = 3,
    names: Sequence[str] = NAMES,
    device: str = "cpu",
    batch_size: int = 1,
) -> list[ChainCost]:
    """Measure a training step of chains of group norm, leaky ReLU and 3^3 convolution, in one process and in turn.

    The step is a forward pass, the mean of the output and a backward pass to all parameters and the input: a loss that keeps
    nothing, so that what is measured is the chain's. It gets its input as a network's stem would hand it over: nobody else
    holds it.

    Args:
        depths: numbers of couplings at which memory is measured.
        timed_depth: the one at which time is taken and operations are counted, whether it is among ``depths`` or not.
        channels: of both streams together; the state is ``(batch_size, channels, size, size, size)``, float32.
        size: side of the cube, voxels.
        rounds: timed steps of each.
        names: words of :data:`IMPLEMENTATIONS`; what is not installed is left out.
        device: ``cpu`` or ``cuda``.
        batch_size: on a CPU 2 or more for a small cube, since PyTorch's own kernel would unfold a single one's channels.
    """
    x = torch.randn(batch_size, channels, size, size, size, device=device, requires_grad=True)

    def step(network: nn.Module) -> None:
        network(x.clone()).mean().backward()
        x.grad = None  # now, so that it is not alive where the next step's memory begins to count

    found = []
    for depth in sorted({*depths, timed_depth}):
        networks = {}
        for name in names:
            if IMPLEMENTATIONS[name].missing is None:
                torch.manual_seed(0)
                branches = norm_act_conv_branches(depth, channels // 2)
                networks[name] = IMPLEMENTATIONS[name].build(branches).to(device)
        timed = depth == timed_depth
        for name, cost in measure_in_turn(step, networks, rounds if timed else 0, device, warm_up=timed).items():
            found.append(ChainCost(name, depth, cost.peak / x.nbytes, cost))
    return found


def chain_table(costs: Sequence[ChainCost], names: Sequence[str] = NAMES) -> str:
    """Return a markdown table with a row for each implementation, those that are missing included."""
    if not costs:
        rows = [[IMPLEMENTATIONS[name].title, IMPLEMENTATIONS[name].missing or "-"] for name in names]
        return markdown_table(["implementation", "why not"], rows)
    depths = sorted({cost.depth for cost in costs})
    timed = next(cost.depth for cost in costs if cost.cost.flops)
    by_case = {(cost.name, cost.depth): cost for cost in costs}
    plain = by_case.get(("plain", timed))
    columns = ["implementation", *(f"L = {depth}, MiB" for depth in depths), f"L = {timed}, states"]
    columns += [f"growth {depths[0]} to {depths[-1]}", "time to plain", "operations to plain"]
    rows = []
    for name in names:
        implementation = IMPLEMENTATIONS[name]
        if implementation.missing is not None:
            rows.append([implementation.title, implementation.missing, *["-"] * (len(columns) - 2)])
            continue
        mine = [by_case[name, depth] for depth in depths]
        at_timed = by_case[name, timed]
        growth = mine[-1].cost.peak / mine[0].cost.peak - 1
        row = [implementation.title, *(shown(cost.cost.peak / 2**20, 1) for cost in mine)]
        row += [shown(at_timed.activations, 2), f"{100 * growth:+.1f} %"]
        row += [shown_range(at_timed.cost.ratios(plain.cost)) if plain else "-"]
        rows.append([*row, shown(at_timed.cost.flops / plain.cost.flops, 3) if plain else "-"])
    return markdown_table(columns, rows)


def draw_chains(costs: Sequence[ChainCost], file: str | Path) -> None:
    """Draw memory against depth, and memory against time at the depth that was timed.

    Args:
        costs: from :func:`measure_chains`.
        file: the picture to write, PNG.
    """
    from matplotlib.figure import Figure  # takes seconds to import

    figure = Figure(figsize=(10, 4), layout="constrained", dpi=110)
    depth_axes, time_axes = figure.subplots(1, 2, width_ratios=[3, 2])
    names = list(dict.fromkeys(cost.name for cost in costs))
    timed = {cost.name: cost for cost in costs if cost.cost.flops}
    depths = sorted({cost.depth for cost in costs})
    for i, name in enumerate(names):
        ours = name in ("checkpoint", "invert")
        style = {"color": f"C{i}", "marker": "os^Dv<>Ph*"[i % 10], "ms": 9 if ours else 5}
        mine = sorted((cost for cost in costs if cost.name == name), key=lambda cost: cost.depth)
        title = IMPLEMENTATIONS[name].title.replace("`", "")
        line = {"ls": "-" if ours else "--", "lw": 2 if ours else 1, "label": title, "mfc": "none"}
        depth_axes.plot(depths, [cost.activations for cost in mine], **style, **line)
        if "plain" in timed and timed[name].cost.seconds:
            time_axes.plot(
                timed[name].cost.pace(timed["plain"].cost), timed[name].activations, **style, ls="", mfc="none"
            )
    depth_axes.axhline(2, color="0.5", lw=1)
    depth_axes.text(depths[-1], 1.9, "floor: state and its gradient", ha="right", va="top", fontsize=8, color="0.4")
    depth_axes.set(xlabel="couplings in the chain, L", ylabel="peak memory, states", ylim=(1.5, None))
    depth_axes.set_xscale("log", base=2)
    depth_axes.set_xticks(depths, [str(depth) for depth in depths])
    time_axes.set(xlabel=f"time to plain autograd, L = {next(iter(timed.values())).depth}", ylim=depth_axes.get_ylim())
    for axes in (depth_axes, time_axes):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(file)
