"""Writes tiny DICOM series, as they should be and as they should not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

# what must not be found outside DICOM files
NAME, PATIENT_ID, BIRTHDAY = "Mustermann^Erika", "ID-471147114711", "19010203"
SECRETS = ["Mustermann", "Erika", PATIENT_ID, BIRTHDAY]

Change = Callable[[Dataset], None]


def lps(affine: np.ndarray) -> np.ndarray:
    return np.diag([-1.0, -1, 1, 1]) @ affine


def common(kind: UID, series: str, description: str, study: str, frame_of_reference: str) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = kind
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.FrameOfReferenceUID = series, study, frame_of_reference
    ds.Modality, ds.SeriesDescription, ds.SeriesNumber, ds.ImageType = (
        "MR",
        description,
        4,
        ["ORIGINAL", "PRIMARY", "M"],
    )
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = NAME, PATIENT_ID, BIRTHDAY, "F"
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20200102", "101112", "7", "A1"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    return ds


def write_series(
    folder: Path,
    values: np.ndarray,
    affine: np.ndarray | None = None,
    *,
    series: str = "1.2.3.4",
    description: str = "anat T1w",
    study: str = "1.2.3",
    frame_of_reference: str = "1.2.3.9",
    change: dict[int, Change] | Change | None = None,
    skip: Sequence[int] = (),
) -> Path:
    """Write ``(column, row, slice)`` values with a RAS affine as files of a slice each, in a shuffled order.

    ``change`` alters the datasets of all slices, or of some, before they are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    to_lps = lps(np.eye(4) if affine is None else affine)
    sides = np.linalg.norm(to_lps[:3, :3], axis=0)
    names = np.random.default_rng(3).permutation(values.shape[2])
    for k in range(values.shape[2]):
        if k in skip:
            continue
        ds = common(MRImageStorage, series, description, study, frame_of_reference)
        ds.Columns, ds.Rows = values.shape[:2]
        ds.PixelSpacing = [float(sides[1]), float(sides[0])]
        ds.ImageOrientationPatient = [round(float(x), 9) for x in (to_lps[:3, :2] / sides[:2]).T.ravel()]
        ds.ImagePositionPatient = [round(float(x), 6) for x in (to_lps @ [0, 0, k, 1])[:3]]
        ds.PixelData = np.ascontiguousarray(values[:, :, k].T).astype("<i2").tobytes()
        for alter in [change] if callable(change) else [change[k]] if change and k in change else []:
            alter(ds)
        ds.save_as(folder / f"{series}_{names[k]:03d}.dcm", enforce_file_format=True)
    return folder


def write_enhanced(path: Path, values: np.ndarray, affine: np.ndarray, order: Sequence[int], **options: Any) -> Path:
    """Write ``(column, row, slice)`` values as one file whose frames are the slices in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_lps = lps(affine)
    sides = np.linalg.norm(to_lps[:3, :3], axis=0)
    settings = {"series": "1.2.3.5", "description": "enhanced", "study": "1.2.3", "frame_of_reference": "1.2.3.9"}
    ds = common(EnhancedMRImageStorage, **{**settings, **options})
    ds.Columns, ds.Rows = values.shape[:2]
    ds.NumberOfFrames = len(order)
    measures, orientation = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [float(sides[1]), float(sides[0])], float(sides[2])
    orientation.ImageOrientationPatient = [round(float(x), 9) for x in (to_lps[:3, :2] / sides[:2]).T.ravel()]
    shared = Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = []
    for k in order:
        position, scale, group = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [round(float(x), 6) for x in (to_lps @ [0, 0, k, 1])[:3]]
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = 2, 1, "US"
        group.PlanePositionSequence, group.PixelValueTransformationSequence = [position], [scale]
        ds.PerFrameFunctionalGroupsSequence.append(group)
    ds.PixelData = np.stack([values[:, :, k].T for k in order]).astype("<i2").tobytes()
    ds.save_as(path, enforce_file_format=True)
    return path


def read_segments(path: Path) -> tuple[dict[str, np.ndarray], Dataset]:
    """Read a segmentation by pydicom alone: of each segment's label the frames, keyed by where they lie.

    Returns:
        ``{label: (n, 3 + rows * columns)}``, a row being the position in mm, LPS+, and the pixels; and the dataset.
    """
    ds = pydicom.dcmread(path)
    pixels = np.atleast_3d(ds.pixel_array).reshape(-1, ds.Rows * ds.Columns)
    labels = {segment.SegmentNumber: segment.SegmentLabel for segment in ds.SegmentSequence}
    rows: dict[str, list[np.ndarray]] = {label: [] for label in labels.values()}
    for frame, group in zip(pixels, ds.PerFrameFunctionalGroupsSequence, strict=True):
        label = labels[group.SegmentIdentificationSequence[0].ReferencedSegmentNumber]
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        rows[label].append(np.concatenate([position, frame]))
    return {label: np.array(found) for label, found in rows.items()}, ds


def places(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return where the voxels of a ``(column, row, slice)`` mask lie, ``(n, 3)`` mm, LPS+, sorted."""
    indices = np.argwhere(mask)
    return sort_rows((np.c_[indices, np.ones(len(indices))] @ lps(affine).T)[:, :3])


def segment_places(rows: np.ndarray, ds: Dataset) -> np.ndarray:
    """Return where the pixels of a segment's frames lie, as :func:`places` does, by DICOM's equation C.7.6.2.1-1."""
    if not len(rows):
        return np.zeros((0, 3))
    shared = ds.SharedFunctionalGroupsSequence[0]
    axes = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    between_rows, between_columns = (float(x) for x in shared.PixelMeasuresSequence[0].PixelSpacing)
    found = []
    for row in rows:
        r, c = np.nonzero(row[3:].reshape(ds.Rows, ds.Columns))
        found.append(row[:3] + c[:, None] * between_columns * axes[0] + r[:, None] * between_rows * axes[1])
    return sort_rows(np.concatenate(found))


def sort_rows(points: np.ndarray) -> np.ndarray:
    return points[np.lexsort(np.round(points, 3).T)]
