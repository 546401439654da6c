"""Lists the scans to segment, pairing the modalities of a subject."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from memnet.datasets import IMAGE_SUFFIXES, Case, as_list, existing_folder, read_datalist

__all__ = ["find_scans"]

# "T1", "t1w", "T2w" ... standing alone in a file name: sub-01_T1w.nii.gz, subject-3-T2.hdr, t1.nii
_MODALITY = re.compile(r"(?<![A-Za-z0-9])T([12])w?(?![A-Za-z0-9])", re.IGNORECASE)
# files that lie beside the scans but are not scans
_NOT_A_SCAN = re.compile(r"[-_.](label|seg|mask|tissue)$", re.IGNORECASE)


def find_scans(
    image: str | Path | Sequence[str | Path] | None = None,
    t1: str | Path | Sequence[str | Path] | None = None,
    t2: str | Path | Sequence[str | Path] | None = None,
    dataset_dir: str | Path | None = None,
    datalist: str | Path | None = None,
    modality: Literal["T1", "T2"] = "T1",
    pattern: str = "*",
) -> list[Case]:
    """List the scans to segment from whichever of the arguments is given.

    Args:
        image: one scan or several, each a subject with the single modality ``modality``.
        t1: T1 scan or scans; with ``t2`` the two lists are paired in order.
        t2: T2 scan or scans.
        dataset_dir: a folder; a file named like ``x_T1.nii.gz`` is paired with ``x_T2.nii.gz``, a file whose name tells
            no modality is a subject of its own. Subfolders are not searched.
        datalist: JSON file in the format of the Medical Segmentation Decathlon; ``image`` is a file or ``[T1, T2]``.
        modality: what a scan is when its name does not say.
        pattern: which file names of ``dataset_dir`` to take, as in ``"*_SS.nii.gz"``.

    Returns:
        One ``{"image": [T1 or None, T2 or None], "output_name": name}`` a subject, names being unique; nothing where
        nothing is given, see :func:`require_cases`.

    Raises:
        ValueError: if nothing is found, a file is missing, or two arguments contradict each other.
    """
    if modality not in ("T1", "T2"):
        raise ValueError(f"modality is {modality!r}, expected 'T1' or 'T2'")
    given = {k for k, v in {"image": image, "t1 or t2": t1 or t2, "datalist": datalist}.items() if v}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(sorted(given))} are given together; give one of them")
    if image:
        pairs = [_as_pair(path, modality) for path in as_list(image)]
    elif t1 or t2:
        first, second = as_list(t1), as_list(t2)
        if first and second and len(first) != len(second):
            raise ValueError(f"t1 names {len(first)} files and t2 names {len(second)}; they are paired one to one")
        pairs = [[a, b] for a, b in zip(first or [None] * len(second), second or [None] * len(first), strict=True)]
    elif datalist:
        sections = read_datalist(datalist)
        cases = sections.get("test") or sections.get("validation") or sections.get("training") or []
        pairs = [_as_pair(case["image"], modality) for case in cases]
    elif dataset_dir:
        pairs = _pair_folder(existing_folder(dataset_dir, "a folder with NIfTI files"), modality, pattern)
    else:
        return []
    for path in (p for pair in pairs for p in pair if p is not None):
        if not Path(path).exists():
            raise ValueError(f"{path}: no such file")
    if not pairs:
        raise ValueError(f"{datalist}: lists no image")
    return [{"image": pair, "output_name": name} for pair, name in zip(pairs, _unique_names(pairs), strict=True)]


def _as_pair(image: str | Path | Sequence[Any], modality: str) -> list[Any]:
    if isinstance(image, (str, Path)):
        return [image, None] if modality == "T1" else [None, image]
    pair = list(image)
    if not 1 <= len(pair) <= 2 or all(p is None for p in pair):
        raise ValueError(f"{image!r}: expected one file or the two modalities [T1, T2], got {len(pair)}")
    return pair if len(pair) == 2 else _as_pair(pair[0], modality)


def _stem(path: str | Path) -> str:
    name = Path(path).name
    return next((name[: -len(s)] for s in (*IMAGE_SUFFIXES, ".img") if name.lower().endswith(s)), Path(name).stem)


def _pair_folder(folder: Path, modality: str, pattern: str) -> list[list[Any]]:
    files = [
        f
        for f in sorted(folder.glob(pattern))
        if f.is_file() and f.name.lower().endswith(IMAGE_SUFFIXES) and not f.name.startswith(".")
    ]
    subjects: dict[str, list[Any]] = {}
    for file in files:
        stem = _stem(file)
        if _NOT_A_SCAN.search(stem):
            continue
        match = _MODALITY.search(stem)
        channel = int(match[1]) - 1 if match else ("T1", "T2").index(modality)
        key = stem[: match.start()] + "\0" + stem[match.end() :] if match else stem
        pair = subjects.setdefault(key, [None, None])
        if pair[channel] is not None:
            raise ValueError(f"{file}: a second file of the same subject and modality as {pair[channel]}")
        pair[channel] = str(file)
    if not subjects:
        raise ValueError(
            f"{folder}: no scan found (looked for {pattern} ending in {', '.join(IMAGE_SUFFIXES)}; "
            "subfolders are not searched)"
        )
    return list(subjects.values())


def _unique_names(pairs: Sequence[Sequence[Any]]) -> list[str]:
    paths = [Path(next(p for p in pair if p is not None)).absolute() for pair in pairs]
    names = [_stem(path) for path in paths]
    if len(set(names)) < len(names):
        # subject_1/T1.nii.gz, subject_2/T1.nii.gz: the folder tells them apart
        names = [f"{path.parent.name}_{name}" for path, name in zip(paths, names, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name}: several inputs would be written under this name; give them different file names")
    return names
