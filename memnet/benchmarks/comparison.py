"""Compares segmentation networks on real labelled data: ``python -m memnet compare``."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memnet.benchmarks.contenders import CONTENDERS
from memnet.benchmarks.measurement import measure_in_turn
from memnet.benchmarks.records import Record, read_record, write_whole
from memnet.benchmarks.tables import machine, markdown_table, shown
from memnet.benchmarks.trial import Case, Settings, run_trial
from memnet.datasets import existing_folder, split_folds
from memnet.losses import InvResLoss
from memnet.workflow.allocation import keep_freed_memory
from memnet.workflow.inferers import supports_bfloat16

__all__ = ["cost_table", "find_labelled_volumes", "measure_costs", "score_table"]

_LAYOUTS = (("imagesTr", "labelsTr"), ("images", "labels"))


def find_labelled_volumes(dataset_dir: str | Path, n_folds: int = 5) -> dict[str, list[Case]]:
    """Find the labelled volumes of a folder of the Medical Segmentation Decathlon, and keep every fifth for the test.

    Args:
        dataset_dir: folder with ``imagesTr`` and ``labelsTr`` (or ``images`` and ``labels``) of files of the same names.
        n_folds: one volume in so many is kept apart, in the order of the names: the split depends on nothing else.

    Returns:
        ``training`` and ``test`` cases, ``{"image": file, "label": file}`` each.

    Raises:
        ValueError: a folder or the label of an image is missing, or there are fewer than two volumes.

    References:
        The Medical Segmentation Decathlon (Antonelli et al., 2022), https://doi.org/10.1038/s41467-022-30695-9
    """
    root = existing_folder(dataset_dir, "a Decathlon task with the folders imagesTr and labelsTr")
    found = next(((root / i, root / j) for i, j in _LAYOUTS if (root / i).is_dir() and (root / j).is_dir()), None)
    if found is None:
        raise ValueError(f"{root}: holds no folders imagesTr and labelsTr, nor images and labels")
    images, labels = found
    cases = []
    for image in sorted(f for f in images.glob("*.nii*") if not f.name.startswith(".")):
        if not (labels / image.name).is_file():
            raise ValueError(f"{labels / image.name}: no such file, the label of {image}")
        cases.append({"image": str(image), "label": str(labels / image.name)})
    training, test = split_folds(cases, n_folds)
    return {"training": training, "test": test}


def measure_costs(
    contenders: Sequence[str], patch: int, n_classes: int = 3, rounds: int = 5, device: str = "cpu"
) -> dict[str, dict[str, Any]]:
    """Measure peak memory and time of a float32 training step of networks at batch size 1.

    Args:
        contenders: words of :data:`memnet.benchmarks.contenders.CONTENDERS`; times are relative to the first.
        patch: side of the cubic patch, voxels.
        n_classes: classes out, background included.
        rounds: each times one step of every network in turn, so that all meet the same load of the machine; 0 measures
            memory alone.
        device: ``cpu`` or ``cuda``.

    Returns:
        For each network: ``parameters`` (the variational branch apart), ``peak`` (bytes alive at once in the forward and
        backward pass, parameters and their gradients apart) and ``time_ratio`` (median over the rounds, None without any).
    """
    image = torch.rand(1, 1, patch, patch, patch, device=device)
    label = torch.randint(0, n_classes, image.shape, device=device)
    loss = InvResLoss()

    def step(network: nn.Module) -> None:
        loss(network(image), label).backward()

    networks: dict[str, nn.Module] = {}
    for name in contenders:
        torch.manual_seed(0)
        networks[name] = CONTENDERS[name].build(1, n_classes).to(device)
    costs = measure_in_turn(step, networks, rounds, device)
    return {
        name: {
            "parameters": sum(p.numel() for key, p in network.named_parameters() if not key.startswith("vae.")),
            "peak": costs[name].peak,
            "time_ratio": costs[name].pace(costs[contenders[0]]) if rounds else None,
        }
        for name, network in networks.items()
    }


def score_table(records: Sequence[Record]) -> str:
    """Return a markdown table of the scores: the mean over the test cases, then mean ± standard deviation over the seeds."""
    if not records:
        return "No trial is done."
    classes = records[0]["settings"]["classes"]
    columns = [("dice", c) for c in [*classes, "mean"]]
    columns += [(metric, c) for metric in ("hausdorff", "hausdorff95") for c in classes]
    titles = {"dice": "Dice", "hausdorff": "Hausdorff, mm", "hausdorff95": "Hausdorff 95 %, mm"}
    rows = []
    undefined = 0
    for name, contender in CONTENDERS.items():
        mine = [record for record in records if record["network"] == name]
        cells = []
        for metric, label in columns:
            means = []
            for record in mine:
                scores = record["scores"][metric]
                values = [v for c in (classes if label == "mean" else [label]) for v in scores[c]]
                undefined += values.count(None) if label != "mean" else 0
                means.append(statistics.fmean([v for v in values if v is not None] or [math.nan]))
            digits = 3 if metric == "dice" else 2
            spread = f" ± {statistics.stdev(means):.{digits}f}" if len(means) > 1 else ""
            cells.append(f"{statistics.fmean(means):.{digits}f}{spread}" if means else "-")
        if mine:
            rows.append([contender.title, len(mine), *cells])
    table = markdown_table(["network", "seeds", *(f"{titles[m]}, {c}" for m, c in columns)], rows)
    if undefined:
        table += f"\n\n{undefined} scores are undefined (a class that was not predicted) and left out of the means."
    return table


def cost_table(costs: dict[str, dict[str, Any]]) -> str:
    """Return a markdown table of what :func:`measure_costs` found; ratios are to the first network."""
    first = next(iter(costs.values()))
    rows = [
        [CONTENDERS[name].title, shown(cost["parameters"] / 1e6, 2), shown(cost["peak"] / 2**20, 0)]
        + [shown(cost["peak"] / first["peak"], 2), shown(cost["time_ratio"], 2)]
        for name, cost in costs.items()
    ]
    return markdown_table(["network", "parameters, million", "peak, MiB", "to the first", "time to the first"], rows)


def add_parser(commands: Any) -> None:
    """Add the command ``compare`` to the subparsers of the command line."""
    defaults = Settings()
    parser = commands.add_parser(
        "compare",
        help="train networks of like size on labelled volumes, with one schedule and several seeds",
        description="Trains each network with each seed, keeps a record of each trial in the output folder, and writes the "
        "tables. What is recorded is not run again, and what was interrupted goes on.",
    )
    parser.add_argument("--dataset_dir", help="folder of the Decathlon's hippocampus task; without it, tables alone")
    parser.add_argument("--output_dir", required=True, help="folder of the records, costs and tables.md")
    parser.add_argument("--networks", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=defaults.epochs)
    parser.add_argument("--patch", type=int, nargs="+", default=[], help="measure memory and time at these cubes too")
    parser.add_argument("--rounds", type=int, default=5, help="steps timed of each network there; 0 for memory alone")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
    a, output_dir = arguments, Path(arguments.output_dir)
    keep_freed_memory()
    if a.dataset_dir:
        settings = Settings(epochs=a.epochs, amp=supports_bfloat16(a.device))
        cases = find_labelled_volumes(a.dataset_dir)
        for seed in a.seeds:
            for name in a.networks:
                run_trial(name, seed, settings, cases, output_dir, a.device)
                _write_tables(output_dir)
    for patch in a.patch:
        content = {
            "hardware": machine(a.device),
            "costs": measure_costs(a.networks, patch, rounds=a.rounds, device=a.device),
        }
        write_whole(output_dir / f"costs_{patch}.json", json.dumps(content, indent=1) + "\n")
    print(_write_tables(output_dir))


def _write_tables(folder: Path) -> str:
    records = [read_record(file) for name in CONTENDERS for file in sorted(folder.glob(f"{name}_seed*.json"))]
    parts = []
    done = [record for record in records if record is not None]
    if done:
        first = done[0]
        parts += [f"{first['n_training']} training and {len(first['test_cases'])} test volumes, {first['settings']}"]
    parts += [score_table(done)]
    for file in sorted(folder.glob("costs_*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        parts += [f"A float32 training step at {file.stem.removeprefix('costs_')}^3, {content['hardware']}"]
        parts += [cost_table(content["costs"])]
    text = "\n\n".join(parts) + "\n"
    write_whole(folder / "tables.md", text)
    return text
