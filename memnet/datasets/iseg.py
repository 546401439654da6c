"""The iSeg challenges of infant brain tissue."""

from __future__ import annotations

import re
from pathlib import Path

from memnet.datasets.cases import Case, existing_folder, require_files

__all__ = ["find_iseg"]


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
        t1, t2, label = require_files(folder, [f"subject-{number}-{kind}" for kind in ("T1", "T2", "label")])
        cases.append({"image": [t1, t2], "label": label})
    return cases
