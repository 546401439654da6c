"""Memory, time and gradient error of one training step of MoDL under each strategy: ``python -m memnet unrolled``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from memnet.benchmarks.measurement import measure_in_turn
from memnet.benchmarks.records import write_whole
from memnet.benchmarks.tables import machine, markdown_table, shown
from memnet.mri.operators import SenseOperator
from memnet.nets.modl import MoDL
from memnet.nets.modl_steps import DataConsistency, Regularization, ResidualCNN

__all__ = ["STRATEGIES", "Cost", "compare_strategies", "draw_costs", "simulated_slab", "unrolled_network"]

# MoDL's arguments; "published" is memory-efficient learning without the guard that would stop it
STRATEGIES: dict[str, dict[str, Any]] = {
    "plain": {"memory": "store", "tile": None},
    "published": {"memory": "invert", "tile": None},
    "checkpoint": {"memory": "checkpoint", "tile": None},
    "tiles": {"memory": "checkpoint"},
    "tiles, images on host": {"memory": "checkpoint", "host": True},
}


class Cost(NamedTuple):
    """One training step.

    Attributes:
        strategy: a word of :data:`STRATEGIES`.
        n_unrolls: unrolls.
        peak: bytes alive at once in forward and backward pass, parameters, their gradients and the data apart.
        seconds: median time of a step.
        error: relative error of all parameters' gradients together, against plain backpropagation.
    """

    strategy: str
    n_unrolls: int
    peak: int
    seconds: float
    error: float


def simulated_slab(
    shape: Sequence[int] = (24, 64, 64), n_coils: int = 8, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Simulate undersampled multi-coil k-space of random smooth blobs.

    Args:
        shape: ``(slices, y, z)``; y and z are Fourier encoded, and a quarter of their samples taken at random.
        n_coils: coils, each seeing its own region.
        device: where the tensors go.

    Returns:
        K-space and coil maps ``(1, n_coils, *shape)`` complex64, and the mask ``(1, 1, 1, y, z)`` bool.
    """
    generator = torch.Generator().manual_seed(0)

    def smooth(n: int) -> torch.Tensor:
        control = torch.randn(n, 2, 4, 6, 6, generator=generator)
        fields = torch.nn.functional.interpolate(control, tuple(shape), mode="trilinear", align_corners=True)
        return torch.complex(fields[:, 0].contiguous(), fields[:, 1].contiguous())

    csm = smooth(n_coils)[None]
    csm = csm / csm.abs().square().sum(1, keepdim=True).sqrt()
    mask = torch.rand(1, 1, 1, *shape[1:], generator=generator) < 0.25
    mask[..., shape[1] // 2 - 4 : shape[1] // 2 + 4, shape[2] // 2 - 4 : shape[2] // 2 + 4] = True
    csm, mask, image = (x.to(device) for x in (csm, mask, smooth(1)))
    return SenseOperator(csm, mask).forward(image), csm, mask


def unrolled_network(
    strategy: str,
    n_unrolls: int,
    spatial_dims: int = 3,
    channels: int = 32,
    tile: Sequence[int] = (64,),
    cg_iterations: int = 8,
) -> MoDL:
    """Build MoDL for a strategy whose error is to be measured, not refused.

    Args:
        strategy: a word of :data:`STRATEGIES`.
        n_unrolls: unrolls.
        spatial_dims: of the regulariser's convolutions.
        channels: its filters.
        tile: tiles of the strategies that have them.
        cg_iterations: iterations of each data consistency.
    """
    consistency = DataConsistency(max_iterations=cg_iterations, drift_tolerance=float("inf"))
    arguments = {"tile": tile} | STRATEGIES[strategy]
    cnn = ResidualCNN(spatial_dims, channels)
    regularizer = Regularization(cnn, arguments.pop("tile"), drift_tolerance=float("inf"))
    return MoDL(n_unrolls=n_unrolls, regularizer=regularizer, data_consistency=consistency, **arguments)


def compare_strategies(
    n_unrolls: int,
    shape: Sequence[int] = (24, 64, 64),
    n_coils: int = 8,
    channels: int = 32,
    tile: Sequence[int] = (64,),
    cg_iterations: int = 8,
    rounds: int = 3,
    strategies: Sequence[str] = tuple(STRATEGIES),
    device: str = "cpu",
) -> list[Cost]:
    """Measure one training step of the same network under each strategy, in turn.

    Args:
        n_unrolls: unrolls.
        shape: see :func:`simulated_slab`.
        n_coils: coils.
        channels: filters of the regulariser.
        tile: tiles of the strategies that have them.
        cg_iterations: iterations of each data consistency.
        rounds: each times one step of every strategy, so that all meet the same load of the machine; 0 measures memory alone.
        strategies: words of :data:`STRATEGIES`; ``plain`` comes first whether named or not, for the gradients.
        device: ``cpu`` or ``cuda``.

    Raises:
        ValueError: a strategy is unknown.
    """
    unknown = [s for s in strategies if s not in STRATEGIES]
    if unknown:
        raise ValueError(f"strategies are {', '.join(STRATEGIES)}, got {', '.join(unknown)}")
    data = simulated_slab(shape, n_coils, device)
    weights = None
    networks: dict[str, MoDL] = {}
    for name in dict.fromkeys(["plain", *strategies]):
        torch.manual_seed(0)
        net = unrolled_network(name, n_unrolls, len(shape), channels, tile, cg_iterations).to(device)
        weights = net.state_dict() if weights is None else weights
        net.load_state_dict(weights)
        networks[name] = net

    def step(net: MoDL) -> None:
        net(*data).abs().square().mean().backward()

    costs = measure_in_turn(step, networks, rounds, device, warm_up=rounds > 0)
    gradients = {
        name: torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        for name, net in networks.items()
    }
    exact = gradients["plain"]
    return [
        Cost(name, n_unrolls, cost.peak, cost.median, float((gradients[name] - exact).norm() / exact.norm()))
        for name, cost in costs.items()
    ]


def table(costs: Sequence[Cost]) -> str:
    """Return a markdown table; ratios are to plain backpropagation with as many unrolls."""
    plain = {cost.n_unrolls: cost for cost in costs if cost.strategy == "plain"}
    rows = []
    for c in costs:
        reference = plain[c.n_unrolls]
        memory = [shown(c.peak / 2**20, 0), shown(c.peak / reference.peak, 2)]
        rows.append([c.strategy, c.n_unrolls, *memory, shown(c.seconds / reference.seconds, 2), f"{c.error:.1e}"])
    return markdown_table(["strategy", "unrolls", "peak, MiB", "to plain", "time to plain", "gradient error"], rows)


def draw_costs(costs: Sequence[Cost], file: str | Path) -> None:
    """Draw memory and time against the number of unrolls.

    Args:
        costs: from :func:`compare_strategies`, for at least one number of unrolls.
        file: the picture to write, PNG.
    """
    from matplotlib.figure import Figure  # takes seconds to import

    figure = Figure(figsize=(9, 3.8), layout="constrained", dpi=110)
    memory_axes, time_axes = figure.subplots(1, 2)
    unit = min((cost for cost in costs if cost.strategy == "plain"), key=lambda cost: cost.n_unrolls)
    for i, name in enumerate(dict.fromkeys(cost.strategy for cost in costs)):
        mine = sorted((cost for cost in costs if cost.strategy == name), key=lambda cost: cost.n_unrolls)
        unrolls = [cost.n_unrolls for cost in mine]
        style = {
            "color": f"C{i}",
            "marker": "osD^v"[i % 5],
            "mfc": "none",
            "ls": ("-", "--", ":")[i % 3],
            "label": name,
        }
        memory_axes.plot(unrolls, [cost.peak / 2**20 for cost in mine], **style)
        time_axes.plot(unrolls, [cost.seconds / unit.seconds for cost in mine], **style)
    memory_axes.set_yscale("log", base=2)
    memory_axes.yaxis.set_major_formatter("{x:g}")
    memory_axes.set(ylabel="peak memory of a step, MiB")
    time_axes.set(ylabel=f"time of a step (plain, N = {unit.n_unrolls}: 1)", ylim=(0, None))
    for axes in (memory_axes, time_axes):
        axes.set_xticks(sorted({cost.n_unrolls for cost in costs}))
        axes.set_xlabel("unrolls, N")
        axes.grid(alpha=0.3)
    figure.legend(*memory_axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(file)


def add_parser(commands: Any) -> None:
    """Add the command ``unrolled`` to the command line."""
    parser = commands.add_parser("unrolled", help="measure a training step of MoDL under each memory strategy")
    parser.add_argument("--unrolls", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--shape", type=int, nargs=3, default=[24, 64, 192], help="slices, y and z of the slab")
    parser.add_argument("--coils", type=int, default=8)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--tile", type=int, nargs="+", default=[64], help="extents of tiles along the last dimensions")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each strategy")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=Path, help="folder to write unrolled.json and unrolled.png to")
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
    print(f"{machine(arguments.device)}\n", flush=True)
    costs: list[Cost] = []
    for n_unrolls in arguments.unrolls:
        costs += compare_strategies(
            n_unrolls,
            arguments.shape,
            arguments.coils,
            arguments.channels,
            arguments.tile,
            rounds=arguments.rounds,
            strategies=arguments.strategies,
            device=arguments.device,
        )
        print(table(costs), flush=True)
    if arguments.output_dir:
        content = {
            "machine": machine(arguments.device),
            "shape": arguments.shape,
            "coils": arguments.coils,
            "channels": arguments.channels,
            "tile": arguments.tile,
            "costs": [cost._asdict() for cost in costs],
        }
        write_whole(arguments.output_dir / "unrolled.json", json.dumps(content, indent=1) + "\n")
        draw_costs(costs, arguments.output_dir / "unrolled.png")
