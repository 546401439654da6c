"""Memory and time of one training step of the segmentation networks: ``python -m memnet memory``."""

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import monai
import torch
from torch import nn

from memnet.benchmarks.measurement import measure_in_turn
from memnet.benchmarks.tables import machine, markdown_table, shown
from memnet.losses import InvResLoss
from memnet.tiles import Tile
from memnet.workflow.networks import NETWORKS, segmentation_network

__all__ = ["Measurement", "measure", "table", "training_step"]


class Measurement(NamedTuple):
    """One training step of one network.

    Attributes:
        network: its name, ``+ VAE`` where the variational branch trains too, and whether its couplings run in tiles.
        parameters: their number, the variational branch's apart.
        memory: the memory strategy.
        patch: side of the cubic patch, voxels.
        precision: ``float32``, or ``bfloat16`` for autocast.
        peak: bytes alive at once in the forward and backward pass, parameters and their gradients apart.
        seconds: median time of a step; NaN where none was timed.
    """

    network: str
    parameters: int
    memory: str
    patch: int
    precision: str
    peak: int
    seconds: float


def measure(
    network: str,
    memory: str | None,
    patch: int,
    precision: str = "float32",
    device: str = "cpu",
    vae: bool = False,
    steps: int = 3,
    tile: Tile | None = None,
) -> Measurement:
    """Measure a training step (forward pass, loss, backward pass) at batch size 1, two channels in and four classes out.

    The networks have as many parameters as the baseline, within 10 %.

    Args:
        network: ``baseline``, ``partially`` or ``fully``.
        memory: a memory strategy; the network's own default where None.
        patch: side of the cubic patch, voxels.
        precision: ``float32``, or ``bfloat16`` for autocast.
        device: ``cpu`` or ``cuda``.
        vae: train with the variational branch.
        steps: steps timed, after one that is not and the one whose memory is measured; 0 measures memory alone.
        tile: tiles in which the couplings of an invertible network run; None for none.

    Raises:
        ValueError: the network does not know the strategy.
    """
    torch.manual_seed(0)
    options = {"memory": memory, "vae": vae} | ({} if tile is None else {"tile": tile})
    net = segmentation_network(network, True, spatial_dims=3, in_channels=2, out_channels=4, **options)
    net.to(device)
    cost = measure_in_turn(training_step(patch, precision, device), {network: net}, steps, device)[network]
    name = f"{type(net).__name__}{' + VAE' if vae else ''}{'' if tile is None else ', in tiles'}"
    size = sum(p.numel() for key, p in net.named_parameters() if not key.startswith("vae."))
    return Measurement(name, size, str(net.memory), patch, precision, cost.peak, cost.median)


def training_step(patch: int, precision: str = "float32", device: str = "cpu") -> Callable[[nn.Module], None]:
    """Return what makes a training step of a network at batch size 1; arguments as for :func:`measure`."""
    image = torch.rand(1, 2, patch, patch, patch, device=device)
    label = torch.randint(0, 4, (1, 1, patch, patch, patch), device=device)
    loss = InvResLoss()

    def step(network: nn.Module) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            prediction = network(image)
        loss(prediction, label).backward()

    return step


def table(measurements: Sequence[Measurement]) -> str:
    """Return a markdown table; ratios are to the first row of the same patch and precision."""
    rows = []
    first: dict[tuple[int, str], Measurement] = {}
    for m in measurements:
        reference = first.setdefault((m.patch, m.precision), m)
        rows.append(
            [m.network, shown(m.parameters / 1e6, 2), m.memory, f"{m.patch}^3", m.precision, shown(m.peak / 2**20, 0)]
            + [shown(m.peak / reference.peak, 2), shown(m.seconds / reference.seconds, 2)]
        )
    titles = ["network", "parameters, M", "`memory`", "patch", "precision", "peak, MiB", "to the first"]
    return markdown_table([*titles, "time to the first"], rows)


def add_parser(commands: Any) -> None:
    """Add the command ``memory`` to the command line."""
    parser = commands.add_parser("memory", help="measure memory and time of a training step of each network")
    parser.add_argument("--patch", type=int, nargs="+", default=[64], help="sides of the cubic patches, voxels")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], nargs="+", default=["float32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each; 0 measures memory alone")
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
    cases: list[tuple[str, str | None, bool, Tile | None]] = [(network, None, False, None) for network in NETWORKS]
    cases += [("fully", None, True, None), ("fully", None, False, "auto"), ("fully", None, True, "auto")]
    cases += [("fully", "checkpoint", False, None), ("fully", "store", False, None)]
    device = arguments.device
    print(f"{machine(device)}, MONAI {monai.__version__}\n")
    print(table([]))
    found: list[Measurement] = []
    for patch, precision, (network, memory, vae, tile) in itertools.product(
        arguments.patch, arguments.precision, cases
    ):
        found.append(measure(network, memory, patch, precision, device, vae, arguments.steps, tile))
        print(table(found).splitlines()[-1], flush=True)
