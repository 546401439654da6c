"""Memory and time of a training step of the super-resolution networks: ``python -m memnet superresolution``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from memnet.benchmarks.measurement import measure_in_turn
from memnet.benchmarks.tables import machine, markdown_table, shown
from memnet.chain import Memory
from memnet.nets.espcn import ESPCNRevNet

__all__ = ["StepCost", "measure_steps", "table", "training_step"]


@dataclass(frozen=True)
class StepCost:
    """One training step: forward pass, squared error, backward pass.

    Attributes:
        n_blocks: blocks a stack; 0 is ESPCN.
        memory: the memory strategy.
        peak: bytes alive at once beyond the batch, parameters and their gradients apart.
        seconds: median time, on a CPU of the processor, measured in turn with the others; NaN where none was timed.
    """

    n_blocks: int
    memory: Memory
    peak: int
    seconds: float


def training_step(batch_size: int = 12, patch_size: int = 11, device: str = "cpu") -> Callable[[nn.Module], None]:
    """Return a training step of a network of six channels and an upsampling rate of 2, on one batch of noise.

    Args:
        batch_size: patches a step.
        patch_size: voxels a side of a patch.
        device: ``cpu`` or ``cuda``.
    """
    torch.manual_seed(0)
    image = torch.randn(batch_size, 6, *(patch_size,) * 3, device=device)
    label = torch.randn(batch_size, 6, *(2 * (patch_size - 4),) * 3, device=device)

    def step(network: nn.Module) -> None:
        functional.mse_loss(network(image), label).backward()

    return step


def measure_steps(
    cases: Sequence[tuple[int, Memory]],
    batch_size: int = 12,
    patch_size: int = 11,
    channels: Sequence[int] = (50, 100),
    steps: int = 5,
    device: str = "cpu",
) -> list[StepCost]:
    """Measure networks of six channels and an upsampling rate of 2.

    Args:
        cases: blocks a stack and memory strategy of each.
        batch_size: patches a step.
        patch_size: voxels a side of a patch.
        channels: see :class:`memnet.ESPCNRevNet`.
        steps: timed steps of each; 0 measures memory alone.
        device: ``cpu`` or ``cuda``.
    """
    step = training_step(batch_size, patch_size, device)
    networks = {
        f"{n} {memory}": ESPCNRevNet(n_blocks=n, channels=channels, memory=memory).to(device) for n, memory in cases
    }
    found = measure_in_turn(step, networks, steps, device)
    costs = [found[f"{n} {memory}"] for n, memory in cases]
    return [StepCost(n, memory, cost.peak, cost.median) for (n, memory), cost in zip(cases, costs, strict=True)]


def table(costs: Sequence[StepCost]) -> str:
    """Return a markdown table; time is compared with ``store`` of as many blocks."""
    stored = {cost.n_blocks: cost.seconds for cost in costs if cost.memory == "store"}
    rows = []
    for cost in costs:
        ratio = cost.seconds / stored.get(cost.n_blocks, math.nan)
        name = f"ESPCN-RN{cost.n_blocks}" if cost.n_blocks else "ESPCN"
        rows.append([name, cost.memory, shown(cost.peak / 2**20, 1), shown(cost.seconds, 3), shown(ratio, 2)])
    return markdown_table(["network", "`memory`", "peak, MiB", "time, s", "to `store`"], rows)


def add_parser(commands: Any) -> None:
    """Add the command ``superresolution`` to the command line."""
    parser = commands.add_parser("superresolution", help="measure memory and time of a step of ESPCN and ESPCN-RN")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4], help="blocks a stack, besides ESPCN's 0")
    parser.add_argument("--memory", nargs="+", default=["store", "checkpoint", "recursive", "invert"])
    parser.add_argument("--batch_size", type=int, default=12)
    parser.add_argument("--patch_size", type=int, default=11)
    parser.add_argument("--channels", type=int, nargs=2, default=[50, 100])
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each; 0 measures memory alone")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
    cases: list[tuple[int, Memory]] = [(0, "store")]
    cases += [(n, memory) for n in arguments.blocks for memory in arguments.memory]
    costs = measure_steps(
        cases, arguments.batch_size, arguments.patch_size, arguments.channels, arguments.steps, arguments.device
    )
    print(f"{machine(arguments.device)}\n\n{table(costs)}")
