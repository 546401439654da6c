"""Writes label maps of DICOM series as DICOM segmentation objects."""

from __future__ import annotations

from copy import deepcopy
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import numpy as np
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import UID, MRImageStorage
from pydicom.valuerep import format_number_as_ds

from memnet.dicom.reading import guarded
from memnet.dicom.stack import Plane, Stack
from memnet.whole_files import whole_file
from memnet.workflow.legends import Legend

__all__ = ["save_segmentation"]

# what of a source image its segmentation refers to or lies by; the patient is left out of what other code gets to see
_GEOMETRY = [
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "Rows",
    "Columns", "NumberOfFrames", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness",
    "SpacingBetweenSlices", "ImageType", "LossyImageCompression", "LossyImageCompressionRatio",
    "LossyImageCompressionMethod", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "DimensionOrganizationSequence", "DimensionIndexSequence",
]  # fmt: skip
_OF_FRAMES = [keyword for keyword in _GEOMETRY if keyword.endswith("Sequence")] + ["NumberOfFrames"]
# what ties an object to its patient and study, beside DICOM's groups of the patient (0010) and of trials (0012)
_STUDY = [
    "SpecificCharacterSet", "StudyInstanceUID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName",
    "StudyDescription", "StudyID", "TimezoneOffsetFromUTC",
]  # fmt: skip
_EMPTY = [
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime",
]  # fmt: skip
_BRAIN = ("12738006", "SCT", "Brain")


def save_segmentation(labels: np.ndarray, stack: Stack, legend: Legend, target: str | Path) -> None:
    """Write a label map as a binary DICOM segmentation that references the images it was made from.

    The segments are the legend's classes in the order of their values, numbered from 1. Patient and study are those of the
    images.

    Args:
        labels: ``(column, row, slice)`` integers on the stack's grid.
        stack: the images.
        legend: names, colours and coded concepts of the labels.
        target: the file; complete or absent.

    Raises:
        ValueError: if the labels are not on the stack's grid, or the images lack what a reference to them needs.
        ImportError: if highdicom is not installed.
    """
    import highdicom
    from pydicom.sr.coding import Code

    if labels.shape != stack.shape:
        raise ValueError(f"{target}: the labels have shape {labels.shape}, the images {stack.shape}")
    headers = [stack.planes[0].header] if stack.planes[0].in_one_file else [plane.header for plane in stack.planes]
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        with guarded(stack.planes[0].file):  # values are parsed only now
            missing = any(not header.get(keyword) for header in headers)
        if missing:
            raise ValueError(f"{target}: the images lack {keyword}, without which nothing can refer to them")

    classes = sorted(legend.classes.items(), key=lambda item: min(item[1][0]))
    # frames of one file stand in the file's order, which need not be that of their places
    order = [plane.frame for plane in stack.planes] if stack.planes[0].in_one_file else range(len(stack.planes))
    numbers = np.zeros((len(stack.planes), *stack.shape[1::-1]), dtype=np.uint8)
    for number, (_, (values, _)) in enumerate(classes, 1):
        numbers[list(order)] += number * np.isin(labels, values).transpose(2, 1, 0).astype(np.uint8)
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=f"memnet {legend.name}", family=Code("123110", "DCM", "Artificial Intelligence"), version=version("memnet")
    )
    descriptions = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=Code(*legend.codes[name][0]),
            segmented_property_type=Code(*legend.codes[name][1]),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            anatomic_regions=[Code(*_BRAIN)],
            display_color=highdicom.color.CIELabColor.from_string(colour),
        )
        for number, (name, (_, colour)) in enumerate(classes, 1)
    ]
    with guarded(stack.planes[0].file):
        segmentation = highdicom.seg.Segmentation(
            source_images=[_without_patient(plane) for plane in stack.planes[: len(headers)]],
            pixel_array=numbers,
            segmentation_type="BINARY",
            segment_descriptions=descriptions,
            series_instance_uid=highdicom.UID(),
            series_number=1000 + int(headers[0].get("SeriesNumber") or 0),
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="memnet",
            manufacturer_model_name=f"memnet {legend.name}",
            software_versions=version("memnet"),
            # required, and a program has none
            device_serial_number="none",
            content_label=f"{legend.name.upper()}_SEG",
            series_description=f"memnet {legend.name} segmentation",
        )
        # required, and may be empty
        segmentation.ContentCreatorName = ""
        _belong(segmentation, headers[0])
        if _is_single_frame(stack.planes[0]):
            kind = headers[0].SOPClassUID
            segmentation.walk(lambda dataset, element: _name_kind(element, kind))
        encoded = BytesIO()
        segmentation.save_as(encoded)
    with whole_file(target) as partial:
        partial.write_bytes(encoded.getbuffer())


def _without_patient(plane: Plane) -> Dataset:
    source, header = Dataset(), plane.header
    for keyword in _GEOMETRY:
        if keyword in header:
            source[keyword] = deepcopy(header[keyword])
    if _is_single_frame(plane):  # as one of the classic kind, of which there may be several
        source.SOPClassUID = MRImageStorage
        for keyword in _OF_FRAMES:
            source.pop(keyword, None)
        source.ImagePositionPatient = [format_number_as_ds(float(x)) for x in plane.position]
        source.ImageOrientationPatient = [format_number_as_ds(float(x)) for x in plane.axes.ravel()]
        source.PixelSpacing = [format_number_as_ds(float(x)) for x in plane.spacing[::-1]]
    for keyword in _EMPTY:
        setattr(source, keyword, "")
    thickness = next((group["SliceThickness"].value for group in plane.groups if "SliceThickness" in group), None)
    source.setdefault("SliceThickness", thickness)
    return source


def _is_single_frame(plane: Plane) -> bool:
    """Tell whether a file of the kind that may have many frames has one."""
    return plane.header.SOPClassUID != MRImageStorage and not plane.in_one_file


def _name_kind(element: DataElement, kind: UID) -> None:
    """Let a reference name the kind that the images are of."""
    if element.keyword == "ReferencedSOPClassUID" and element.value == MRImageStorage:
        element.value = kind


def _belong(segmentation: Dataset, header: Dataset) -> None:
    """Give a segmentation its images' patient and study, as they stand there."""
    groups = [element for group in (0x0010, 0x0012) for element in header.group_dataset(group)]
    for element in [*groups, *(header[keyword] for keyword in _STUDY if keyword in header)]:
        segmentation[element.tag] = deepcopy(element)
