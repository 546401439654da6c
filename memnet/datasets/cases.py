"""What the layouts of data sets share: cases, their files, their split."""

from __future__ import annotations

import random
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

__all__ = [
    "IMAGE_SUFFIXES",
    "ITK_SUFFIXES",
    "SCAN_SUFFIXES",
    "Case",
    "as_list",
    "existing_folder",
    "find_file",
    "require_cases",
    "require_files",
    "split_folds",
]

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".hdr")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
SCAN_SUFFIXES = IMAGE_SUFFIXES + ITK_SUFFIXES
"""Of files in a folder that are taken for scans; data sets are of ``IMAGE_SUFFIXES``."""

Case = dict[str, Any]

_HOW = {
    "scans": "no input: give --image FILE, --t1 FILE --t2 FILE, --dataset_dir FOLDER or --datalist FILE.json",
    "labelled cases": "no data set: give --dataset_dir FOLDER (iSeg-2019) or --datalist FILE.json (Decathlon format)",
    "diffusion series": "no data set: give --dataset_dir FOLDER (HCP, BIDS, or series with .bval and .bvec beside them)",
    "tensors": "no input: give --image TENSOR.nii.gz, --dwi SERIES.nii.gz or --dataset_dir FOLDER",
    "scans of tumours": (
        "no input: give some of --t1 FILE --t1c FILE --t2 FILE --flair FILE, or --dataset_dir FOLDER, "
        "or --datalist FILE.json"
    ),
    "labelled tumours": (
        "no data set: give --dataset_dir FOLDER (BraTS 2020, BraTS-GLI) or --datalist FILE.json (Decathlon format)"
    ),
    "raw data": "no input: give --image FILE.h5 (ISMRMRD) or --dataset_dir FOLDER",
    "fully sampled raw data": "no data set: give --dataset_dir FOLDER (ISMRMRD .h5, or NIfTI to simulate raw data from)",
}


def require_cases(cases: Sized, kind: str) -> None:
    """Refuse to run on nothing; a config without input can still be read, checked and exported.

    Args:
        cases: data set or list.
        kind: what its cases are: a word of the table above.

    Raises:
        ValueError: if it is empty, saying how to name the input.
    """
    if not len(cases):
        raise ValueError(_HOW[kind])


def split_folds(
    cases: Sequence[Case], n_folds: int = 10, fold: int = -1, seed: int | None = None
) -> tuple[list[Case], list[Case]]:
    """Split cases into those of all folds but one and those of that one.

    Cases of one ``patient`` stay together; a case that names none is a patient of its own.

    Args:
        cases: of at least two patients.
        n_folds: number of folds, at most one a patient (fewer patients than folds make a fold of one patient each).
        fold: the fold to keep apart, -n_folds <= fold < n_folds.
        seed: seed that shuffles the patients first; in their order if ``None``.

    Returns:
        The other folds' cases and the chosen fold's, each in the order of ``cases``.

    Raises:
        ValueError: if there are fewer than two patients or the fold does not exist.
    """
    patients = list(dict.fromkeys(case.get("patient", index) for index, case in enumerate(cases)))
    if len(patients) < 2:
        of_one = f" of {len(patients)} patient" if len(cases) > 1 else ""
        raise ValueError(
            f"{len(cases)} labelled case{'s' if len(cases) > 1 else ''}{of_one} found; training and validation need at "
            "least 2, of different patients"
        )
    n_folds = min(n_folds, len(patients))
    if n_folds < 2 or not -n_folds <= fold < n_folds:
        raise ValueError(f"fold is {fold} of {n_folds} folds; expected a fold from 0 to {n_folds - 1} of at least 2")
    if seed is not None:
        random.Random(seed).shuffle(patients)
    kept = set(patients[fold % n_folds :: n_folds])
    is_kept = [case.get("patient", index) in kept for index, case in enumerate(cases)]
    return (
        [case for case, keep in zip(cases, is_kept, strict=True) if not keep],
        [case for case, keep in zip(cases, is_kept, strict=True) if keep],
    )


def existing_folder(path: str | Path, expected: str) -> Path:
    """Return a folder, or say what was expected there.

    Args:
        path: the folder.
        expected: what it should hold, for the message.

    Raises:
        ValueError: if it does not exist.
    """
    folder = Path(str(path))  # a command line makes a number of a folder that is called 100307
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected {expected}")
    return folder


def find_file(folder: Path, stem: str) -> str | None:
    """Return the image file of a folder with this name but for its suffix and, where there is none, its case, or ``None``.

    Args:
        folder: the folder.
        stem: the name without ``.nii.gz``, ``.nii`` or ``.hdr``.

    Raises:
        ValueError: if an Analyze header lacks its ``.img``.
    """
    there = {file.name.lower(): file for file in sorted(folder.iterdir(), reverse=True)} if folder.is_dir() else {}
    for suffix in IMAGE_SUFFIXES:
        exact = folder / f"{stem}{suffix}"
        file = exact if exact.is_file() else there.get(exact.name.lower())
        if file is not None and file.is_file():
            if suffix == ".hdr" and not file.with_suffix(".img").is_file():
                raise ValueError(f"{folder / stem}.img: missing beside its header {stem}.hdr")
            return str(file)
    return None


def require_files(folder: Path, stems: Sequence[str]) -> list[str]:
    """Return the image files of a folder with these names but for their suffixes.

    Args:
        folder: the folder.
        stems: see :func:`find_file`.

    Raises:
        ValueError: naming the first that is missing.
    """
    files = []
    for stem in stems:
        file = find_file(folder, stem)
        if file is None:
            raise ValueError(f"{folder}: {stem} is missing (looked for {', '.join(stem + s for s in IMAGE_SUFFIXES)})")
        files.append(file)
    return files


def as_list(value: str | Path | Sequence[Any] | None) -> list[Any]:
    """Return the files of an argument that names none, one or several.

    Raises:
        ValueError: it is ``True``, which a command line makes of an argument without a value.
    """
    if isinstance(value, bool):
        raise ValueError("an argument that names files or a folder has no value; is a variable empty?")
    if value is None or value == "":
        return []
    return [value] if isinstance(value, (str, Path)) else list(value)
