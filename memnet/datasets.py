"""Finds the labelled cases of a data set and says what is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "IMAGE_SUFFIXES",
    "Case",
    "as_list",
    "existing_folder",
    "find_evaluation_cases",
    "find_iseg",
    "find_training_cases",
    "read_datalist",
    "require_cases",
    "split_folds",
]

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".hdr")

Case = dict[str, Any]


def find_iseg(dataset_dir: str | Path) -> list[Case]:
    """Find the labelled subjects of an iSeg-2017 or iSeg-2019 folder as distributed.

    The files are ``subject-K-T1.hdr/.img``, ``subject-K-T2.hdr/.img`` and ``subject-K-label.hdr/.img``; the same names
    with ``.nii`` or ``.nii.gz`` are taken as well. Subjects of the test set, which have no label file, are left out.

    Args:
        dataset_dir: the folder that holds the files.

    Returns:
        One ``{"image": [T1, T2], "label": label}`` a subject, in the order of the subjects' numbers.

    Raises:
        ValueError: if the folder or one of a subject's files is missing, naming the file.

    References:
        Multi-Site Infant Brain Segmentation Algorithms: The iSeg-2019 Challenge (Sun et al., 2021),
        https://doi.org/10.1109/TMI.2021.3055428
    """
    folder = existing_folder(
        dataset_dir, "an iSeg folder with subject-1-T1.hdr, subject-1-T2.hdr, subject-1-label.hdr, ..."
    )
    numbers = {int(m[1]) for f in folder.iterdir() if (m := re.match(r"subject-(\d+)-label\.", f.name))}
    if not numbers:
        raise ValueError(
            f"{folder}: no labelled iSeg subject found (looked for subject-K-label.hdr, .nii or .nii.gz); "
            "give --dataset_dir the folder with the iSeg training subjects, or --datalist FILE.json for other data"
        )
    cases = []
    for number in sorted(numbers):
        t1, t2, label = (_iseg_file(folder, f"subject-{number}-{kind}") for kind in ("T1", "T2", "label"))
        cases.append({"image": [t1, t2], "label": label})
    return cases


def find_training_cases(
    dataset_dir: str | Path | None = None,
    datalist: str | Path | None = None,
    n_folds: int = 10,
    fold: int = -1,
) -> dict[Literal["training", "validation"], list[Case]]:
    """Find labelled cases and split them: a datalist if one is given, otherwise an iSeg folder.

    Args:
        dataset_dir: iSeg folder, see :func:`find_iseg`.
        datalist: Decathlon datalist; its ``validation`` section is used if it has one.
        n_folds: number of folds; ten of ten subjects is the paper's split of nine to one.
        fold: the fold kept for validation, counted from 0; -1 is the last.

    Returns:
        The cases for training and for validation, disjoint; none where no data set is given, see :func:`require_cases`.

    Raises:
        ValueError: if nothing is found, a case has no label, or fewer than two cases are there to split.
    """
    if not (dataset_dir or datalist):
        return {"training": [], "validation": []}
    cases, validation = _labelled_cases(dataset_dir, datalist)
    if not cases:
        raise ValueError(f"{datalist}: its section 'training' is empty or missing")
    training, validation = (cases, validation) if validation else split_folds(cases, n_folds, fold)
    return {"training": training, "validation": validation}


def find_evaluation_cases(
    dataset_dir: str | Path | None = None,
    datalist: str | Path | None = None,
    n_folds: int = 10,
    fold: int = -1,
    subset: Literal["validation", "all"] = "validation",
) -> list[Case]:
    """Find the labelled cases to evaluate: those that :func:`find_training_cases` keeps for validation, or all.

    Args:
        dataset_dir: see :func:`find_training_cases`.
        datalist: see :func:`find_training_cases`.
        n_folds: see :func:`find_training_cases`.
        fold: see :func:`find_training_cases`.
        subset: ``"validation"`` or ``"all"``.

    Returns:
        The cases.

    Raises:
        ValueError: as :func:`find_training_cases`, or if the subset is neither of the two.
    """
    if subset not in ("validation", "all"):
        raise ValueError(f"subset is {subset!r}, expected 'validation' or 'all'")
    if not (dataset_dir or datalist):
        return []
    cases, validation = _labelled_cases(dataset_dir, datalist)
    if subset == "all":
        return cases + validation
    return validation or split_folds(cases, n_folds, fold)[1]


def require_cases(cases: Sized, kind: Literal["scans", "labelled cases"]) -> None:
    """Refuse to run on nothing; a config without input can still be read, checked and exported.

    Args:
        cases: data set or list.
        kind: what its cases are.

    Raises:
        ValueError: if it is empty, saying how to name the input.
    """
    if len(cases):
        return
    if kind == "scans":
        raise ValueError(
            "no input: give --image FILE, --t1 FILE --t2 FILE, --dataset_dir FOLDER or --datalist FILE.json"
        )
    raise ValueError("no data set: give --dataset_dir FOLDER (iSeg-2019) or --datalist FILE.json (Decathlon format)")


def split_folds(cases: Sequence[Case], n_folds: int = 10, fold: int = -1) -> tuple[list[Case], list[Case]]:
    """Split cases into those of all folds but one and those of that one.

    Args:
        cases: at least two.
        n_folds: number of folds, at most one a case (fewer cases than folds make a fold of one case each).
        fold: the fold to keep apart, -n_folds <= fold < n_folds.

    Returns:
        The other folds' cases and the chosen fold's.

    Raises:
        ValueError: if there are fewer than two cases or the fold does not exist.
    """
    if len(cases) < 2:
        raise ValueError(f"{len(cases)} labelled case found; training and validation need at least 2")
    n_folds = min(n_folds, len(cases))
    if n_folds < 2 or not -n_folds <= fold < n_folds:
        raise ValueError(f"fold is {fold} of {n_folds} folds; expected a fold from 0 to {n_folds - 1} of at least 2")
    fold %= n_folds
    kept = [case for i, case in enumerate(cases) if i % n_folds == fold]
    return [case for i, case in enumerate(cases) if i % n_folds != fold], kept


def read_datalist(path: str | Path) -> dict[str, list[Case]]:
    """Read a datalist in the format of the Medical Segmentation Decathlon.

    Args:
        path: JSON file with sections ``training``, ``validation``, ``test`` of ``{"image": ..., "label": ...}``; a file
            name is relative to the JSON file's folder. ``image`` may be a list ``[T1, T2]`` in which ``null`` marks a
            modality that the subject lacks. A section's entry may be the image's name alone.

    Returns:
        The sections, with absolute paths.

    Raises:
        ValueError: if the file is missing, is no JSON, or an entry has no image.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such datalist file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, dict) or not any(k in content for k in ("training", "validation", "test")):
        raise ValueError(f"{path}: expected an object with a section 'training', 'validation' or 'test'")

    def absolute(name: Any) -> Any:
        if isinstance(name, list):
            return [absolute(n) for n in name]
        return name if name is None else str((path.parent / name).absolute())

    sections: dict[str, list[Case]] = {}
    for section in ("training", "validation", "test"):
        sections[section] = []
        for entry in content.get(section, []):
            case = {"image": entry} if isinstance(entry, (str, list)) else entry
            if not isinstance(case, dict) or not case.get("image"):
                raise ValueError(f"{path}: the entry {entry!r} of section {section!r} names no image")
            sections[section].append({k: absolute(v) for k, v in case.items() if k in ("image", "label")})
    return sections


def _labelled_cases(dataset_dir: str | Path | None, datalist: str | Path | None) -> tuple[list[Case], list[Case]]:
    if not datalist:
        return find_iseg(str(dataset_dir)), []
    sections = read_datalist(datalist)
    cases, validation = sections["training"], sections["validation"]
    for case in [*cases, *validation]:
        if not case.get("label"):
            raise ValueError(f"{datalist}: the case {case['image']} has no label")
        for path in [*as_list(case["image"]), case["label"]]:
            if path is not None and not Path(path).exists():
                raise ValueError(f"{datalist}: lists {path}, which does not exist")
    if not cases and not validation:
        raise ValueError(f"{datalist}: its sections 'training' and 'validation' are empty")
    return cases, validation


def existing_folder(path: str | Path, expected: str) -> Path:
    """Return a folder, or say what was expected there.

    Args:
        path: the folder.
        expected: what it should hold, for the message.

    Raises:
        ValueError: if it does not exist.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected {expected}")
    return folder


def _iseg_file(folder: Path, stem: str) -> str:
    for suffix in IMAGE_SUFFIXES:
        if (folder / f"{stem}{suffix}").is_file():
            if suffix == ".hdr" and not (folder / f"{stem}.img").is_file():
                raise ValueError(f"{folder / stem}.img: missing beside its header {stem}.hdr")
            return str(folder / f"{stem}{suffix}")
    raise ValueError(f"{folder}: {stem} is missing (looked for {', '.join(stem + s for s in IMAGE_SUFFIXES)})")


def as_list(value: str | Path | Sequence[Any] | None) -> list[Any]:
    """Return the files of an argument that names none, one or several."""
    if value is None or value == "":
        return []
    return [value] if isinstance(value, (str, Path)) else list(value)
