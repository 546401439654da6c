"""The BraTS challenges of brain tumours."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from memnet.datasets.cases import Case, existing_folder, find_file

__all__ = ["find_brats", "patient_of"]

logger = logging.getLogger("memnet")

# the endings of T1, T1c, T2 and FLAIR: until BraTS 2022, and from 2023 on
_ENDINGS = (("_t1", "_t1ce", "_t2", "_flair"), ("-t1n", "-t1c", "-t2w", "-t2f"))
_MODALITIES = ("T1", "T1c", "T2", "FLAIR")
# a case of BraTS 2020 whose labels were distributed under another name
_MISNAMED = {"BraTS20_Training_355": "W39_1998.09.19_Segm"}
# BraTS-GLI-NNNNN-NNN: patient, then time point
_PATIENT = re.compile(r"(BraTS-[A-Za-z]+-\d+)-\d+")
_DEPTH = 3


def find_brats(dataset_dir: str | Path, allow_missing: bool = False) -> list[Case]:
    """Find the labelled cases of a BraTS folder as distributed.

    A case is a folder with files of its own name: ``BraTS20_Training_NNN/BraTS20_Training_NNN_{t1,t1ce,t2,flair,seg}``
    (2018 to 2021 likewise) or ``BraTS-GLI-NNNNN-NNN/BraTS-GLI-NNNNN-NNN-{t1n,t1c,t2w,t2f,seg}`` (from 2023 on, other
    tumours likewise, whose labels may mean something else), ``.nii.gz`` or ``.nii``, in capitals or not. Case folders may
    lie up to three folders down. A case without labels, such as those for validation, is left out with a warning.

    Args:
        dataset_dir: the folder that holds the cases' folders.
        allow_missing: take a case without one of its modalities, its file being ``None``.

    Returns:
        One ``{"image": [T1, T1c, T2, FLAIR], "label": label, "patient": name}`` a case, in the order of the cases' names;
        two time points of BraTS-GLI have the same patient.

    Raises:
        ValueError: if the folder, every labelled case, or a case's modality is missing, naming case and file.

    References:
        The Multimodal Brain Tumor Image Segmentation Benchmark (BRATS) (Menze et al., 2015),
        https://doi.org/10.1109/TMI.2014.2377694
    """
    folder = existing_folder(dataset_dir, "a BraTS folder with BraTS20_Training_001, ... or BraTS-GLI-00000-000, ...")
    cases, unlabelled = [], []
    for path in sorted(_case_folders(folder), key=lambda p: p.name):
        name = path.name
        endings = max(_ENDINGS, key=lambda e: sum(find_file(path, name + ending) is not None for ending in e))
        label = find_file(path, f"{name}{endings[0][0]}seg") or find_file(path, _MISNAMED.get(name, f"{name}_seg"))
        if label is None:
            unlabelled.append(name)
            continue
        image = [find_file(path, name + ending) for ending in endings]
        for modality, ending, file in zip(_MODALITIES, endings, image, strict=True):
            if file is None and not allow_missing:
                raise ValueError(
                    f"{path}: the {modality} of case {name} is missing (looked for {name}{ending}.nii.gz and .nii); "
                    "add the file, or give --allow_missing true to train on what is there"
                )
        cases.append({"image": image, "label": label, "patient": patient_of(label) or name})
    if not cases:
        found = f"but {len(unlabelled)} without labels" if unlabelled else "nor one without labels"
        raise ValueError(
            f"{folder}: no labelled BraTS case found, {found} (looked for NAME/NAME_seg.nii.gz beside NAME_t1, _t1ce, _t2 "
            "and _flair, or NAME/NAME-seg.nii.gz beside NAME-t1n, -t1c, -t2w and -t2f); give --dataset_dir the folder "
            "with the training cases, or --datalist FILE.json for other data"
        )
    if unlabelled:
        logger.warning("%s: cases without labels are left out (%d, %s first)", folder, len(unlabelled), unlabelled[0])
    return cases


def patient_of(label: str | Path | None) -> str | None:
    """Return the patient that a segmentation's name or folder tells as BraTS-GLI has it, or ``None`` if neither does."""
    if label is None:
        return None
    found = _PATIENT.match(Path(label).name) or _PATIENT.match(Path(label).parent.name)
    return found[1] if found else None


def _case_folders(folder: Path) -> list[Path]:
    endings = {ending for group in _ENDINGS for ending in group}
    found = []
    for root, folders, files in os.walk(folder):
        path = Path(root)
        names = [file.lower() for file in files]
        stems = {name.removesuffix(".gz").removesuffix(".nii") for name in names if name.endswith((".nii", ".nii.gz"))}
        if path != folder and any(path.name.lower() + ending in stems for ending in endings):
            found.append(path)
            folders.clear()
        elif len(path.relative_to(folder).parts) >= _DEPTH:
            folders.clear()
    return found
