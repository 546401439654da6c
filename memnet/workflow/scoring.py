"""Scores a bundle's tissue maps, and those of DIPY's HMRF, against reference labels on the same volumes."""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from memnet.datasets import existing_folder
from memnet.transforms.grids import require_one_grid
from memnet.transforms.labels import CSF, ROUNDING, TISSUES
from memnet.whole_files import whole_file, write_table

__all__ = [
    "add_parser",
    "dice",
    "find_scored_cases",
    "read_labels",
    "require_grid_of",
    "score_tissue",
    "segment_with_bundle",
    "write_scores",
]

Case = dict[str, Path]


def find_scored_cases(dataset_dir: str | Path, subjects: Sequence[str] = ()) -> dict[str, Case]:
    """Find skull-stripped volumes with reference tissue labels and brain masks.

    Args:
        dataset_dir: folder of ``<subject>_SS.nii.gz``, ``<subject>_classified.nii.gz`` (1 CSF, 2 GM, 3 WM) and
            ``<subject>_mask.nii.gz``.
        subjects: which to take; all if empty.

    Returns:
        ``{subject: {"image": file, "label": file, "mask": file}}`` in the order of the names.

    Raises:
        ValueError: if the folder, a subject or one of its files is missing.
    """
    folder = existing_folder(dataset_dir, "one of <subject>_SS.nii.gz with labels and masks")
    names = list(subjects) or sorted(f.name.removesuffix("_SS.nii.gz") for f in folder.glob("*_SS.nii.gz"))
    if not names:
        raise ValueError(f"{folder}: holds no <subject>_SS.nii.gz")
    suffixes = {"image": "SS", "label": "classified", "mask": "mask"}
    cases = {name: {k: folder / f"{name}_{s}.nii.gz" for k, s in suffixes.items()} for name in names}
    for file in (file for case in cases.values() for file in case.values()):
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
    return cases


def dice(prediction: np.ndarray, reference: np.ndarray, label: int) -> float:
    """Return ``2 |P and R| / (|P| + |R|)`` of the voxels with a label; 1 if neither has any.

    Args:
        prediction: label map of any shape.
        reference: label map of the same shape.
        label: the label.
    """
    p, r = prediction == label, reference == label
    total = int(p.sum()) + int(r.sum())
    return 2 * int((p & r).sum()) / total if total else 1.0


def score_tissue(
    dataset_dir: str | Path,
    bundle: str | Path,
    output_dir: str | Path,
    subjects: Sequence[str] = (),
    hmrf: bool = True,
    **overrides: Any,
) -> list[dict[str, Any]]:
    """Segment every volume with the bundle and with HMRF, and write the table of their Dice coefficients.

    Compared are the voxels of the brain mask. There the reference is the expert's label where there is one and CSF where
    there is none, since the reference leaves the fluid outside the ventricles unlabelled. The bundle sees the stripped
    volume, nothing of the mask or of the reference; its prediction is on the volume's own grid.

    Args:
        dataset_dir: see :func:`find_scored_cases`.
        bundle: folder of the bundle.
        output_dir: gets ``scores.csv`` (a row for each subject, method and tissue) and ``scores.md`` (mean and standard
            deviation over the subjects).
        subjects: which subjects; all if empty.
        hmrf: score DIPY's ``TissueClassifierHMRF`` too (3 classes, beta 0.1, its defaults otherwise).
        overrides: overrides of the bundle's ``inference.json``, such as ``ckpt_path``.

    Returns:
        The rows of the CSV file.

    Raises:
        ValueError: if files are missing, or a volume's reference or mask is not on its grid.

    References:
        Segmentation of brain MR images through a hidden Markov random field model and the expectation-maximization
        algorithm (Zhang et al., 2001), https://doi.org/10.1109/42.906424
    """
    cases = find_scored_cases(dataset_dir, subjects)
    for case in cases.values():
        require_grid_of(list(case.values()))
    images = ({"image": str(case["image"])} for case in cases.values())
    methods = {Path(bundle).resolve().name: segment_with_bundle(images, bundle, **overrides)}
    if hmrf:
        methods["DIPY HMRF"] = _segment_with_hmrf(cases)
    rows = []
    for method, predictions in methods.items():
        for (subject, case), prediction in zip(cases.items(), predictions, strict=True):
            mask, label = read_labels(case["mask"]) > 0, read_labels(case["label"])
            if prediction.shape != label.shape:
                raise ValueError(f"{subject}: {method} gives {prediction.shape}, the reference has {label.shape}")
            reference = np.where(label == 0, CSF, label)[mask]
            scores = {name: dice(prediction[mask], reference, value) for name, value in TISSUES.items()}
            rows += [
                {"subject": subject, "method": method, "tissue": t, "dice": round(s, 4)} for t, s in scores.items()
            ]
            print(f"{method} {subject}: " + ", ".join(f"{t} {s:.3f}" for t, s in scores.items()), flush=True)
    write_scores(rows, _table(rows, list(methods), len(cases)), output_dir)
    return rows


def add_parser(commands: Any) -> None:
    """Add the command ``score-tissue`` to the subparsers of the command line."""
    parser = commands.add_parser("score-tissue", help="Dice of a bundle's tissue maps and of DIPY's HMRF")
    parser.add_argument("--dataset_dir", required=True, help="folder of <subject>_SS, _classified, _mask .nii.gz")
    parser.add_argument("--bundle", default="bundles/brain_mri_tissue_invres", help="folder of the bundle")
    parser.add_argument("--output_dir", default="scores", help="folder of scores.csv and scores.md")
    parser.add_argument("--subjects", nargs="*", default=[], help="which subjects; all by default")
    parser.add_argument("--ckpt_path", help="weights other than the bundle's own")
    parser.add_argument("--no_hmrf", action="store_true", help="leave HMRF out")
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
    overrides = {"ckpt_path": str(Path(arguments.ckpt_path).absolute())} if arguments.ckpt_path else {}
    a = arguments
    score_tissue(a.dataset_dir, a.bundle, a.output_dir, a.subjects, not a.no_hmrf, **overrides)
    print((Path(a.output_dir) / "scores.md").read_text(encoding="utf-8"))


def segment_with_bundle(
    inputs: Iterable[Mapping[str, Any]], bundle: str | Path, **overrides: Any
) -> Iterator[np.ndarray]:
    """Run a bundle's ``inference.json`` for one case after another.

    Args:
        inputs: for each case, the overrides that name its files, such as ``{"image": file}``.
        bundle: folder of the bundle.
        overrides: overrides for all cases, such as ``ckpt_path``.

    Yields:
        The label map that it writes, uint8, on the grid of the input.

    Raises:
        ValueError: if the bundle has no such config.
    """
    from monai.bundle import ConfigWorkflow  # takes seconds to import

    logger = logging.getLogger("memnet")
    config = Path(bundle) / "configs" / "inference.json"
    if not config.is_file():
        raise ValueError(f"{config}: no such file; give --bundle FOLDER")
    for files in inputs:
        with tempfile.TemporaryDirectory() as folder:
            chosen = {"output_dir": folder, "report": False, **files, **overrides}
            workflow = ConfigWorkflow(config_file=str(config), workflow_type="inference", **chosen)
            level = logger.level
            logger.setLevel(logging.WARNING)  # a run tells where its files lie; these are gone a moment later
            try:
                workflow.initialize()
                workflow.run()
                workflow.finalize()
            finally:
                logger.setLevel(level)
            yield read_labels(next(Path(folder).glob("*.nii.gz")))


def require_grid_of(files: Sequence[str | Path]) -> None:
    """Refuse a case whose files are not voxel by voxel of the same places.

    Raises:
        ValueError: see :func:`memnet.transforms.grids.require_one_grid`.
    """
    images = [(str(file), nib.load(file)) for file in files]
    grids = [(name, (tuple(image.shape[:3]), np.asarray(image.affine))) for name, image in images]
    require_one_grid(grids, "scores are of voxels")


def read_labels(file: str | Path) -> np.ndarray:
    """Read a label map as uint8, on the grid of the file.

    Raises:
        ValueError: it holds other values than whole numbers from 0 to 255, naming the file.
    """
    values = np.asarray(nib.load(file).dataobj)
    labels = np.rint(values)  # a file's own scaling makes 2.99999 of 3
    if not (np.abs(values - labels) < ROUNDING).all() or labels.min() < 0 or labels.max() > 255:
        raise ValueError(f"{file}: holds other values than the whole numbers from 0 to 255 of a label map or mask")
    return labels.astype(np.uint8)


def write_scores(rows: Sequence[Mapping[str, Any]], lines: Sequence[str], output_dir: str | Path) -> None:
    """Write ``scores.csv`` (the rows) and ``scores.md`` (the lines).

    Args:
        rows: dictionaries with the same keys.
        lines: the table for people, in Markdown.
        output_dir: folder of the two files; made if missing.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "scores.csv", rows)
    with whole_file(folder / "scores.md") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _segment_with_hmrf(cases: dict[str, Case]) -> Iterator[np.ndarray]:
    """Begin at once, in a process of its own beside the bundle: HMRF takes a minute a volume on one core."""
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    return pool.map(_hmrf, cases.values())


def _hmrf(case: Case) -> np.ndarray:
    from dipy.segment.tissue import TissueClassifierHMRF  # an optional dependency

    image = nib.load(case["image"]).get_fdata() * (read_labels(case["mask"]) > 0)
    _, segmentation, _ = TissueClassifierHMRF(verbose=False).classify(image, 3, 0.1)
    return np.asarray(segmentation).astype(np.uint8)  # ordered by intensity: fluid, grey, white in T1


def _table(rows: list[dict[str, Any]], methods: list[str], n_cases: int) -> list[str]:
    lines = [f"Dice, mean ± standard deviation over {n_cases} volumes", ""]
    lines += ["| method | " + " | ".join(TISSUES) + " |", "|---" * (len(TISSUES) + 1) + "|"]
    for method in methods:
        cells = []
        for tissue in TISSUES:
            scores = [row["dice"] for row in rows if row["method"] == method and row["tissue"] == tissue]
            cells.append(f"{np.mean(scores):.3f} ± {np.std(scores):.3f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines
