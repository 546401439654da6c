"""Whether channels-last memory or ``torch.compile`` pays in a training step: ``python -m memnet layouts``."""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from memnet.benchmarks.measurement import Cost, measure_in_turn
from memnet.benchmarks.tables import machine, markdown_table, shown, shown_range
from memnet.benchmarks.training_memory import training_step
from memnet.workflow.networks import NETWORKS, segmentation_network

__all__ = ["LAYOUTS", "measure", "table"]

LAYOUTS = ("contiguous", "channels last", "compiled", "channels last, compiled")


def measure(
    network: str,
    patch: int = 64,
    precision: str = "float32",
    device: str = "cpu",
    rounds: int = 3,
    layouts: Sequence[str] = LAYOUTS,
    **options: Any,
) -> dict[str, Cost]:
    """Measure one training step (forward pass, loss, backward pass) of the same weights in several layouts, in turn.

    Args:
        network: ``baseline``, ``partially`` or ``fully``.
        patch: side of the cubic patch, voxels; batch size 1, two channels in and four classes out.
        precision: ``float32``, or ``bfloat16`` for autocast.
        device: ``cpu`` or ``cuda``.
        rounds: timed steps of each; 0 measures memory alone.
        layouts: some of :data:`LAYOUTS`.
        options: of the network.

    Raises:
        ValueError: a layout is unknown.
    """
    unknown = set(layouts) - set(LAYOUTS)
    if unknown:
        raise ValueError(f"layouts are {'; '.join(LAYOUTS)}, got {'; '.join(sorted(unknown))}")
    torch.manual_seed(0)
    plain = segmentation_network(network, True, spatial_dims=3, in_channels=2, out_channels=4, **options).to(device)
    laid_out = {name: _LaidOut(copy.deepcopy(plain), name) for name in layouts}
    return measure_in_turn(training_step(patch, precision, device), laid_out, rounds, device)


class _LaidOut(nn.Module):
    """A network with its weights and input in a memory format, compiled or not."""

    def __init__(self, network: nn.Module, layout: str) -> None:
        super().__init__()
        self.format = torch.channels_last_3d if "channels last" in layout else torch.contiguous_format
        self.network = network.to(memory_format=self.format)  # type: ignore[call-overload]
        self.run = torch.compile(self.network) if "compiled" in layout else self.network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x.contiguous(memory_format=self.format))


def table(measured: Mapping[tuple[str, int, str], Mapping[str, Cost]]) -> str:
    """Return a markdown table.

    Args:
        measured: the costs by layout, by network, patch and precision; ratios are to the first layout of each.
    """
    rows = []
    for (network, patch, precision), costs in measured.items():
        first = next(iter(costs.values()))
        for layout, cost in costs.items():
            rows.append(
                [network, f"{patch}^3", precision, layout, shown(cost.peak / 2**20, 0)]
                + [shown(cost.peak / first.peak, 2), shown_range(cost.ratios(first))]
            )
    titles = ["network", "patch", "precision", "layout", "peak, MiB", "to the first", "time to the first"]
    return markdown_table(titles, rows)


def add_parser(commands: Any) -> None:
    """Add the command ``layouts`` to the command line."""
    parser = commands.add_parser(
        "layouts", help="measure whether channels-last memory or torch.compile pays in a training step"
    )
    parser.add_argument("--networks", choices=list(NETWORKS), nargs="+", default=list(NETWORKS))
    parser.add_argument("--layouts", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    parser.add_argument("--patch", type=int, nargs="+", default=[64], help="sides of the cubic patches, voxels")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], nargs="+", default=["float32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each; 0 measures memory alone")
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
    device = arguments.device
    print(f"{machine(device)}\n")
    print(table({}))
    for patch, precision, network in itertools.product(arguments.patch, arguments.precision, arguments.networks):
        costs = measure(network, patch, precision, device, arguments.rounds, arguments.layouts)
        found = {(NETWORKS[network], patch, precision): costs}
        print("\n".join(table(found).splitlines()[2:]), flush=True)
