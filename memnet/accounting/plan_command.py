"""The command ``python -m memnet plan``: what a training takes and what fits."""

from __future__ import annotations

import argparse
from math import prod
from typing import Any, get_args

import torch

from memnet.accounting.dry_run import Device
from memnet.accounting.fitting import fill_budget, largest_patch
from memnet.accounting.planner import PRECISIONS, Plan, TrainingStep
from memnet.budget import parse_bytes
from memnet.chain import Memory
from memnet.overrides import read_override

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command ``plan`` to the subparsers of the command line."""
    parser = commands.add_parser(
        "plan",
        help="what a training would take, and the largest patch that fits, without running it",
        description="Simulates a training step of a config on tensors without data, for each memory strategy and precision.",
    )
    parser.add_argument("--config_file", nargs="+", required=True, help="a bundle's train.json, or any MONAI config")
    parser.add_argument("--budget", help="memory of the card, such as 12GiB: finds the largest patch that fits")
    parser.add_argument(
        "--patch", type=int, nargs="+", default=[], help="sides of cubic patches; the config's by default"
    )
    parser.add_argument(
        "--shape", type=int, nargs="+", default=[], help="sizes of one patch or slab; with --budget 0 for what to find"
    )
    parser.add_argument("--batch", type=int, default=0, help="patches a step; the config's by default")
    parser.add_argument("--memory", nargs="+", choices=get_args(Memory), help="strategies; all by default")
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument(
        "--device",
        choices=get_args(Device),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to train; the GPU where there is one, by default",
    )
    parser.add_argument("--network_id", default="network_def", help="the config's id of the network")
    parser.add_argument("--loss_id", default="loss", help="the config's id of the loss")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="ID=VALUE", help="overrides: network_name=partially vae=false"
    )
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
    a = arguments
    for option, sizes, least in (("patch", a.patch, 1), ("shape", a.shape, 0), ("batch", [a.batch], 0)):
        if min(sizes, default=least) < least:
            raise ValueError(f"--{option} is {' '.join(map(str, sizes))}, expected at least {least}")
    budget = parse_bytes(a.budget) if a.budget else None
    try:
        _print_plans(a, budget)
    except RuntimeError as error:  # of a step that cannot be simulated
        raise ValueError(str(error)) from error


def _print_plans(a: argparse.Namespace, budget: int | None) -> None:
    step = TrainingStep(a.config_file, dict(read_override(text) for text in a.set), a.network_id, a.loss_id, a.device)
    strategies = step.strategies if step.strategies == [None] else a.memory or step.strategies
    if a.memory and step.strategies == [None]:
        raise ValueError("the network knows no memory strategy; leave --memory out")
    if a.shape and len(a.shape) != len(step.patch):
        raise ValueError(f"--shape has {len(a.shape)} sizes, the network's patches have {len(step.patch)}")
    patches = [(side,) * len(step.patch) for side in a.patch] or [step.patch]
    if a.shape:
        patches = [] if 0 in a.shape else [tuple(a.shape)]
        if not patches and budget is None:
            raise ValueError("a size of 0 in --shape is to be found, which takes a --budget")
    free = a.shape if 0 in a.shape else ()
    stored: dict[Any, float] = {}
    print("| `memory` | precision | patch | patches a step | activations, MiB | in all, MiB | operations |")
    print("|---|---|---|---|---|---|---|")
    best: Plan | None = None
    lines: list[str] = []
    for precision in a.precision:
        for memory in strategies:
            plans = [step.plan(memory, precision, patch, a.batch) for patch in patches]
            if budget is not None:
                largest = largest_patch(step, budget, memory, precision, a.batch, 4 if free else 8, free)
                plans += [largest] if largest else []
                fitting = [plan for plan in plans if plan.total <= budget]
                best = max([*([best] if best else []), *fitting], key=lambda plan: prod(plan.patch), default=None)
            for plan in plans:
                print(_row(plan, stored, budget), flush=True)
        filled = None
        if budget and patches and "store" in strategies:
            filled = fill_budget(step, budget, precision, patches[0], a.batch)
        if filled:
            print(_row(filled[0], stored, budget), flush=True)
            lines.append(f"{step.overrides(filled[0])} --{a.network_id}#memory_budget {filled[1]}")
    print()
    print("In all: with parameters, gradients and Adam's averages. Operations: to those of `store` at the same patch.")
    if step.device == "cuda":
        print("The workspaces of a GPU's libraries and its context come on top.")
    else:
        print("With what a CPU's convolutions take while they run, which a GPU's do not (--device cuda).")
    if budget is not None:
        print()
        if best is None:
            raise ValueError(f"nothing fits in {a.budget}")
        print(f"Fits in {a.budget}: {step.overrides(best)}")
        for line in lines:
            print(f"Recomputes no more than {a.budget} demands: {line}")


def _row(plan: Plan, stored: dict[Any, float], budget: int | None) -> str:
    key = plan.precision, plan.patch, plan.batch
    per_voxel = plan.flops / prod(plan.patch)
    if plan.memory == "store":
        stored[plan.precision] = stored.setdefault(key, per_voxel)
    reference = stored.get(key, stored.get(plan.precision))
    operations = "-" if not reference else f"{per_voxel / reference:.2f}"
    size = " x ".join(map(str, plan.patch))
    fits = "" if budget is None else " (fits)" if plan.total <= budget else " (too much)"
    return (
        f"| {plan.memory or '-'} | {plan.precision} | {size} | {plan.batch} | {plan.peak / 2**20:.0f} "
        f"| {plan.total / 2**20:.0f}{fits} | {operations} |"
    )
