"""A label map of a DICOM series is written as a segmentation that other programs find in the right place."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK
from dicom_files import (
    BIRTHDAY,
    NAME,
    PATIENT_ID,
    SECRETS,
    lps,
    places,
    read_segments,
    segment_places,
    write_enhanced,
    write_series,
)
from monai.data import MetaTensor
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from memnet.dicom import read_stack, save_segmentation
from memnet.transforms.writing import SaveSegmentationd
from memnet.workflow.legends import LEGENDS

OBLIQUE = np.array([[-0.96, 0.28, 0, -10], [-0.28, -0.96, 0, 5], [0, 0, 1.5, 0], [0, 0, 0, 1.0]])


@pytest.fixture
def labels() -> np.ndarray:
    """Labels 0 to 3 of which no flip, turn or shift is the same.

    SimpleITK 2.5.7 loses the last bits of a segmentation whose frames do not fill whole bytes; these do.
    """
    return np.random.default_rng(1).choice(4, (8, 7, 6), p=[0.7, 0.1, 0.1, 0.1]).astype(np.uint8)


@pytest.fixture(params=["classic", "enhanced", "enhanced, a file each"])
def scan(request: pytest.FixtureRequest, labels: np.ndarray, tmp_path: Path) -> Path:
    values = labels.astype(np.int16) * 100
    if request.param == "classic":
        return write_series(tmp_path / "scan", values, OBLIQUE)
    if request.param == "enhanced, a file each":
        for k in (3, 0, 5, 1, 4, 2):
            write_enhanced(tmp_path / "scan" / f"{k}.dcm", values, OBLIQUE, order=[k])
        return tmp_path / "scan"
    return write_enhanced(tmp_path / "scan" / "e.dcm", values, OBLIQUE, order=[3, 0, 5, 1, 4, 2])


def test_every_label_lies_where_the_label_map_has_it(scan: Path, labels: np.ndarray, tmp_path: Path) -> None:
    target = tmp_path / "seg.dcm"
    save_segmentation(labels, read_stack(scan), LEGENDS["tissue"], target)
    segments, ds = read_segments(target)
    assert list(segments) == ["CSF", "GM", "WM"]
    for value, label in enumerate(segments, 1):
        found = segment_places(segments[label], ds)
        assert len(found) == (labels == value).sum()
        np.testing.assert_allclose(found, places(labels == value, OBLIQUE), atol=1e-4)


def test_simpleitk_reads_the_same_frames(scan: Path, labels: np.ndarray, tmp_path: Path) -> None:
    target = tmp_path / "seg.dcm"
    save_segmentation(labels, read_stack(scan), LEGENDS["tissue"], target)
    frames = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(target))) > 0
    groups = pydicom.dcmread(target).PerFrameFunctionalGroupsSequence
    assert len(frames) == len(groups) == sum((labels == value).any((0, 1)).sum() for value in (1, 2, 3))
    for frame, group in zip(frames, groups, strict=True):
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        k = round((np.linalg.inv(lps(OBLIQUE)) @ [*position, 1])[2])
        np.testing.assert_array_equal(frame, labels[:, :, k].T == number)


def test_images_patient_and_study_are_those_of_the_source(scan: Path, labels: np.ndarray, tmp_path: Path) -> None:
    stack = read_stack(scan)
    save_segmentation(labels, stack, LEGENDS["tissue"], tmp_path / "seg.dcm")
    ds, source = pydicom.dcmread(tmp_path / "seg.dcm"), stack.planes[0].header
    assert [str(ds.PatientName), ds.PatientID, ds.PatientBirthDate, ds.PatientSex] == [NAME, PATIENT_ID, BIRTHDAY, "F"]
    for keyword in ("StudyInstanceUID", "StudyDate", "StudyID", "AccessionNumber", "FrameOfReferenceUID"):
        assert ds[keyword].value == source[keyword].value, keyword
    assert ds.SeriesInstanceUID != source.SeriesInstanceUID and ds.Modality == "SEG"
    referenced = {item.ReferencedSOPInstanceUID for item in ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referenced == {plane.header.SOPInstanceUID for plane in stack.planes}
    assert ds.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
    # each frame names the image it lies on
    by_uid = {(p.header.SOPInstanceUID, p.frame): p.position for p in stack.planes}
    for group in ds.PerFrameFunctionalGroupsSequence:
        image = group.DerivationImageSequence[0].SourceImageSequence[0]
        frame = int(image.get("ReferencedFrameNumber", 1)) - 1
        position = by_uid[image.ReferencedSOPInstanceUID, frame]
        np.testing.assert_allclose(group.PlanePositionSequence[0].ImagePositionPatient, position)


@pytest.mark.parametrize("legend", LEGENDS.values(), ids=LEGENDS)
def test_every_class_has_a_concept_of_the_standard(legend: Any, scan: Path, labels: np.ndarray, tmp_path: Path) -> None:
    labels[labels == 3] = max(legend.classes["enhancing" if legend.is_lesion else "WM"][0])
    save_segmentation(labels, read_stack(scan), legend, tmp_path / "seg.dcm")
    segments, ds = read_segments(tmp_path / "seg.dcm")
    assert set(segments) == set(legend.classes) == set(legend.codes)
    known = [code for scheme in (codes.SCT, codes.NCIt) for code in (getattr(scheme, name) for name in scheme.dir())]
    for segment in ds.SegmentSequence:
        values, _ = legend.classes[segment.SegmentLabel]
        expected = places(np.isin(labels, values), OBLIQUE)
        np.testing.assert_allclose(segment_places(segments[segment.SegmentLabel], ds), expected, atol=1e-4)
        for kind in ("Category", "Type"):
            item = segment[f"SegmentedProperty{kind}CodeSequence"].value[0]
            code = Code(item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning)
            assert any(code == other and code.meaning == other.meaning for other in known), code
        assert len(segment.RecommendedDisplayCIELabValue) == 3
        assert segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == f"memnet {legend.name}"


def test_nothing_found_is_a_segmentation_of_nothing(scan: Path, labels: np.ndarray, tmp_path: Path) -> None:
    save_segmentation(np.zeros_like(labels), read_stack(scan), LEGENDS["tumor"], tmp_path / "seg.dcm")
    segments, _ = read_segments(tmp_path / "seg.dcm")
    assert list(segments) == ["necrotic core", "oedema", "enhancing"]
    assert not any(rows[:, 3:].any() for rows in segments.values() if len(rows))


def odd(ds: pydicom.Dataset) -> None:
    ds.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
    ds.PatientName = "Yamada^Tarou=山田^太郎=やまだ^たろう"
    with pydicom.config.disable_value_validation():
        ds.PatientBirthDate = f"unknown {SECRETS[0]}"
        ds.PatientSex = "not said"
        ds.PatientAge = "42"


@pytest.mark.filterwarnings("error")
def test_patient_of_any_kind_is_taken_over_and_told_nowhere(
    labels: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with pydicom.config.disable_value_validation():
        write_series(tmp_path / "scan", labels.astype(np.int16), change=odd)
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    save_segmentation(labels, read_stack(tmp_path / "scan"), LEGENDS["tissue"], tmp_path / "seg.dcm")
    assert not any(word in caplog.text + "".join(capfd.readouterr()) for word in ("Yamada", "山田", *SECRETS))
    with pydicom.config.disable_value_validation():
        ds = pydicom.dcmread(tmp_path / "seg.dcm")
        assert str(ds.PatientName) == "Yamada^Tarou=山田^太郎=やまだ^たろう"
        assert (ds.PatientBirthDate, ds.PatientSex) == (f"unknown {SECRETS[0]}", "not said")


def test_segmentation_is_complete_or_absent(
    scan: Path, labels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "seg.dcm"
    target.write_bytes(b"an earlier one")
    stack, write = read_stack(scan), Path.write_bytes

    def disk_full(self: Path, content: Any) -> None:
        write(self, b"half a fi")
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_segmentation(labels, stack, LEGENDS["tissue"], target)
    assert target.read_bytes() == b"an earlier one"
    assert not list(tmp_path.glob(".partial*"))


def test_what_nothing_can_refer_to_keeps_its_label_map(
    labels: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scan = write_series(
        tmp_path / "scan", labels.astype(np.int16), change=lambda ds: ds.__delitem__("FrameOfReferenceUID")
    )
    meta = {"filename_or_obj": str(scan), "saved_to": str(tmp_path / "scan_tissue.nii.gz")}
    pred = MetaTensor(labels[None], meta=meta)
    SaveSegmentationd("pred", "tissue")({"pred": pred})
    assert "no DICOM segmentation" in caplog.text and "FrameOfReferenceUID" in caplog.text
    assert "segmentation" not in pred.meta and not list(tmp_path.glob("*.dcm"))


def test_labels_of_another_grid_are_refused(scan: Path, labels: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(7, 8, 6\), the images \(8, 7, 6\)"):
        save_segmentation(labels.transpose(1, 0, 2), read_stack(scan), LEGENDS["tissue"], tmp_path / "seg.dcm")


def test_without_highdicom_the_label_map_is_kept(
    labels: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    scan = write_series(tmp_path / "scan", labels.astype(np.int16))
    meta = {"filename_or_obj": str(scan), "saved_to": str(tmp_path / "scan_tissue.nii.gz")}
    SaveSegmentationd("pred", "tissue")({"pred": MetaTensor(labels[None], meta=meta)})
    assert 'pip install "memnet[dicom]"' in caplog.text
