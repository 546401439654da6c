"""Splits the subjects of diffusion series, writes the split down, and tells where one is broken."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from memnet.datasets.cases import Case
from memnet.datasets.diffusion_files import source_of
from memnet.whole_files import whole_file

__all__ = [
    "SECTIONS",
    "SPLIT_FILE",
    "Split",
    "by_patient",
    "require_split",
    "split_subjects",
    "tell_seen",
    "tell_shared",
    "write_split",
]

logger = logging.getLogger("memnet")

Section = Literal["training", "validation", "test"]
Split = dict[Section, list[Case]]
SECTIONS: tuple[Section, ...] = ("training", "validation", "test")

SPLIT_FILE = "split.json"
"""Lies beside the weights of a training and names its subjects."""


def split_subjects(
    cases: Sequence[Case], n_training: int | None, n_validation: int, n_test: int, seed: int = 0
) -> Split:
    """Split subjects at random into those to train on, to validate and to test with.

    The test subjects, and the validation's, stay the same whatever the number of those to train on. Series of one ``patient``
    stay together, and count as one subject.

    Args:
        cases: see :func:`memnet.datasets.diffusion.find_series`.
        n_training: how many to train on; all that are left where None.
        n_validation: how many to choose the best epoch by.
        n_test: how many to test with.
        seed: seed of the split.

    Raises:
        ValueError: there are not as many.
    """
    shuffled = by_patient(cases)
    wanted = n_validation + n_test + (1 if n_training is None else n_training)
    if len(shuffled) < wanted or n_validation < 1 or n_test < 0 or (n_training is not None and n_training < 1):
        raise ValueError(
            f"{len(shuffled)} subjects are there; n_training={n_training}, n_validation={n_validation} and n_test={n_test} "
            f"need {wanted}, at least one to train on and one to validate with"
        )
    random.Random(seed).shuffle(shuffled)
    test, validation = shuffled[:n_test], shuffled[n_test : n_test + n_validation]
    training = shuffled[n_test + n_validation :][:n_training]
    return {"training": sum(training, []), "validation": sum(validation, []), "test": sum(test, [])}


def require_split(cases: Split, file: str | Path, resume: bool = False) -> Split:
    """See that a training that goes on has the subjects that it began with, see :func:`write_split`.

    Args:
        cases: see :func:`memnet.datasets.diffusion.find_tensor_cases`.
        file: what the training has written down.
        resume: whether a training goes on.

    Returns:
        ``cases``.

    Raises:
        ValueError: the training that goes on had other subjects.
    """
    file, series = Path(file), _series(cases)
    if resume and any(series.values()) and file.is_file():
        before = _read(file)
        for section in SECTIONS[:2]:
            changed = sorted(set(before[section]) ^ set(series[section]))
            if changed:
                raise ValueError(
                    f"{file}: the training to resume had other subjects for {section} (of {len(changed)}, {changed[0]} is in "
                    "one of both alone); give the data set and the split that it began with"
                )
    return cases


def write_split(cases: Split, file: str | Path) -> None:
    """Write down which subjects a training has, for :func:`tell_seen`; nothing where there are none.

    Args:
        cases: see :func:`memnet.datasets.diffusion.find_tensor_cases`.
        file: JSON, beside the weights: for each section the subjects' names, which may have moved when it goes on, and files.
    """
    series = _series(cases)
    if any(series.values()):
        with whole_file(file) as partial:
            partial.write_text(json.dumps(series, indent=1), encoding="utf-8")


def _series(cases: Split) -> dict[str, dict[str, str]]:
    return {s: {case["subject"]: source_of(case["tensor_high"]) for case in cases[s]} for s in SECTIONS}


def _read(file: Path) -> dict[str, dict[str, str]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {section: dict(found[section]) for section in SECTIONS}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: is no split that a training has written, or damaged; remove it") from error


def tell_seen(cases: Split, section: str, weights: str | Path) -> Split:
    """Warn where series to be scored are among those that weights were trained or chosen with, see :func:`write_split`.

    Args:
        cases: see :func:`memnet.datasets.diffusion.find_tensor_cases`.
        section: what is scored.
        weights: a training's file of weights; of others nothing is known, and nothing told.

    Returns:
        ``cases``.
    """
    file = Path(weights).parent / SPLIT_FILE
    file = file.with_suffix(".previous.json") if Path(weights).stem.endswith(".previous") else file
    if section == "test" and file.is_file():
        before = _read(file)
        seen = {*before["training"].values(), *before["validation"].values()}
        found = [source for case in cases["test"] if (source := source_of(case["tensor_high"])) in seen]
        if found:
            logger.warning(
                "%d of %d test series were trained on or validated with, according to %s, such as %s: the scores say little of "
                "other subjects",
                len(found),
                len(cases["test"]),
                file,
                found[0],
            )
    return cases


def by_patient(cases: Sequence[Case]) -> list[list[Case]]:
    """Group series of one patient, in the order of the first of each."""
    of_patient: dict[str, list[Case]] = {}
    for case in cases:
        of_patient.setdefault(str(case.get("patient", case["subject"])), []).append(case)
    return list(of_patient.values())


def tell_shared(split: Split) -> None:
    """Warn of a patient or a file in two sections."""
    known: dict[str, str] = {}
    for section, cases in split.items():
        for key in {str(Path(c["data"]).resolve()) for c in cases} | {c["patient"] for c in cases if "patient" in c}:
            if known.setdefault(key, section) != section:
                logger.warning(
                    "%s is in %s and in %s: scores will say little of other subjects", key, known[key], section
                )
