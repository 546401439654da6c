"""Lists the scans to segment, files or folders of DICOM series, putting the modalities of a subject together."""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from memnet.datasets import ITK_SUFFIXES, SCAN_SUFFIXES, Case, as_list, existing_folder, read_datalist
from memnet.dicom import holds_dicom, split_uid

__all__ = ["find_scans", "list_scans", "tell_modality", "volumes_of"]

logger = logging.getLogger("memnet")

# Words of file names that tell a modality: sub-01_T1w.nii.gz, subject-3-T2.hdr, BraTS-GLI-00000-000-t2f. The first counts, of a
# BIDS name the last, but a T2 with FLAIR in its name is a FLAIR, and a T1 with a contrast agent in its name a T1c, wherever that
# stands: T2_AX_FLAIR, sub-01_ce-gadolinium_run-1_T1w (BIDS), T1_MPRAGE_post.
_WORDS = {
    "FLAIR": re.compile(r"FLAIR|T2W?FLAIR|T2F"),
    "T1c": re.compile(r"T1W?(?:C|CE|GD|GAD|POST)"),
    "T2": re.compile(r"T2W?"),
    "T1": re.compile(r"T1[WN]?"),
}
_AGENT = re.compile(r"(?:POST)?(?:GD|GAD|GADO|GADOLINIUM|CONTRAST)")
_AGENT_BEHIND_T1 = re.compile(r"CE|KM|POST")
_NONE_OF_IT, _POST_SOMETHING_ELSE = {"PRE", "NON", "NO", "WITHOUT"}, {"OP", "SURGERY", "TREATMENT", "RT"}
_WORD = re.compile(r"[^-_.+ ()]+")
# BIDS: a name of entities with values, of which those of a session (ses-T1) or a space (space-T1w) say nothing of the modality
_BIDS = re.compile(r"sub-[^-_]+(_[A-Za-z]+-[^-_]+)*_[A-Za-z0-9]+")
_OTHER_ENTITIES = re.compile(r"(?<![^_])(?:ses|space|from|to|label|atlas|task|run)-[^-_]*", re.IGNORECASE)
# files that lie beside the scans but are not scans
_NOT_A_SCAN = re.compile(
    r"[-_.](labels?|d?segm?|segmentation|classified|(brain)?mask|tissue|tumor|probseg|aseg|aparc\S*)$",
    re.IGNORECASE,
)
_DEPTH = 3  # folders down

Files = str | Path | Sequence[str | Path] | None
Row = list[Any]


def find_scans(
    image: Files = None,
    t1: Files = None,
    t2: Files = None,
    dataset_dir: str | Path | None = None,
    datalist: str | Path | None = None,
    modality: Literal["T1", "T2"] = "T1",
    pattern: str = "*",
) -> list[Case]:
    """List scans of T1, T2 or both; see :func:`list_scans`.

    Args:
        image: one scan or several, each a subject with the single modality that its name tells or else ``modality``.
        t1: T1 scan or scans; with ``t2`` the two lists are paired in order.
        t2: T2 scan or scans.
        dataset_dir: a folder; a file whose name tells no modality is a subject of its own. Subfolders are not searched.
        datalist: JSON file in the format of the Medical Segmentation Decathlon; ``image`` is a file or ``[T1, T2]``.
        modality: what a scan is when its name does not say. A folder's scans whose names tell another modality than T1 and T2
            are left out with a warning, and taken for this elsewhere, with another.
        pattern: which file names of ``dataset_dir`` to take, as in ``"*_SS.nii.gz"``.

    Returns:
        One ``{"image": [T1 or None, T2 or None], "output_name": name}`` a subject.

    Raises:
        ValueError: if nothing is found, a file is missing, or two arguments contradict each other.
    """
    return list_scans({"T1": t1, "T2": t2}, dataset_dir, datalist, modality, pattern, image)


def list_scans(
    files: Mapping[str, Files],
    dataset_dir: str | Path | None = None,
    datalist: str | Path | None = None,
    modality: str | None = None,
    pattern: str = "*",
    image: Files = None,
    subfolders: bool = False,
) -> list[Case]:
    """List the scans to segment from whichever of the arguments is given.

    Args:
        files: the modalities in the order of the channels, each with its file, or with its files of several subjects, or
            with ``None``; the lists are put together in order. A folder of a DICOM series is as good as a file, and so is
            ``folder:UID``, one of its series, or ``file:0``, a volume of a 4D file.
        dataset_dir: a folder; files or folders of DICOM whose names differ in the modality alone, as ``x_T1.nii.gz`` and
            ``x_T2.nii.gz``, are one subject.
        datalist: JSON file in the format of the Medical Segmentation Decathlon; ``image`` is a file or a list of all
            modalities, ``null`` for a missing one.
        modality: what a scan is when its name does not say; if ``None`` such a file of a folder is left out with a warning,
            and refused elsewhere.
        pattern: which file names of ``dataset_dir`` to take, as in ``"*_SS.nii.gz"``.
        image: one scan or several, each a subject with a single modality, the one its name tells or else ``modality``; or,
            without ``modality``, a 4D file of all modalities in the order of the channels.
        subfolders: search a folder's subfolders if it holds no scan itself, as BraTS has a folder a case, and if they hold none
            theirs, up to three folders down.

    Returns:
        One ``{"image": [a file or None for each modality], "output_name": name}`` a subject, names being unique; nothing
        where nothing is given, see :func:`memnet.datasets.require_cases`.

    Raises:
        ValueError: if nothing is found, a file is missing, or two arguments contradict each other.
    """
    names = list(files)
    if modality is not None and modality not in names:
        raise ValueError(f"modality is {modality!r}, expected {' or '.join(repr(name) for name in names)}")
    lists = {name: as_list(value) for name, value in files.items()}
    flags = " or ".join(name.lower() for name in names)
    given = {k for k, v in {"image": image, flags: any(lists.values()), "datalist": datalist}.items() if v}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(sorted(given))} are given together; give one of them")
    if image:
        whole = [modality is None and bool(volumes_of(path, len(names))) for path in as_list(image)]
        rows = [
            [p] if is_whole else _row(p, names, modality) for p, is_whole in zip(as_list(image), whole, strict=True)
        ]
    elif any(lists.values()):
        rows = _side_by_side(lists)
    elif datalist:
        sections = read_datalist(datalist)
        cases = sections.get("test") or sections.get("validation") or sections.get("training") or []
        rows = [_row(case["image"], names, modality) for case in cases]
    elif dataset_dir:
        rows = _search(existing_folder(dataset_dir, "a folder with NIfTI files"), names, modality, pattern, subfolders)
    else:
        return []
    for path in (p for row in rows for p in row if p is not None):
        if not split_uid(path)[0].exists():
            raise ValueError(f"{path}: no such file")
    if not rows:
        raise ValueError(f"{datalist}: lists no image")
    return [{"image": row, "output_name": name} for row, name in zip(rows, _unique_names(rows), strict=True)]


def tell_modality(path: str | Path, modalities: Sequence[str]) -> str | None:
    """Return which of the modalities a file's name tells, or ``None`` if it tells none.

    Args:
        path: the file.
        modalities: some of T1, T1c, T2, FLAIR.
    """
    told = _split_name(_stem(path))[0]
    return told if told in modalities else None


def volumes_of(path: str | Path, n_volumes: int) -> list[Any]:
    """Return ``[path:0, path:1, ...]`` of a 4D NIfTI with so many volumes, and nothing for any other file."""
    try:
        shape = tuple(nib.load(path).shape) if n_volumes > 1 and Path(path).is_file() else ()
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError):
        return []
    return [f"{path}:{k}" for k in range(n_volumes)] if shape[3:] == (n_volumes,) else []


def _side_by_side(lists: Mapping[str, list[Any]]) -> list[Row]:
    counts = {name.lower(): len(paths) for name, paths in lists.items() if paths}
    for (a, n), (b, m) in combinations(counts.items(), 2):
        if n != m:
            raise ValueError(f"{a} names {n} files and {b} names {m}; they are paired one to one")
    n_subjects = max(counts.values())
    return [list(row) for row in zip(*(paths or [None] * n_subjects for paths in lists.values()), strict=True)]


def _row(image: str | Path | Sequence[Any], names: list[str], modality: str | None) -> Row:
    if isinstance(image, (str, Path)):
        told = tell_modality(image, list(_WORDS))
        found = told if told in names else modality
        if told is not None and told != found and found is not None:
            logger.warning("%s: taken for a %s, though its name tells %s", image, found, told)
        if found is None:
            raise ValueError(f"{image}: its name tells none of {', '.join(names)}; name it by --modality")
        return [image if name == found else None for name in names]
    row = list(image)
    if len(row) not in (1, len(names)) or all(p is None for p in row):
        wanted = f"one file or the {len(names)} modalities [{', '.join(names)}]"
        raise ValueError(f"{image!r}: expected {wanted}, got {len(row)}")
    return row if len(row) == len(names) else _row(row[0], names, modality)


def _split_name(stem: str) -> tuple[str | None, str]:
    """Return the modality that a file's name tells, and what of the name is left to tell the subject."""
    found, silent = list(_WORD.finditer(stem)), [match.span() for match in _OTHER_ENTITIES.finditer(stem)]
    words = ["" if any(a <= word.start() < b for a, b in silent) else word[0].upper() for word in found]
    told = [next((name for name, pattern in _WORDS.items() if pattern.fullmatch(word)), None) for word in words]
    first = next((i for i, name in enumerate(told) if name), None)
    if first is None:
        return None, stem
    if told[-1] and _BIDS.fullmatch(stem):
        first = len(words) - 1
    name, used = told[first], {first}
    if name == "T2" and "FLAIR" in told:
        name, used = "FLAIR", {first, told.index("FLAIR")}
    elif name == "T1" and (agents := _agents(words, first)):
        name, used = "T1c", {first, *agents}
    return name, "_".join(word[0] for i, word in enumerate(found) if i not in used)


def _agents(words: list[str], t1: int) -> set[int]:
    """Return which words of a name say that a T1 was taken with a contrast agent."""
    found = set()
    for i, word in enumerate(words):
        before, after = words[i - 1] if i else "", words[i + 1] if i + 1 < len(words) else ""
        if _AGENT.fullmatch(word) and before not in _NONE_OF_IT:
            found.add(i)
        elif _AGENT_BEHIND_T1.fullmatch(word) and i > t1 and after not in _POST_SOMETHING_ELSE:
            found.add(i)
        elif word == "C" and i == t1 + 1:
            found.add(i)
        elif word == "CE" and i < t1 and after:
            found.update((i, i + 1))  # BIDS: ce-gadolinium
    return found


def _stem(path: str | Path) -> str:
    path, _ = split_uid(path)
    if path.is_dir():
        return path.name if path.name not in ("", ".", "..") else path.resolve().name
    name = path.name
    return next((name[: -len(s)] for s in (*SCAN_SUFFIXES, ".img") if name.lower().endswith(s)), Path(name).stem)


def _search(folder: Path, names: list[str], modality: str | None, pattern: str, subfolders: bool) -> list[Row]:
    rows, level = _put_together(folder, names, modality, pattern), [folder]
    for _ in range(_DEPTH if subfolders else 0):
        if not rows:
            level = sorted(f for parent in level for f in parent.iterdir() if f.is_dir() and not f.name.startswith("."))
            rows = [row for subfolder in level for row in _put_together(subfolder, names, modality, pattern)]
    if not rows:
        where = "its subfolders were searched, too" if subfolders else "subfolders are not searched"
        raise ValueError(
            f"{folder}: no scan found (looked for {pattern} ending in {', '.join(SCAN_SUFFIXES)}, and folders of DICOM files"
            f"{'' if modality else ', with ' + ' or '.join(names) + ' in the name'}; {where}){_others(folder)}"
        )
    return rows


def _others(folder: Path) -> str:
    """Say what of FreeSurfer's a folder holds, in which one volume lies beside dozens that were made of it."""
    files = sorted(file.name for file in folder.iterdir() if file.name.endswith((".mgz", ".mgh")))
    return f"; of files such as {files[0]} name the scan: --image {folder / files[0]}" if files else ""


def _put_together(folder: Path, names: list[str], modality: str | None, pattern: str) -> list[Row]:
    subjects: dict[str, Row] = {}
    # of one scan in several formats the first of these
    for file in sorted(folder.glob(pattern), key=lambda file: (file.name.lower().endswith(ITK_SUFFIXES), file)):
        stem = _stem(file)
        is_image = file.is_file() and file.name.lower().endswith(SCAN_SUFFIXES) and not file.name.startswith(".")
        is_series = file.is_dir() and not file.name.startswith(".") and holds_dicom(file)
        if not (is_image or is_series) or _NOT_A_SCAN.search(stem):
            continue
        told, subject = _split_name(stem)
        if told is not None and told not in names:
            logger.warning("%s: left out, its name tells %s, which is none of %s", file, told, ", ".join(names))
            continue
        if (told or modality) is None:
            logger.warning("%s: left out, its name tells none of %s", file, ", ".join(names))
            continue
        channel = names.index(told or str(modality))
        row = subjects.setdefault(subject, [None] * len(names))
        before = row[channel]
        if before is not None and _stem(before) == stem and not is_series:
            logger.warning("%s: left out, the same as %s in another format", file, before)
            continue
        if before is not None:
            raise ValueError(f"{file}: a second file of the same subject and modality as {before}")
        row[channel] = str(file)
    return list(subjects.values())


def _unique_names(rows: Sequence[Row]) -> list[str]:
    paths = [next(p for p in row if p is not None) for row in rows]
    split = [split_uid(path) for path in paths]
    # a folder's series is named with its UID, whether or not another one is to be segmented now
    names = [
        _stem(path) + (f"_{uid}" if uid and folder.is_dir() else "")
        for path, (folder, uid) in zip(paths, split, strict=True)
    ]
    if len(set(names)) < len(names):
        # subject_1/T1.nii.gz, subject_2/T1.nii.gz: the folder tells them apart, of a 4D file the volume
        names = [
            f"{path.absolute().parent.name}_{name}{f'_{part}' if part and not path.is_dir() else ''}"
            for (path, part), name in zip(split, names, strict=True)
        ]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name}: several inputs would be written under this name; give them different file names")
    return names
