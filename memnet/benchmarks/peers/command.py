"""The command ``python -m memnet bench``: every comparison with other implementations, tables, pictures and raw numbers."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from memnet.benchmarks import unrolled
from memnet.benchmarks.peers.chains import NAMES, chain_table, draw_chains, measure_chains
from memnet.benchmarks.peers.gradients import drift_table, gradient_table, measure_drift, measure_gradients
from memnet.benchmarks.peers.implementations import IMPLEMENTATIONS
from memnet.benchmarks.peers.pitfalls import pitfall_table, probe_all
from memnet.benchmarks.peers.superresolution import measure_superresolution, superresolution_table
from memnet.benchmarks.peers.unets import U_NETS, measure_unets, plan_unets, unet_table
from memnet.benchmarks.records import write_whole
from memnet.benchmarks.tables import machine

__all__ = ["PARTS"]

Part = tuple[str, Sequence[Any]]
"""The tables and what follows from them, as markdown, and the raw records."""


def _chains(a: argparse.Namespace, folder: Path) -> Part:
    depths, size, channels, rounds = ([2, 4], 8, 4, 1) if a.quick else (a.depths, a.size, a.channels, a.rounds)
    names = [name for name in NAMES if not a.implementations or name in a.implementations]
    costs = measure_chains(
        depths, 4 if a.quick else a.timed_depth, channels, size, rounds, names, a.device, a.batch_size
    )
    picture = "\n\n![Memory against depth and time](chains.png)" if costs else ""
    if costs:
        draw_chains(costs, folder / "chains.png")
    title = f"Chains of L couplings, {channels} channels, {size}^3, batch size {a.batch_size}"
    return f"## {title}\n\n{chain_table(costs, names)}{picture}", costs


def _gradients(a: argparse.Namespace, folder: Path) -> Part:
    depth, channels, size = (2, 4, 4) if a.quick else (128, 16, 12)
    errors, drifts = measure_gradients(depth, channels, size), measure_drift(depth, channels, size)
    title = f"Gradients of {depth} couplings, {channels} channels, {size}^3, batch size 2, float32"
    return f"## {title}\n\n{gradient_table(errors)}\n\nRun forward and inverted:\n\n{drift_table(drifts)}", [
        *errors,
        *drifts,
    ]


def _unets(a: argparse.Namespace, folder: Path) -> Part:
    names = ("basic_unet", "unet", "fully", "fully_store") if a.quick else tuple(a.networks)
    costs = []
    for patch in [32] if a.quick else a.patches:  # below 32 MONAI's UNet has nothing left to normalise
        costs += measure_unets(patch, 1 if a.quick else a.rounds, names, a.device)
    for patch in [48] if a.quick else a.planned_patches:
        costs += plan_unets(patch, names)
    return f"## U-Nets, 4 channels to 3 classes, batch size 1, float32\n\n{unet_table(costs, names)}", costs


def _espcn(a: argparse.Namespace, folder: Path) -> Part:
    n_blocks, batch_size, patch_size = (1, 1, 5) if a.quick else (4, 12, 11)
    costs = measure_superresolution(n_blocks, batch_size, patch_size, 1 if a.quick else a.rounds, a.device)
    title = f"ESPCN-RN{n_blocks}, {batch_size} patches of {patch_size}^3"
    return f"## {title}\n\n{superresolution_table(costs)}", [
        {"name": name} | asdict(cost) for name, cost in costs.items()
    ]


def _unrolled(a: argparse.Namespace, folder: Path) -> Part:
    shape, channels, tile, rounds = ((2, 8, 16), 4, (8,), 0) if a.quick else ((24, 64, 192), 32, (64,), a.rounds)
    costs: list[unrolled.Cost] = []
    for n_unrolls in [1] if a.quick else a.unrolls:
        costs += unrolled.compare_strategies(n_unrolls, shape, 8, channels, tile, rounds=rounds, device=a.device)
    title = f"MoDL, {' x '.join(map(str, shape))}, 8 coils, {channels} filters, tiles of {tile[0]}"
    return f"## {title}\n\n{unrolled.table(costs)}", [cost._asdict() for cost in costs]


def _pitfalls(a: argparse.Namespace, folder: Path) -> Part:
    names = ("plain", "invert") if a.quick else a.implementations or tuple(IMPLEMENTATIONS)
    answers = probe_all(names)
    legend = "yes: as plain autograd; no: wrong, in silence; or the exception, or how the process ended."
    return f"## What else training asks of a chain\n\n{pitfall_table(answers, names)}\n\n{legend}", [answers]


PARTS: dict[str, Callable[[argparse.Namespace, Path], Part]] = {
    "pitfalls": _pitfalls,
    "chains": _chains,
    "gradients": _gradients,
    "unets": _unets,
    "espcn": _espcn,
    "unrolled": _unrolled,
}
"""The comparisons, by the word that chooses them."""


def add_parser(commands: Any) -> None:
    """Add the command ``bench`` to the command line."""
    parser = commands.add_parser(
        "bench",
        help="memory, time, exactness and behaviour beside other implementations",
        description="Measures memnet beside plain autograd, PyTorch's checkpointing, MemCNN, RevTorch, iUNets, revlib and "
        "MONAI's networks. What is not installed is a row that says so; nothing is installed.",
    )
    parser.add_argument("--output_dir", default="benchmark", help="folder of the tables, pictures and raw numbers")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts; all by default")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 8, 16, 32, 128], help="couplings of the chains")
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=list(IMPLEMENTATIONS),
        help="of the chains and the pitfalls; all by default",
    )
    parser.add_argument("--unrolls", type=int, nargs="+", default=[4, 10], help="of MoDL")
    parser.add_argument("--timed_depth", type=int, default=16, help="couplings of the chains that are timed")
    parser.add_argument("--channels", type=int, default=32, help="channels of the chains")
    parser.add_argument("--size", type=int, default=48, help="side of the chains' cube, voxels")
    parser.add_argument("--batch_size", type=int, default=1, help="of the chains")
    parser.add_argument(
        "--networks", nargs="+", choices=list(U_NETS), default=list(U_NETS), help="of the U-Nets; all by default"
    )
    parser.add_argument("--patches", type=int, nargs="+", default=[64], help="cubes of the U-Nets, voxels")
    parser.add_argument(
        "--planned_patches",
        type=int,
        nargs="*",
        default=[96, 128],
        help="cubes of the U-Nets that are not run but foretold",
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each contender; 0 measures memory alone")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="sizes that prove nothing and take no time")
    parser.set_defaults(function=_run)


def _run(a: argparse.Namespace) -> None:
    folder = Path(a.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted({version for found in IMPLEMENTATIONS.values() if not found.missing for version in found.versions})
    print(f"{machine(a.device)}, {', '.join(there) or 'no other library'}\n", flush=True)
    for name in [part for part in PARTS if part in a.only]:
        begin = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other libraries use what PyTorch has deprecated
            text, records = PARTS[name](a, folder)
        content = {
            "machine": machine(a.device),
            "peers": there,
            "arguments": {key: value for key, value in vars(a).items() if key != "function"},
            "records": [record if isinstance(record, dict) else asdict(record) for record in records],
        }
        write_whole(folder / f"{name}.json", json.dumps(content, indent=1) + "\n")
        write_whole(folder / f"{name}.md", f"{text}\n")
        print(f"{text}\n\n({name}: {time.perf_counter() - begin:.0f} s)\n", flush=True)
