"""Compares super-resolution networks of several depths and seeds: ``python -m memnet compare-superresolution``."""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from memnet.benchmarks.records import Record, read_record, write_whole
from memnet.chain import Memory

__all__ = ["error_table", "run_trial"]

_QUANTITIES = ("interior", "edge", "total", "md", "fa")
_METHODS = {
    "trilinear_": "trilinear interpolation of tensors",
    "cubic_": "cubic interpolation of tensors",
    "signals_": "cubic interpolation of signals, then the fit",
}


def run_trial(
    bundle: str | Path,
    n_blocks: int,
    seed: int,
    dataset_dir: str | Path,
    output_dir: str | Path,
    n_training: int | None = None,
    **overrides: Any,
) -> Record:
    """Train a network of the bundle with a seed and evaluate its best epoch, unless the record of that is there already.

    Both run as commands of the bundle's page would, in processes of their own, the evaluation without averaging over
    reflections, as in the paper; an interrupted training goes on.

    Args:
        bundle: the folder of ``brain_dti_superres_iqt``.
        n_blocks: blocks a stack; 0 is ESPCN.
        seed: of the initial weights and of all that is drawn in the training.
        dataset_dir: see :func:`memnet.datasets.diffusion.find_tensor_cases`.
        output_dir: folder of the records, of a folder beside each with the weights, and of the prepared ``tensors``.
        n_training: how many subjects to train on; all where None.
        overrides: further ids of the bundle's configs, for training and evaluation alike.

    Returns:
        The record: the settings, and for each error of the evaluation its value in every test subject.

    Raises:
        ValueError: a trial of other settings was recorded or begun there, or the training or the evaluation failed.
    """
    of = "" if n_training is None else f"_of{n_training}"
    state = Path(output_dir) / f"rn{n_blocks}{of}_seed{seed}"
    file = state.with_suffix(".json")
    settings = {**overrides, "n_blocks": n_blocks, "n_training": n_training, "seed": seed}
    settings = json.loads(json.dumps(settings))  # as it is read again
    options = {**settings, "dataset_dir": str(dataset_dir)}
    begun = state / "settings.json"  # names the data set, too, as records, which are published, do not
    found = read_record(file)
    for known, now, by in ((found and found["settings"], settings, file), (read_record(begun), options, begun)):
        if known is not None and known != now:
            raise ValueError(f"{by} was made with {known}, now {now}; give another --output_dir")
    if found is not None:
        return found
    train, evaluate = (str(Path(bundle) / "configs" / name) for name in ("train.json", "evaluate.json"))
    write_whole(begun, json.dumps(options, indent=1) + "\n")
    options["cache_dir"] = Path(output_dir) / "tensors"
    resume = (state / "model_last.pt").is_file()
    _run_bundle("training", train, {**options, "output_dir": state, "resume": resume})
    scores = state / "scores"
    options |= {"ckpt_path": state / "model_best.pt", "output_dir": scores, "reflections": 1}
    _run_bundle("evaluating", f"['{train}','{evaluate}']", options)
    errors = {
        f"{method}{quantity}": _subjects(scores / f"{method}rmse_{quantity}_raw.csv")
        for method in ("", *_METHODS)
        for quantity in _QUANTITIES
    }
    record = {"settings": settings, "errors": errors}
    write_whole(file, json.dumps(record, indent=1) + "\n")
    return record


def _run_bundle(run_id: str, config_file: str, overrides: dict[str, Any]) -> None:
    words = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", config_file]
    for key, value in overrides.items():
        if value is not None:
            words += [f"--{key}", str(value)]
    finished = subprocess.run(words, check=False)
    if finished.returncode:
        raise ValueError(f"{run_id} of {overrides['output_dir']} failed (exit code {finished.returncode}), see above")


def _subjects(file: Path) -> list[float]:
    with file.open(newline="", encoding="utf-8") as stream:
        return [float(row["mean"]) for row in csv.DictReader(stream)]


def error_table(records: Sequence[Record]) -> str:
    """Return a markdown table of errors: means over subjects and seeds ± the standard error over subjects.

    A subject's errors with several seeds are averaged first, since seeds do not make subjects. One without interior voxels has no
    interior error, and counts in the others alone. Tensors' entries and mean diffusivity (MD) are in 1e-5 mm^2/s; ``of ESPCN``
    is the ratio of total errors to those of N = 0 with as many subjects to train on.
    """
    if not records:
        return "No trial is done."
    titles = ["interior", "edge", "total", "MD", "FA", "of ESPCN"]
    lines = ["| method | subjects to train on | seeds | " + " | ".join(titles) + " |", "|---" * 9 + "|"]
    groups: dict[tuple[int, int | None], list[Record]] = {}
    for record in records:
        groups.setdefault((record["settings"]["n_blocks"], record["settings"]["n_training"]), []).append(record)
    for method, title in _METHODS.items():
        lines.append(f"| {title} | - | - | {_cells(records[:1], method)} | - |")
    totals = {group: _mean(mine, "total") for group, mine in groups.items()}
    for (n_blocks, n_training), mine in sorted(groups.items(), key=lambda g: (g[0][1] or math.inf, g[0][0])):
        title = "ESPCN" if n_blocks == 0 else f"ESPCN-RN{n_blocks}"
        espcn = totals.get((0, n_training))
        ratio = f"{totals[n_blocks, n_training] / espcn:.3f}" if espcn else "-"
        cells = _cells(mine, "")
        lines.append(f"| {title} | {n_training or 'all'} | {len(mine)} | {cells} | {ratio} |")
    return "\n".join(lines)


def _mean(records: Sequence[Record], error: str) -> float:
    return statistics.fmean(_of_subjects(records, error))


def _of_subjects(records: Sequence[Record], error: str) -> list[float]:
    """Return the errors of the subjects, each the mean of the seeds'."""
    means = [statistics.fmean(values) for values in zip(*(record["errors"][error] for record in records), strict=True)]
    return [value for value in means if not math.isnan(value)] or [math.nan]


def _cells(records: Sequence[Record], method: str) -> str:
    cells = []
    for quantity in _QUANTITIES:
        values = _of_subjects(records, method + quantity)
        digits = 3 if quantity == "fa" else 2
        error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{statistics.fmean(values):.{digits}f}{error}")
    return " | ".join(cells)


def add_parser(commands: Any) -> None:
    """Add the command ``compare-superresolution`` to the subparsers of the command line."""
    parser = commands.add_parser(
        "compare-superresolution",
        help="train ESPCN and ESPCN-RN of several depths on diffusion series, with several seeds and numbers of subjects",
        description="Trains and evaluates brain_dti_superres_iqt for each depth, number of subjects and seed, keeps a record of "
        "each trial in the output folder, and writes tables.md. What is recorded is not run again, what was interrupted goes on.",
    )
    parser.add_argument("--bundle", required=True, help="folder of the bundle brain_dti_superres_iqt")
    parser.add_argument("--dataset_dir", required=True, help="as in the bundle's training")
    parser.add_argument("--output_dir", required=True, help="folder of the records, weights and tables.md")
    parser.add_argument("--n_blocks", type=int, nargs="+", default=[0, 2, 4, 6, 8], help="blocks a stack; 0 is ESPCN")
    parser.add_argument("--n_training", type=int, nargs="+", help="subjects to train on; all where it is not given")
    parser.add_argument("--n_validation", type=int, default=1, help="subjects to choose the epoch by")
    parser.add_argument("--n_test", type=int, default=1, help="subjects to test with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--patches_per_epoch", type=int, default=1200)
    parser.add_argument("--amp", action="store_true", help="train and refine in bfloat16")
    parser.add_argument("--memory", choices=get_args(Memory), default="invert", help="strategy of the training")
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
    a, output_dir = arguments, Path(arguments.output_dir)
    keys = ("n_validation", "n_test", "epochs", "patches_per_epoch", "amp", "memory")
    common = {key: getattr(a, key) for key in keys}
    for seed in a.seeds:
        for n_training in a.n_training or [None]:
            for n_blocks in a.n_blocks:
                run_trial(a.bundle, n_blocks, seed, a.dataset_dir, output_dir, n_training, **common)
                records = [read_record(file) for file in sorted(output_dir.glob("rn*_seed*.json"))]
                write_whole(output_dir / "tables.md", error_table([r for r in records if r is not None]) + "\n")
    print((output_dir / "tables.md").read_text(encoding="utf-8"))
