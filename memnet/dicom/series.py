"""Finds the DICOM series of a folder and chooses one."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pydicom
from pydicom.uid import (
    EnhancedMRImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    MediaStorageDirectoryStorage,
    MRImageStorage,
)

from memnet.dicom.reading import DicomError, guarded

__all__ = ["find_series", "holds_dicom", "read_header", "split_uid"]

logger = logging.getLogger("memnet")

# what of MR is a volume; the second and third hold all slices in one file
_MR_IMAGES = (MRImageStorage, EnhancedMRImageStorage, LegacyConvertedEnhancedMRImageStorage)
_TAGS = ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "ProtocolName", "NumberOfFrames"]
_SUFFIXES = (".dcm", ".dicom", ".ima")
_MOST_LISTED = 20
# without a preamble: the first element is one of group 2 or 8
_STARTS_OF_OLD_FILES = [bytes([group, 0, element, 0]) for group in (2, 8) for element in (0, 1, 5, 8, 0x16)]


@dataclass(frozen=True)
class _Instance:
    file: Path
    description: str
    n_frames: int


def split_uid(path: str | Path) -> tuple[Path, str | None]:
    """Split the name of an input into the file or folder and what of it is meant.

    Args:
        path: a file, a folder, ``folder:UID`` for one of several series, or ``file:3`` for a volume of a 4D NIfTI.

    Returns:
        The file or folder, and the UID, the volume's number from 0, or ``None``.
    """
    match = re.fullmatch(r"(.+):([0-9]+(?:\.[0-9]+)*)", str(path))
    return (Path(path), None) if match is None or Path(path).exists() else (Path(match[1]), match[2])


def holds_dicom(path: str | Path) -> bool:
    """Tell whether this is a DICOM file or a folder with one in it, its subfolders not searched."""
    path, uid = split_uid(path)
    if path.is_file():
        return _is_dicom(path)
    return uid is not None or (path.is_dir() and any(_is_dicom(file) for file in path.iterdir() if file.is_file()))


def find_series(path: str | Path) -> list[Path]:
    """Find the files of the only MR series of a folder, or of the one named by its UID.

    Args:
        path: a folder, searched with its subfolders; ``folder:UID``; or a single DICOM file, which is a series by itself.

    Returns:
        The files, an instance once, in no meaningful order.

    Raises:
        ValueError: if there is no such folder or series, several to choose from, or a damaged file.
    """
    folder, uid = split_uid(path)
    if not folder.exists():
        raise DicomError(f"{folder}: no such file or folder")
    found: dict[str, dict[str, _Instance]] = {}
    others: dict[str, str] = {}
    n_foreign = 0
    for file in [folder] if folder.is_file() else _walk(folder):
        if not _is_dicom(file):
            if file.suffix.lower() in _SUFFIXES:
                raise DicomError(f"{file}: damaged, or no DICOM file (it does not begin as one)")
            n_foreign += 1
            continue
        with guarded(file):
            header = read_header(file, _TAGS)
            kind, series = header.get("SOPClassUID"), str(header.get("SeriesInstanceUID") or "")
            if header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
                continue
            if not kind or not series:
                raise DicomError(f"{file}: a damaged DICOM file, it lacks what tells its kind and series")
            if kind in _MR_IMAGES:
                instance = str(header.get("SOPInstanceUID") or file)
                description = str(header.get("SeriesDescription") or header.get("ProtocolName") or "")
                found.setdefault(series, {})[instance] = _Instance(
                    file, description, int(header.get("NumberOfFrames") or 1)
                )
            else:
                others[series] = kind.name if kind.name != kind else "objects of an unknown kind"
    if not found and not others:
        raise DicomError(
            f"{folder}: is a folder without DICOM files; expected a NIfTI file or the folder of a DICOM series"
        )
    if uid in others:
        raise DicomError(
            f"{folder}: the series {uid} is {others[uid]}, no MR images, of which alone a volume can be made"
        )
    if not found:
        kinds = ", ".join(sorted(set(others.values())))
        raise DicomError(f"{folder}: holds no MR images, of which alone a volume can be made, but {kinds}")
    if uid not in found and (uid is not None or len(found) > 1):
        what = f"holds no series {uid}, but" if uid else f"holds {len(found)} MR series; name one as {folder}:UID:"
        raise DicomError(f"{folder}: {what} {_listed(found)}")
    chosen = found[uid] if uid is not None else next(iter(found.values()))
    if n_foreign:
        logger.info("%s: %d files that are no DICOM were left out", folder, n_foreign)
    return [instance.file for instance in chosen.values()]


def _is_dicom(file: Path) -> bool:
    if file.is_symlink() and not file.exists():
        return False
    with guarded(file), file.open("rb") as stream:
        start = stream.read(132)
    if start[128:] == b"DICM" or start[:4] not in _STARTS_OF_OLD_FILES:
        return start[128:] == b"DICM"
    try:
        with guarded(file):
            return "SOPClassUID" in read_header(file, ["SOPClassUID"])
    except DicomError:
        return False


def read_header(file: Path, tags: list[str] | None = None) -> pydicom.FileDataset:
    """Read a DICOM file but for its pixels, with or without the preamble that old archives leave out."""
    return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=cast(Any, tags), force=True)


def _walk(folder: Path) -> Iterator[Path]:
    been: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in been:  # a link to where the way came from, or a second one to the same folder
            folders.clear()
            continue
        been.add(place)
        folders.sort()
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def _listed(found: dict[str, dict[str, _Instance]]) -> str:
    lines = []
    for uid, series in found.items():
        instances = list(series.values())
        shown = "".join(c for c in instances[0].description if c.isprintable())[:64] or "no description"
        n_images = sum(instance.n_frames for instance in instances)
        lines.append(f"{uid} ({shown}, {n_images} image{'s' if n_images > 1 else ''})")
    more = f" and {len(lines) - _MOST_LISTED} more" if len(lines) > _MOST_LISTED else ""
    return ", ".join(lines[:_MOST_LISTED]) + more
