"""Scores a bundle's reconstructions, and those of methods that learn nothing, on the same undersampled data."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.metrics import PSNRMetric

from memnet.benchmarks.tables import markdown_table, shown
from memnet.datasets.kspace import RAW_SUFFIXES
from memnet.nets.packed import unpack
from memnet.overrides import read_override
from memnet.transforms.kspace_outputs import CompareMagnitudesd
from memnet.workflow.checkpoints import load_weights
from memnet.workflow.image_quality import NRMSEMetric, SliceSSIMMetric
from memnet.workflow.pics import METHODS, Method
from memnet.workflow.reconstruction_panels import write_pictures
from memnet.workflow.scoring import write_scores
from memnet.workflow.settings import check_output_folder

__all__ = ["add_parser", "find_weight", "image_quality", "score_reconstruction"]

Case = Mapping[str, Any]
Solver = Callable[[Case], torch.Tensor]
_METRICS = ("psnr", "ssim", "nrmse")


def image_quality(image: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Compare magnitudes, with the reference's largest as the peak.

    Args:
        image: real and imaginary part, ``(2, slices or frames, y, z)``.
        reference: of the same shape.

    Returns:
        PSNR in dB and NRMSE over all voxels, and the mean SSIM of the planes.
    """
    found = CompareMagnitudesd(["image", "label"])({"image": image, "label": reference})
    pair = found["image"][None], found["label"][None]
    metrics = {"psnr": PSNRMetric(1.0), "ssim": SliceSSIMMetric(), "nrmse": NRMSEMetric()}
    return {name: float(torch.as_tensor(metric(*pair)).mean()) for name, metric in metrics.items()}


def find_weight(method: Method, cases: Sequence[Case]) -> float:
    """Find the weight of the regularisation with the best mean PSNR, by steps of a factor of 2 until it gets worse on both sides.

    Args:
        method: the method.
        cases: ``image``, packed, and ``label``, see :func:`memnet.nets.packed.pack`; others than those that are scored.

    Returns:
        The weight, 0 for a method that has none.
    """
    if not method.weight:
        return 0.0
    known: dict[int, float] = {}

    def psnr(step: int) -> float:
        if step not in known:
            weight = method.weight * 2.0**step
            scores = [image_quality(_reconstruct(method, case, weight), case["label"])["psnr"] for case in cases]
            known[step] = sum(scores) / len(scores)
        return known[step]

    best = 0
    for direction in (1, -1):
        while psnr(best + direction) > psnr(best):
            best += direction
    return method.weight * 2.0**best


def score_reconstruction(
    bundle: str | Path,
    dataset_dir: str | Path,
    tuning_dir: str | Path,
    output_dir: str | Path,
    methods: Sequence[str] = (),
    **overrides: Any,
) -> list[dict[str, Any]]:
    """Reconstruct every case by the bundle and by methods that learn nothing; write the table of scores and pictures.

    All get the same k-space, coil maps and mask, those of the bundle's evaluation. Weights of regularisation are tuned on
    other data, see :func:`find_weight`.

    Args:
        bundle: folder of the bundle.
        dataset_dir: folder of fully sampled raw data, or of magnitudes, every one of which is scored.
        tuning_dir: another such folder, whose first case weights are tuned on.
        output_dir: gets ``scores.csv``, ``scores.md``, and a picture of each case (and its movie), named as its file and slice.
        methods: words of :data:`memnet.workflow.pics.METHODS`; all if empty. What is not installed, or takes no data of these
            sides, is left out, and said.
        overrides: overrides of the bundle's ``train.json`` and ``evaluate.json``, such as ``acceleration``.

    Returns:
        The rows of the CSV file.

    Raises:
        ValueError: a method is unknown, or what the bundle's evaluation raises.
    """
    folder = Path(output_dir)
    parser = _evaluation(bundle, tuning_dir, overrides)
    movie = "n_frames" in parser
    known = METHODS["movie" if movie else "volume"]
    unknown = [name for name in methods if name not in known]
    if unknown:
        raise ValueError(f"methods are {', '.join(known)}, got {', '.join(unknown)}")
    missing = [name for name in methods or known if not known[name].is_installed]
    # what cannot be is refused before weights are searched for, which takes minutes
    check_output_folder(folder)
    evaluation = _evaluation(bundle, dataset_dir, overrides)
    cases, network = evaluation.get_parsed_content("validate#dataset"), _network(evaluation)
    tuning_case = parser.get_parsed_content("validate#dataset")[0]
    left_out = {name for name in methods or known if not _takes(known[name], tuning_case)}
    weights: dict[str, float] = {}
    solvers: dict[str, Solver] = {}
    for name in methods or known:
        if name not in missing and name not in left_out:
            if known[name].weight:
                print(f"{name}: trying weights on {Path(tuning_dir)}", flush=True)
            weights[name] = find_weight(known[name], [tuning_case])
            solvers[name] = partial(_reconstruct, known[name], weight=weights[name])
            print(f"{name}: weight {weights[name]:.2g}", flush=True)
    solvers[Path(bundle).resolve().name] = network

    rows: list[dict[str, Any]] = []
    for case in cases:
        file = Path(case["image"].meta["filename_or_obj"]).name
        case_name = next(file.removesuffix(suffix) for suffix in RAW_SUFFIXES if file.endswith(suffix))
        case_name += f"_{case['slice_index']}" if "slice_index" in case else ""
        images: dict[str, torch.Tensor] = {}
        for name, solve in solvers.items():
            if name in known and not _takes(known[name], case):
                left_out.add(name)
                continue
            start = time.perf_counter()
            images[name] = solve(case)
            row: dict[str, Any] = {"case": case_name, "method": name, "weight": weights.get(name, 0.0)}
            row |= image_quality(images[name], case["label"])
            rows.append(row | {"seconds": time.perf_counter() - start})
            print(", ".join(f"{v:.4g}" if isinstance(v, float) else v for v in rows[-1].values()), flush=True)
        images["reference"] = case["label"]
        magnitudes = {name: image.norm(dim=0, keepdim=True) for name, image in images.items()}
        sides = case["image"].affine[:3, :3].norm(dim=0).tolist()
        write_pictures(magnitudes, folder / case_name, movie, (sides[0], sides[1]) if movie else (sides[1], sides[2]))
    lines = [_table(rows, [name for name in solvers if any(row["method"] == name for row in rows)])]
    if missing:
        lines += ["", f"Not installed: {', '.join(missing)}."]
    if left_out - set(missing):
        lines += ["", f"Left out where a side of k-space is odd: {', '.join(sorted(left_out - set(missing)))}."]
    write_scores(rows, lines, folder)
    return rows


def add_parser(commands: Any) -> None:
    """Add the command ``score-reconstruction`` to the subparsers of the command line."""
    parser = commands.add_parser(
        "score-reconstruction", help="PSNR, SSIM and NRMSE of a bundle's reconstructions, of CG-SENSE, SigPy and BART"
    )
    parser.add_argument("--bundle", default="bundles/knee_mri_recon_mel", help="folder of the bundle")
    parser.add_argument(
        "--dataset_dir", required=True, help="folder of the fully sampled data, or magnitudes, to score"
    )
    parser.add_argument("--tuning_dir", required=True, help="another one, for the weights of regularisation")
    parser.add_argument("--output_dir", default="scores", help="folder of scores.csv, scores.md and the pictures")
    choices = "; of movies: ".join(", ".join(known) for known in METHODS.values())
    parser.add_argument("--methods", nargs="*", default=[], help=f"some of: {choices}; all by default")
    parser.add_argument("--set", nargs="+", default=[], metavar="ID=VALUE", help="overrides of the bundle's evaluation")
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
    a = arguments
    overrides = dict(read_override(text) for text in a.set)
    score_reconstruction(a.bundle, a.dataset_dir, a.tuning_dir, a.output_dir, a.methods, **overrides)
    print((Path(a.output_dir) / "scores.md").read_text(encoding="utf-8"))


def _evaluation(bundle: str | Path, dataset_dir: str | Path, overrides: Mapping[str, Any]) -> ConfigParser:
    """Return the parser of the bundle's evaluation of every case of a folder."""
    configs = [Path(bundle) / "configs" / f"{name}.json" for name in ("train", "evaluate")]
    for config in configs:
        if not config.is_file():
            raise ValueError(f"{config}: no such file; give --bundle FOLDER")
    # the config asks for its folder only once the workflow is gone
    chosen: dict[str, Any] = {"bundle_root": str(Path(bundle).resolve()), "dataset_dir": str(dataset_dir)}
    chosen |= {"subset": "all", "num_workers": 0, **overrides}
    workflow = ConfigWorkflow([str(c) for c in configs], workflow_type="evaluation", logging_file=False, **chosen)
    workflow.initialize()
    return workflow.parser


def _network(parser: ConfigParser) -> Solver:
    network = parser.get_parsed_content("network").eval()
    load_weights(network, parser.get_parsed_content("ckpt_path"))
    inferer = parser.get_parsed_content("validate#inferer")
    device = parser.get_parsed_content("device")

    @torch.no_grad()
    def solve(case: Case) -> torch.Tensor:
        return inferer(torch.as_tensor(case["image"])[None].to(device), network)[0].float().cpu()

    return solve


def _takes(method: Method, case: Case) -> bool:
    return method.takes_odd_sides or not any(n % 2 for n in case["image"].shape[-2:])


def _reconstruct(method: Method, case: Case, weight: float) -> torch.Tensor:
    kspace, csm, mask = (x[0] for x in unpack(torch.as_tensor(case["image"])[None]))
    return torch.view_as_real(method.solve(kspace, csm, mask, weight)).movedim(-1, 0)


def _table(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> str:
    cells = []
    for name in methods:
        of_method = [row for row in rows if row["method"] == name]
        means = {key: sum(row[key] for row in of_method) / len(of_method) for key in (*_METRICS, "seconds", "weight")}
        cells.append([name, f"{means['weight']:.2g}" if means["weight"] else "-"])
        cells[-1] += [
            shown(means[key], digits) for key, digits in (("psnr", 2), ("ssim", 3), ("nrmse", 4), ("seconds", 1))
        ]
    return markdown_table(["method", "weight", "PSNR, dB", "SSIM", "NRMSE", "time, s"], cells)
