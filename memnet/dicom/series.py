"""Finds the DICOM series of a folder and chooses one."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import (
    EnhancedMRImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    MediaStorageDirectoryStorage,
    MRImageStorage,
)

__all__ = ["find_series", "holds_dicom", "quiet", "read_header", "split_uid"]

logger = logging.getLogger("memnet")

# what of MR is a volume; the second and third hold all slices in one file
_MR_IMAGES = (MRImageStorage, EnhancedMRImageStorage, LegacyConvertedEnhancedMRImageStorage)
_TAGS = ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "ProtocolName", "NumberOfFrames"]
_SUFFIXES = (".dcm", ".dicom", ".ima")
_MOST_LISTED = 20


def split_uid(path: str | Path) -> tuple[Path, str | None]:
    """Split the name of an input into the file or folder and the UID of the series that is meant there.

    Args:
        path: a file, a folder, or ``folder:UID``.

    Returns:
        The file or folder, and the UID or ``None``.
    """
    match = re.fullmatch(r"(.+):([0-9]+(?:\.[0-9]+)+)", str(path))
    return (Path(path), None) if match is None or Path(path).exists() else (Path(match[1]), match[2])


def holds_dicom(path: str | Path) -> bool:
    """Tell whether this is a DICOM file or a folder with one in it, its subfolders not searched."""
    path, uid = split_uid(path)
    if uid is not None or path.is_file():
        return uid is not None or _is_dicom(path)
    return path.is_dir() and any(_is_dicom(file) for file in path.iterdir() if file.is_file())


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
        raise ValueError(f"{folder}: no such file or folder")
    found: dict[str, dict[str, tuple[Path, Dataset]]] = {}
    others: dict[str, str] = {}
    n_foreign = 0
    for file in [folder] if folder.is_file() else _walk(folder):
        if not _is_dicom(file):
            if file.suffix.lower() in _SUFFIXES:
                raise ValueError(f"{file}: damaged, or no DICOM file (it does not begin as one)")
            n_foreign += 1
            continue
        header = read_header(file, _TAGS)
        kind, series = header.get("SOPClassUID"), str(header.get("SeriesInstanceUID"))
        if header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
            continue
        if not kind or not header.get("SeriesInstanceUID"):
            raise ValueError(f"{file}: a damaged DICOM file, it lacks what tells its kind and series")
        if kind in _MR_IMAGES:
            found.setdefault(series, {}).setdefault(str(header.get("SOPInstanceUID", file)), (file, header))
        else:
            others[series] = kind.name if kind.name != kind else "objects of an unknown kind"
    if not found and not others:
        raise ValueError(
            f"{folder}: is a folder without DICOM files; expected a NIfTI file or the folder of a DICOM series"
        )
    if uid in others:
        raise ValueError(
            f"{folder}: the series {uid} is {others[uid]}, no MR images, of which alone a volume can be made"
        )
    if not found:
        kinds = ", ".join(sorted(set(others.values())))
        raise ValueError(f"{folder}: holds no MR images, of which alone a volume can be made, but {kinds}")
    if uid not in found and (uid is not None or len(found) > 1):
        what = f"holds no series {uid}, but" if uid else f"holds {len(found)} MR series; name one as {folder}:UID:"
        raise ValueError(f"{folder}: {what} {_listed(found)}")
    chosen = found[uid] if uid is not None else next(iter(found.values()))
    if n_foreign:
        logger.info("%s: %d files that are no DICOM were left out", folder, n_foreign)
    return [file for file, _ in chosen.values()]


def read_header(file: Path, tags: Sequence[str] | None = None) -> Dataset:
    """Read a DICOM file without its pixels.

    Args:
        file: the file.
        tags: keywords of what to read, everything if ``None``.

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    try:
        with quiet():
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(tags) if tags else None)
            # values are parsed when they are asked for
            for keyword in tags or ():
                header.get(keyword)
            return header
    except OSError:
        raise ValueError(f"{file}: cannot be read") from None
    except Exception:  # a parser on damaged bytes raises anything, and quotes what it found, which may name the patient
        raise ValueError(f"{file}: a damaged DICOM file") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom, which quotes the values that it finds odd, from telling a patient's name or birthday."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    levels = [each.level for each in loggers]
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        for each in loggers:
            each.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)


def _is_dicom(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        raise ValueError(f"{file}: cannot be read") from None


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def _listed(found: dict[str, dict[str, tuple[Path, Dataset]]]) -> str:
    lines = []
    for uid, instances in found.items():
        header = next(iter(instances.values()))[1]
        description = str(header.get("SeriesDescription") or header.get("ProtocolName") or "")
        shown = "".join(c for c in description if c.isprintable())[:64] or "no description"
        n_images = sum(int(h.get("NumberOfFrames") or 1) for _, h in instances.values())
        lines.append(f"{uid} ({shown}, {n_images} image{'s' if n_images > 1 else ''})")
    return ", ".join(lines[:_MOST_LISTED]) + (
        f" and {len(lines) - _MOST_LISTED} more" if len(lines) > _MOST_LISTED else ""
    )
