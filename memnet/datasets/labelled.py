"""The cases to train on and to validate with, from a folder of a known layout or from a datalist."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from memnet.datasets.brats import find_brats
from memnet.datasets.cases import Case, as_list, split_folds
from memnet.datasets.datalist import read_datalist
from memnet.datasets.iseg import find_iseg
from memnet.dicom import split_uid

__all__ = ["find_evaluation_cases", "find_training_cases"]

logger = logging.getLogger("memnet")

Layout = Literal["iseg", "brats"]


def find_training_cases(
    dataset_dir: str | Path | None = None,
    datalist: str | Path | None = None,
    n_folds: int = 10,
    fold: int = -1,
    layout: Layout = "iseg",
    seed: int | None = None,
    allow_missing: bool = False,
) -> dict[Literal["training", "validation"], list[Case]]:
    """Find labelled cases and split them: a datalist if one is given, otherwise a folder of the layout.

    Args:
        dataset_dir: folder, see :func:`find_iseg` and :func:`find_brats`.
        datalist: Decathlon datalist; its ``validation`` section is used if it has one.
        n_folds: number of folds; ten of ten subjects is the paper's split of nine to one, five is 80 to 20 percent.
        fold: the fold kept for validation, counted from 0; -1 is the last.
        layout: what kind of folder ``dataset_dir`` is: ``"iseg"`` or ``"brats"``.
        seed: seed that shuffles the cases before they are split; in their order if ``None``.
        allow_missing: see :func:`find_brats`.

    Returns:
        The cases for training and for validation, disjoint; none where no data set is given, see :func:`require_cases`.

    Raises:
        ValueError: if nothing is found, a case has no label, or fewer than two patients are there to split.
    """
    if not (dataset_dir or datalist):
        return {"training": [], "validation": []}
    cases, validation = _labelled_cases(dataset_dir, datalist, layout, allow_missing)
    if not cases:
        raise ValueError(f"{datalist}: its section 'training' is empty or missing")
    training, validation = (cases, validation) if validation else split_folds(cases, n_folds, fold, seed)
    return {"training": _files(training), "validation": _files(validation)}


def find_evaluation_cases(
    dataset_dir: str | Path | None = None,
    datalist: str | Path | None = None,
    n_folds: int = 10,
    fold: int = -1,
    subset: Literal["validation", "all"] = "validation",
    layout: Layout = "iseg",
    seed: int | None = None,
    allow_missing: bool = False,
) -> list[Case]:
    """Find the labelled cases to evaluate: those that :func:`find_training_cases` keeps for validation, or all.

    Args:
        dataset_dir: see :func:`find_training_cases`.
        datalist: see :func:`find_training_cases`.
        n_folds: see :func:`find_training_cases`.
        fold: see :func:`find_training_cases`.
        subset: ``"validation"`` or ``"all"``.
        layout: see :func:`find_training_cases`.
        seed: see :func:`find_training_cases`.
        allow_missing: see :func:`find_training_cases`.

    Returns:
        The cases.

    Raises:
        ValueError: as :func:`find_training_cases`, or if the subset is neither of the two.
    """
    if subset not in ("validation", "all"):
        raise ValueError(f"subset is {subset!r}, expected 'validation' or 'all'")
    if not (dataset_dir or datalist):
        return []
    cases, validation = _labelled_cases(dataset_dir, datalist, layout, allow_missing)
    if subset == "all":
        return _files(cases + validation)
    return _files(validation or split_folds(cases, n_folds, fold, seed)[1])


def _labelled_cases(
    dataset_dir: str | Path | None, datalist: str | Path | None, layout: Layout, allow_missing: bool
) -> tuple[list[Case], list[Case]]:
    if not datalist:
        return find_iseg(str(dataset_dir)) if layout == "iseg" else find_brats(str(dataset_dir), allow_missing), []
    if dataset_dir:
        logger.warning("%s: is not read, since there is a datalist, whose files lie beside it", dataset_dir)
    sections = read_datalist(datalist)
    cases, validation = sections["training"], sections["validation"]
    shared = {str(case["image"]) for case in cases} & {str(case["image"]) for case in validation}
    if shared:
        logger.warning(
            "%s: %d cases are to train on and to validate with, such as %s", datalist, len(shared), min(shared)
        )
    for case in [*cases, *validation]:
        if not case.get("label"):
            raise ValueError(f"{datalist}: the case {case['image']} has no label")
        for path in [*as_list(case["image"]), case["label"]]:
            if path is not None and not split_uid(path)[0].exists():
                raise ValueError(f"{datalist}: lists {path}, which does not exist")
    if not cases and not validation:
        raise ValueError(f"{datalist}: its sections 'training' and 'validation' are empty")
    return cases, validation


def _files(cases: Sequence[Case]) -> list[Case]:
    """Leave what only the split had to know out of what transforms and loaders get."""
    return [{key: case[key] for key in ("image", "label")} for case in cases]
