"""Finds raw data to reconstruct, and fully sampled ones to train on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import nibabel as nib

from memnet.datasets.cases import Case, as_list, existing_folder, split_folds
from memnet.datasets.raw_data import slices_of

__all__ = ["RAW_SUFFIXES", "find_raw_data", "find_reconstruction_cases"]

logger = logging.getLogger("memnet")

RAW_SUFFIXES = (".h5", ".mat", ".cfl", ".nii.gz", ".nii")


def find_raw_data(
    image: str | Path | list[str | Path] | None = None,
    dataset_dir: str | Path | None = None,
    slice_index: int | None = None,
) -> list[Case]:
    """List the files to reconstruct.

    Args:
        image: one file or several, see :func:`memnet.datasets.raw_data.read_raw_data`, or NIfTI, from which raw data are
            simulated.
        dataset_dir: a folder of such files; subfolders are not searched.
        slice_index: which slice of files that hold several; the middle one if ``None``.

    Returns:
        One ``{"image": file}`` each, with ``slice_index`` where it is given; nothing where nothing is given, see
        :func:`memnet.datasets.require_cases`.

    Raises:
        ValueError: both are given, a file is missing, or the folder holds none.
    """
    if image and dataset_dir:
        raise ValueError("image and dataset_dir are given together; give one of them")
    if not (image or dataset_dir):
        return []
    files = [Path(file) for file in as_list(image)] or _search(str(dataset_dir))
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
    chosen = {} if slice_index is None else {"slice_index": slice_index}
    return [{"image": str(file)} | chosen for file in files]


def find_reconstruction_cases(
    dataset_dir: str | Path | None = None,
    n_folds: int = 5,
    fold: int = -1,
    movie: bool = False,
    subset: Literal["split", "validation", "all"] = "split",
) -> dict[Literal["training", "validation"], list[Case]]:
    """Find fully sampled raw data, or magnitudes to simulate them from, and split them.

    Args:
        dataset_dir: folder of files, one a subject, see :func:`find_raw_data`.
        n_folds: see :func:`memnet.datasets.split_folds`.
        fold: the fold kept for validation.
        movie: files hold movies; every slice of a file that has several is a case, of the same subject.
        subset: ``"all"`` takes every case for validation, with nothing left to train on; the others split.

    Returns:
        The cases for training and for validation, disjoint in their files, or, of a single file, in their slices; none where
        no folder is given.

    Raises:
        ValueError: nothing is found, or there is nothing to split.
    """
    if subset not in ("split", "validation", "all"):
        raise ValueError(f"subset is {subset!r}, expected 'validation' or 'all'")
    if not dataset_dir:
        return {"training": [], "validation": []}
    cases: list[Case] = []
    for file in _search(dataset_dir):
        slices = _slices(file) if movie else [None]
        cases += [
            {"image": str(file), "patient": str(file)} | ({} if i is None else {"slice_index": i}) for i in slices
        ]
    if subset == "all":
        training, validation = [], cases
    elif len({case["patient"] for case in cases}) == 1 and len(cases) > 1:
        n_blocks = min(n_folds, len(cases))
        if n_blocks < 2 or not -n_blocks <= fold < n_blocks:
            raise ValueError(
                f"fold is {fold} of {n_folds} folds; expected a fold from 0 to {n_blocks - 1} of at least 2"
            )
        size = len(cases) // n_blocks
        end = len(cases) - size * (n_blocks - 1 - fold % n_blocks)
        training, validation = cases[: end - size] + cases[end:], cases[end - size : end]
        told = f"{validation[0]['slice_index']} to {validation[-1]['slice_index']}"
        logger.warning("%s: one subject; its slices %s are kept for validation", cases[0]["image"], told)
    else:
        training, validation = split_folds(cases, n_folds, fold)

    def without_patient(some: list[Case]) -> list[Case]:
        return [{k: v for k, v in case.items() if k != "patient"} for case in some]

    return {"training": without_patient(training), "validation": without_patient(validation)}


def _search(dataset_dir: str | Path) -> list[Path]:
    folder = existing_folder(dataset_dir, f"a folder of {', '.join(RAW_SUFFIXES)} files")
    files = sorted(f for f in folder.iterdir() if f.name.endswith(RAW_SUFFIXES) and not f.name.startswith("."))
    if not files:
        raise ValueError(f"{folder}: holds none of {', '.join(RAW_SUFFIXES)}")
    return files


def _slices(file: Path) -> list[int | None]:
    if not file.name.endswith((".nii", ".nii.gz")):
        slices = slices_of(file)
        return [*slices] if len(slices) > 1 else [None]
    try:
        shape = nib.load(file).shape
    except (OSError, EOFError, nib.filebasedimages.ImageFileError) as error:
        raise ValueError(f"{file}: not a NIfTI file, or damaged ({error})") from error
    if len(shape) != 4:
        raise ValueError(f"{file}: has the shape {shape}; expected a movie (x, y, slice, frame)")
    return list(range(shape[2]))
