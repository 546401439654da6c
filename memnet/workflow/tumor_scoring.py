"""Scores a bundle's tumour segmentations against reference labels, case by case."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor

from memnet.datasets import existing_folder
from memnet.datasets.brats import find_brats
from memnet.transforms.labels import ENHANCING, NECROTIC, OEDEMA, MapLabelsd
from memnet.workflow.metrics import BoundedHausdorff
from memnet.workflow.scoring import dice, read_labels, require_grid_of, segment_with_bundle, write_scores

__all__ = ["REGIONS", "add_parser", "find_scored_tumors", "region_scores", "score_tumor"]

# whole tumour, tumour core, enhancing tumour
REGIONS = {"WT": (NECROTIC, OEDEMA, ENHANCING), "TC": (NECROTIC, ENHANCING), "ET": (ENHANCING,)}
_MODALITIES = ("t1", "t1c", "t2", "flair")
# two modalities of BraTS 2015, z-scored: a folder a case
_TWO = {"t1c": "T1c_subtrMeanDivStd.nii.gz", "flair": "Flair_subtrMeanDivStd.nii.gz"}
_TWO_LABEL = "OTMultiClass.nii.gz"

Case = dict[str, Any]


def find_scored_tumors(
    dataset_dir: str | Path, subjects: Sequence[str] = (), label_map: str | None = None
) -> dict[str, Case]:
    """Find cases with reference labels: a BraTS folder, or one of two-modality cases of BraTS 2015.

    Args:
        dataset_dir: folder in the layout that :func:`memnet.datasets.brats.find_brats` reads, or with case folders, up to
            two folders down, of ``T1c_subtrMeanDivStd.nii.gz``, ``Flair_subtrMeanDivStd.nii.gz`` and
            ``OTMultiClass.nii.gz``.
        subjects: the cases' names, in the order wanted; all if empty.
        label_map: what the references' values mean, one of :data:`memnet.transforms.labels.LABEL_MAPS`; ``brats``, and of
            two-modality cases ``brats2015``, if ``None``.

    Returns:
        ``{name: {"files": {"t1c": file, ...}, "label": file, "label_map": name}}``, modalities that are missing left out.

    Raises:
        ValueError: if the folder, a case or one of its files is missing.
    """
    folder = existing_folder(dataset_dir, "one of BraTS cases")
    labels = sorted(file for depth in ("*", "*/*", "*/*/*") for file in folder.glob(f"{depth}/{_TWO_LABEL}"))
    found: list[Case] = []
    for label in labels:
        files = {modality: label.with_name(name) for modality, name in _TWO.items()}
        found.append({"files": files, "label": label, "label_map": label_map or "brats2015"})
    for case in [] if labels else find_brats(folder, allow_missing=True):
        files = {m: Path(f) for m, f in zip(_MODALITIES, case["image"], strict=True) if f is not None}
        found.append({"files": files, "label": case["label"], "label_map": label_map or "brats"})
    cases = dict(zip(_names([Path(case["label"]).parent for case in found], folder), found, strict=True))
    unknown = [name for name in subjects if name not in cases]
    if unknown:
        raise ValueError(f"{folder}: holds no case {', '.join(unknown)}; it has {', '.join(cases)}")
    for file in (file for case in cases.values() for file in case["files"].values()):
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
    return {name: cases[name] for name in subjects or sorted(cases)}


def region_scores(prediction: np.ndarray, reference: np.ndarray) -> dict[str, tuple[float, float]]:
    """Score whole tumour, tumour core and enhancing tumour.

    Args:
        prediction: classes 0 to 3, ``(D, H, W)`` of 1 mm.
        reference: classes of the same shape.

    Returns:
        Dice, 1 where a region is in neither, and the 95th percentile of the Hausdorff distance in mm (see
        :class:`memnet.workflow.metrics.BoundedHausdorff` for regions that are missed), for each region.
    """
    # nothing changes by leaving out what is background in both
    box = np.argwhere((prediction > 0) | (reference > 0))
    if len(box):
        crop = tuple(slice(max(a - 1, 0), b + 2) for a, b in zip(box.min(0), box.max(0), strict=True))
        prediction, reference = prediction[crop], reference[crop]
    masks = [np.stack([np.isin(m, values) for values in REGIONS.values()]) for m in (prediction, reference)]
    distance = BoundedHausdorff(percentile=95)(*(torch.from_numpy(m)[None].float() for m in masks))
    return {
        region: (dice(p, r, 1), float(d))
        for region, p, r, d in zip(REGIONS, *masks, torch.as_tensor(distance)[0], strict=True)
    }


def score_tumor(
    dataset_dir: str | Path,
    bundle: str | Path,
    output_dir: str | Path,
    subjects: Sequence[str] = (),
    seen: Sequence[str] = (),
    label_map: str | None = None,
    **overrides: Any,
) -> list[dict[str, Any]]:
    """Segment every case with the bundle and write the table of its scores.

    Args:
        dataset_dir: see :func:`find_scored_tumors`; the volumes have voxels of 1 mm.
        bundle: folder of the bundle.
        output_dir: gets ``scores.csv`` (a row for each case and region) and ``scores.md``.
        subjects: which cases; all if empty.
        seen: cases that a choice was made on; their mean is given apart from that of the others.
        label_map: see :func:`find_scored_tumors`.
        overrides: overrides of the bundle's ``inference.json``, such as ``ckpt_path``.

    Returns:
        The rows of the CSV file.

    Raises:
        ValueError: if files are missing, labels are unknown or contradict each other, voxels are not of 1 mm, or a reference
            is not on its case's grid.
    """
    cases = find_scored_tumors(dataset_dir, subjects, label_map)
    for case in cases.values():
        require_grid_of([*case["files"].values(), case["label"]])
    unknown = sorted(set(seen) - set(cases))
    if unknown:
        raise ValueError(f"seen names {', '.join(unknown)}, which are not among the cases {', '.join(cases)}")
    rows = []
    inputs = [{modality: str(file) for modality, file in case["files"].items()} for case in cases.values()]
    for (name, case), prediction in zip(cases.items(), segment_with_bundle(inputs, bundle, **overrides), strict=True):
        spacing = nib.load(case["label"]).header.get_zooms()[:3]
        if not np.allclose(spacing, 1, atol=0.01):
            raise ValueError(f"{case['label']}: has voxels of {spacing} mm, expected 1 mm")
        label = read_labels(case["label"])
        if prediction.shape != label.shape:
            raise ValueError(f"{name}: the prediction has shape {prediction.shape}, the reference {label.shape}")
        scores = region_scores(_classes(prediction, "brats", name), _classes(label, case["label_map"], case["label"]))
        for region, (overlap, distance) in scores.items():
            row = {"case": name, "seen": name in seen, "region": region}
            rows.append({**row, "dice": round(overlap, 4), "hd95": round(distance, 2)})
        print(f"{name}: " + ", ".join(f"{r} {d:.3f} ({h:.1f} mm)" for r, (d, h) in scores.items()), flush=True)
    write_scores(rows, _table(rows), output_dir)
    return rows


def add_parser(commands: Any) -> None:
    """Add the command ``score-tumor`` to the subparsers of the command line."""
    parser = commands.add_parser("score-tumor", help="Dice and HD95 of a bundle's tumour segmentations")
    parser.add_argument("--dataset_dir", required=True, help="BraTS folder, or two-modality cases of BraTS 2015")
    parser.add_argument("--bundle", default="bundles/brain_mri_tumor_invres", help="folder of the bundle")
    parser.add_argument("--output_dir", default="scores", help="folder of scores.csv and scores.md")
    parser.add_argument("--subjects", nargs="*", default=[], help="which cases; all by default")
    parser.add_argument("--seen", nargs="*", default=[], help="cases that choices were made on, given apart")
    parser.add_argument(
        "--label_map",
        choices=["brats", "brats2015", "brats2024"],
        help="what the references' values mean: 4 is enhancing tumour, or with brats2024 the cavity after treatment; brats by "
        "default, of two-modality cases brats2015",
    )
    parser.add_argument("--ckpt_path", help="weights other than the bundle's own")
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
    overrides = {"ckpt_path": str(Path(arguments.ckpt_path).absolute())} if arguments.ckpt_path else {}
    a = arguments
    score_tumor(a.dataset_dir, a.bundle, a.output_dir, a.subjects, a.seen, a.label_map, **overrides)
    print((Path(a.output_dir) / "scores.md").read_text(encoding="utf-8"))


def _classes(labels: np.ndarray, label_map: str, source: Any) -> np.ndarray:
    named = MetaTensor(torch.from_numpy(labels)[None], meta={"filename_or_obj": str(source)})
    mapped = MapLabelsd("label", label_map)({"label": named})["label"]
    return mapped[0].numpy()


def _table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(row["case"] for row in rows))
    lines = ["Dice, and 95th percentile of the Hausdorff distance in mm", ""]
    lines += ["| case | " + " | ".join(REGIONS) + " |", "|---" * (len(REGIONS) + 1) + "|"]
    groups = [(name, [row for row in rows if row["case"] == name]) for name in names]
    groups.append((f"mean of {len(names)}", rows))
    seen = [row for row in rows if row["seen"]]
    if seen and len(seen) < len(rows):
        others = [row for row in rows if not row["seen"]]
        groups.append((f"mean of the {len(others) // len(REGIONS)} that no choice was made on", others))
    for name, group in groups:
        cells = []
        for region in REGIONS:
            of_region = [row for row in group if row["region"] == region]
            overlap, distance = (np.mean([row[key] for row in of_region]) for key in ("dice", "hd95"))
            cells.append(f"{overlap:.3f} ({distance:.1f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _names(folders: Sequence[Path], root: Path) -> list[str]:
    """Return the folders' names, of those that share theirs with the folders in which they lie."""
    names = [folder.name for folder in folders]
    return [
        name if names.count(name) == 1 else "_".join(folder.relative_to(root).parts)
        for name, folder in zip(names, folders, strict=True)
    ]
