"""Datalists in the format of the Medical Segmentation Decathlon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memnet.datasets.brats import patient_of
from memnet.datasets.cases import Case

__all__ = ["read_datalist"]


def read_datalist(path: str | Path) -> dict[str, list[Case]]:
    """Read a datalist in the format of the Medical Segmentation Decathlon.

    Args:
        path: JSON file with sections ``training``, ``validation``, ``test`` of ``{"image": ..., "label": ...}``; a file
            name is relative to the JSON file's folder. ``image`` may be a list of the modalities, as in ``[T1, T2]``, in
            which ``null`` marks one that the subject lacks. A section's entry may be the image's name alone.

    Returns:
        The sections, with absolute paths. A case's ``patient``, whose cases a split keeps together, is the entry's own or, of
        BraTS-GLI, the one that the label's name or folder tells.

    Raises:
        ValueError: if the file is missing, is no JSON, an entry has no image, or one file holds all modalities, in an order
            that is the datalist's own.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such datalist file")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, dict) or not any(k in content for k in ("training", "validation", "test")):
        raise ValueError(f"{path}: expected an object with a section 'training', 'validation' or 'test'")

    def absolute(name: Any) -> Any:
        if isinstance(name, list):
            return [absolute(n) for n in name]
        return name if name is None else str((path.parent / name).absolute())

    declared = content.get("modality")
    in_one_file = list(declared.values()) if isinstance(declared, dict) and len(declared) > 1 else []
    sections: dict[str, list[Case]] = {}
    for section in ("training", "validation", "test"):
        sections[section] = []
        for entry in content.get(section, []):
            case = {"image": entry} if isinstance(entry, (str, list)) else entry
            if not isinstance(case, dict) or not case.get("image"):
                raise ValueError(f"{path}: the entry {entry!r} of section {section!r} names no image")
            if in_one_file and isinstance(case["image"], str):
                volumes = ", ".join(f"{case['image']}:{k} is {name}" for k, name in enumerate(in_one_file))
                raise ValueError(
                    f"{path}: one file holds all modalities; list its volumes as the network wants them ({volumes})"
                )
            sections[section].append({k: absolute(v) for k, v in case.items() if k in ("image", "label")})
            patient = case["patient"] if case.get("patient") is not None else patient_of(case.get("label"))
            if patient is not None:
                sections[section][-1]["patient"] = str(patient)
    return sections
