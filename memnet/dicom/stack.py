"""Finds out how the slices of a DICOM series make one volume, or why they make none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from memnet.dicom.reading import DicomError, guarded
from memnet.dicom.series import find_series, read_header

__all__ = ["Plane", "Stack", "read_stack"]

# where DICOM's x and y grow to the left and the back, NIfTI's grow to the right and the front
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# share of a voxel by which slices may miss their place, as in memnet.transforms.grids.same_grid
_TOLERANCE = 0.05
_LARGEST_TILT = 0.1  # degrees
# what the images of one place differ in where a series holds several volumes
_REPEATS = [
    "EchoTime", "EffectiveEchoTime", "InversionTime", "RepetitionTime", "FlipAngle", "TriggerTime", "ImageType", "FrameType",
    "TemporalPositionIdentifier", "TemporalPositionIndex", "DiffusionBValue", "AcquisitionNumber", "AcquisitionTime",
]  # fmt: skip


@dataclass(frozen=True)
class Plane:
    """Where a slice lies and how its pixels are to be taken.

    Args:
        file: its file.
        header: what the file says but its pixels.
        frame: which of the file's frames it is.
        position: centre of its first pixel, ``(3,)``, mm, LPS+.
        axes: directions of growing column and growing row, ``(2, 3)``, LPS+.
        spacing: distance of neighbouring columns and of neighbouring rows, ``(2,)``, mm.
        scale: slope and intercept from stored to real values.
        groups: the datasets that hold its attributes.
    """

    file: Path
    header: Dataset
    frame: int
    position: np.ndarray
    axes: np.ndarray
    spacing: np.ndarray
    scale: tuple[float, float]
    groups: Sequence[Dataset]

    @property
    def in_one_file(self) -> bool:
        """Whether its file holds several slices, as enhanced ones do."""
        return int(self.header.get("NumberOfFrames") or 1) > 1


@dataclass(frozen=True)
class Stack:
    """The slices of a volume in their order along the normal ``columns x rows``.

    Args:
        planes: the slices.
        affine: ``(4, 4)`` of ``(column, row, slice)`` to mm, RAS+.
    """

    planes: Sequence[Plane]
    affine: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of columns, rows and slices."""
        header = self.planes[0].header
        return int(header.Columns), int(header.Rows), len(self.planes)


def read_stack(path: str | Path) -> Stack:
    """Read where the slices of a series lie, without their pixels.

    Args:
        path: see :func:`memnet.dicom.series.find_series`.

    Raises:
        ValueError: if the series is no single regular volume, saying why, or a file is damaged.
    """
    files = find_series(path)
    planes: list[Plane] = []
    for file in files:
        with guarded(file):
            planes += _planes(file, read_header(file))
    if len(files) > 1 and any(plane.in_one_file for plane in planes):
        raise DicomError(f"{path}: the series has {len(files)} files, some of several frames; give one of them alone")
    with guarded(path):
        return _stack(str(path), planes)


def _planes(file: Path, header: Dataset) -> list[Plane]:
    if "MOSAIC" in (header.get("ImageType") or []):
        raise DicomError(
            f"{file}: a Siemens mosaic, whose slices lie side by side in one image; convert it with dcm2niix"
        )
    if header.get("SamplesPerPixel", 1) != 1 or header.get("PhotometricInterpretation", "MONOCHROME2") != "MONOCHROME2":
        raise DicomError(f"{file}: its pixels are no plain grey values, colours for instance")
    shared = list(header.get("SharedFunctionalGroupsSequence") or [])
    own = list(header.get("PerFrameFunctionalGroupsSequence") or [])
    if not own:
        return [_plane(file, header, 0, [header])]
    return [_plane(file, header, frame, [*_macros(group), *(m for s in shared for m in _macros(s)), header])
            for frame, group in enumerate(own)]  # fmt: skip


def _macros(group: Dataset) -> list[Dataset]:
    """Return the items of a functional group's sequences, in which the attributes of a frame are."""
    return [element.value[0] for element in group if element.VR == "SQ" and element.value]


def _plane(file: Path, header: Dataset, frame: int, groups: Sequence[Dataset]) -> Plane:
    def numbers(keyword: str, n: int, default: float | None = None) -> np.ndarray:
        for group in groups:
            if keyword in group:
                try:
                    values = np.asarray(group[keyword].value, dtype=np.float64).reshape(n)
                except Exception:  # pydicom parses only now, and quotes what it found
                    values = np.array([np.nan])
                if not np.isfinite(values).all():
                    raise DicomError(f"{file}: its {keyword} is not {n} number{'s' if n > 1 else ''}")
                return values
        if default is None:
            raise DicomError(f"{file}: lacks {keyword}, without which no place in space is known")
        return np.full(n, default)

    for keyword in ("Rows", "Columns"):
        if numbers(keyword, 1)[0] < 1:
            raise DicomError(f"{file}: has no {keyword.lower()}")
    axes, spacing = numbers("ImageOrientationPatient", 6).reshape(2, 3), numbers("PixelSpacing", 2)[::-1]
    if np.abs(axes @ axes.T - np.eye(2)).max() > 1e-2:
        raise DicomError(f"{file}: its ImageOrientationPatient is not two directions at a right angle")
    if spacing.min() <= 0:
        raise DicomError(f"{file}: its PixelSpacing is not positive")
    scale = float(numbers("RescaleSlope", 1, 1.0)[0]), float(numbers("RescaleIntercept", 1, 0.0)[0])
    return Plane(file, header, frame, numbers("ImagePositionPatient", 3), axes, spacing, scale, groups)


def _stack(name: str, planes: Sequence[Plane]) -> Stack:
    if len(planes) < 2:
        hint = "; give the folder of its series" if planes and str(planes[0].file) == name else ""
        raise DicomError(f"{name}: the series is a single image, expected a stack of them{hint}")
    _require_one(name, planes, "sizes", lambda p: np.array([p.header.Columns, p.header.Rows], dtype=float), 0.5)
    _require_one(name, planes, "pixel spacings", lambda p: p.spacing, 1e-3 * float(planes[0].spacing.min()))
    _require_one(name, planes, "orientations, as localizers are", lambda p: p.axes, 1e-3)
    if len({str(p.header.get("FrameOfReferenceUID")) for p in planes}) > 1:
        raise DicomError(
            f"{name}: its slices have several frames of reference, so that they have no place to each other"
        )
    first = planes[0]
    normal = np.cross(*first.axes)
    planes = sorted(planes, key=lambda p: float(p.position @ normal))
    _require_even(name, planes, np.array([p.position @ normal for p in planes]))

    positions = np.array([p.position for p in planes])
    step = (positions[-1] - positions[0]) / (len(planes) - 1)
    in_plane = float(np.linalg.norm(step - (step @ normal) * normal))
    tilt = float(np.degrees(np.arctan2(in_plane, step @ normal)))
    if tilt > _LARGEST_TILT and in_plane * (len(planes) - 1) > 2 * _TOLERANCE * first.spacing.min():
        raise DicomError(
            f"{name}: the slices are stacked askew, by {tilt:.2g} degrees (a tilted gantry), so that no grid of right angles "
            "fits; resample the series first"
        )
    expected = positions[0] + np.arange(len(planes))[:, None] * step
    off = np.linalg.norm(positions - expected, axis=1)
    if off.max() > _TOLERANCE * min(float(np.linalg.norm(step)), *first.spacing):
        worst = planes[int(off.argmax())]
        raise DicomError(
            f"{name}: {_called(worst)} is {off.max():.3g} mm off the place that a regular stack would give it"
        )
    affine = np.eye(4)
    affine[:3] = np.column_stack(
        [first.axes[0] * first.spacing[0], first.axes[1] * first.spacing[1], step, positions[0]]
    )
    return Stack(planes, _LPS_TO_RAS @ affine)


def _require_one(
    name: str, planes: Sequence[Plane], what: str, of: Callable[[Plane], np.ndarray], tolerance: float
) -> None:
    kinds: list[np.ndarray] = []
    for plane in planes:
        if all(np.abs(of(plane) - kind).max() > tolerance for kind in kinds):
            kinds.append(of(plane))
    if len(kinds) > 1:
        raise DicomError(f"{name}: its {len(planes)} images have {len(kinds)} different {what}; a volume has one")


def _require_even(name: str, planes: Sequence[Plane], along: np.ndarray) -> None:
    """Refuse places taken twice, and gaps.

    Args:
        name: the series.
        planes: its slices in order.
        along: their places along the normal, mm.
    """
    gaps = np.diff(along)
    step = float(np.median(gaps[gaps > 1e-3])) if (gaps > 1e-3).any() else 0.0
    n_places = 1 + int((gaps > _TOLERANCE * step).sum())
    if step == 0 or n_places < len(planes):
        raise DicomError(
            f"{name}: holds {len(planes)} images at {n_places} places, several volumes rather than one{_differing(planes)}; "
            "put one in a folder of its own"
        )
    wide = gaps > (1 + 2 * _TOLERANCE) * step
    n_missing = np.rint(gaps / step).astype(int) - 1
    if (wide & (n_missing > 0)).any():
        k = int(np.flatnonzero(wide & (n_missing > 0))[0])
        n = int(n_missing[wide].sum())
        raise DicomError(
            f"{name}: {n} slice{'s are' if n > 1 else ' is'} missing, the first after {_called(planes[k])} "
            f"({gaps[k]:.3g} mm to the next, {step:.3g} mm elsewhere)"
        )
    if wide.any() or (gaps < (1 - 2 * _TOLERANCE) * step).any():
        raise DicomError(f"{name}: the distance between slices varies, from {gaps.min():.3g} to {gaps.max():.3g} mm")


def _differing(planes: Sequence[Plane]) -> str:
    def value(plane: Plane, keyword: str) -> str:
        return next((str(group[keyword].value) for group in plane.groups if keyword in group), "")

    keywords = [k for k in _REPEATS if len({value(plane, k) for plane in planes}) > 1]
    return f" (they differ in {', '.join(keywords)})" if keywords else ""


def _called(plane: Plane) -> str:
    return f"frame {plane.frame + 1}" if plane.in_one_file else plane.file.name
