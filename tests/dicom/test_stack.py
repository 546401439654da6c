"""A DICOM series is read as the volume that it is, or refused with the reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from dicom_files import SECRETS, Change, lps, write_enhanced, write_series
from fire.parser import DefaultParseValue
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MediaStorageDirectoryStorage, SegmentationStorage

from memnet.bundle import input_error
from memnet.dicom import read_pixels, read_stack
from memnet.transforms.volumes import read_volume
from memnet.workflow.scans import find_scans, list_scans

AFFINES = {
    "axial": np.array([[-0.9, 0, 0, 40], [0, -1.1, 0, 30], [0, 0, 2, -7], [0, 0, 0, 1.0]]),
    "sagittal": np.array([[0, 0, 1.3, 40], [-0.8, 0, 0, -20], [0, -1.2, 0, 7], [0, 0, 0, 1.0]]),
    "oblique": np.array([[-0.96, 0.28, 0, -10], [-0.28, -0.96, 0, 5], [0, 0, 1.5, 0], [0, 0, 0, 1.0]]),
}
affines = pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).integers(-50, 900, (9, 7, 6)).astype(np.int16)


@affines
def test_classic_series_is_the_volume_that_was_written(values: np.ndarray, affine: np.ndarray, tmp_path: Path) -> None:
    volume = read_volume(write_series(tmp_path / "in" / "deeper", values, affine).parent)
    np.testing.assert_array_equal(volume[0], values)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)


@affines
def test_enhanced_file_is_the_volume_that_was_written(values: np.ndarray, affine: np.ndarray, tmp_path: Path) -> None:
    file = write_enhanced(tmp_path / "a" / "b.dcm", values, affine, order=[3, 0, 5, 1, 4, 2])
    for path in (file, file.parent):
        volume = read_volume(path)
        # slope 2, intercept 1
        np.testing.assert_array_equal(volume[0], 2 * values.astype(np.float32) + 1)
        np.testing.assert_allclose(volume.affine, affine, atol=1e-6)


@affines
def test_simpleitk_reads_the_same_volume(values: np.ndarray, affine: np.ndarray, tmp_path: Path) -> None:
    stack = read_stack(write_series(tmp_path, values, affine))
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    image = reader.Execute()
    np.testing.assert_array_equal(read_pixels(stack), SimpleITK.GetArrayFromImage(image).T)
    direction = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    np.testing.assert_allclose(lps(stack.affine)[:3], np.c_[direction, image.GetOrigin()], atol=1e-5)


def test_every_slice_has_its_own_scale(values: np.ndarray, tmp_path: Path) -> None:
    def scaled(slope: float) -> Change:
        return lambda ds: ds.update({"RescaleSlope": slope, "RescaleIntercept": -3})

    write_series(tmp_path, values, change={k: scaled(1 + k) for k in range(6)})
    expected = values.astype(np.float32) * np.arange(1, 7) - 3
    np.testing.assert_array_equal(read_pixels(read_stack(tmp_path)), expected)


def test_lossless_jpeg_is_decoded(values: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path, values, change=lambda ds: ds.update({"RescaleSlope": 2, "RescaleIntercept": 5}))
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG")
    for file in list(tmp_path.iterdir()):
        geometry = pydicom.dcmread(file)
        image = SimpleITK.ReadImage(str(file), SimpleITK.sitkInt16)
        writer.SetFileName(str(file))
        writer.Execute(image)
        written = pydicom.dcmread(file)
        # the writer makes a secondary capture of what it was not told to be MR
        for keyword in ("SOPClassUID", "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"):
            written[keyword] = geometry[keyword]
        written.save_as(file)
    assert pydicom.dcmread(file).file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.4.70"
    np.testing.assert_array_equal(read_pixels(read_stack(tmp_path)), 2 * values.astype(np.float32) + 5)


def test_rounded_positions_are_no_irregular_stack(values: np.ndarray, tmp_path: Path) -> None:
    affine = AFFINES["oblique"] @ np.diag([1, 1, 0.6666667 / 1.5, 1])

    def rounded(ds: Dataset) -> None:
        ds.ImagePositionPatient = [round(float(x), 2) for x in ds.ImagePositionPatient]

    stack = read_stack(write_series(tmp_path, values, affine, change=rounded))
    np.testing.assert_allclose(stack.affine, affine, atol=0.011)


def moved(by: tuple[float, float, float]) -> Change:
    def change(ds: Dataset) -> None:
        ds.ImagePositionPatient = [float(x) + d for x, d in zip(ds.ImagePositionPatient, by, strict=True)]

    return change


def tilted(ds: Dataset) -> None:
    x, y, z = (float(x) for x in ds.ImagePositionPatient)
    ds.ImagePositionPatient = [x, y + 0.1 * z, z]


def setting(**attributes: object) -> Change:
    return lambda ds: ds.update(attributes)


def without(keyword: str) -> Change:
    return lambda ds: ds.__delitem__(keyword)


REFUSED: dict[str, tuple[Callable[[Path, np.ndarray], object], str]] = {
    "gantry tilt": (lambda f, v: write_series(f, v, change=tilted), r"askew, by 5\.7 degrees \(a tilted gantry\)"),
    "missing slice": (lambda f, v: write_series(f, v, skip=[2]), r"1 slice is missing, the first after .*\.dcm \(2 mm"),
    "missing slices": (lambda f, v: write_series(f, v, skip=[1, 2]), "2 slices are missing"),
    "uneven distances": (lambda f, v: write_series(f, v, change={5: moved((0, 0, 0.4))}), "varies, from 1 to 1.4 mm"),
    "one slice aside": (lambda f, v: write_series(f, v, change={2: moved((0.3, 0, 0))}), "is 0.3 mm off the place"),
    "localizer": (
        lambda f, v: write_series(f, v, change={0: setting(ImageOrientationPatient=[0, 1, 0, 0, 0, -1])}),
        "6 images have 2 different orientations",
    ),
    "sizes": (
        lambda f, v: [write_series(f, v), write_series(f / "b", v[:5])],
        "12 images have 2 different sizes",
    ),
    "pixel spacings": (lambda f, v: write_series(f, v, change={1: setting(PixelSpacing=[1, 2])}), "2 different pixel spac"),
    "two echoes": (
        lambda f, v: [write_series(f / str(t), v, change=setting(EchoTime=t)) for t in (10, 90)],
        r"12 images at 6 places, several volumes .*differ in EchoTime",
    ),
    "one image": (lambda f, v: write_series(f, v[:, :, :1]), "is a single image"),
    "frames of reference": (
        lambda f, v: write_series(f, v, change={1: setting(FrameOfReferenceUID="1.2.3.10")}),
        "several frames of reference",
    ),
    "mosaic": (lambda f, v: write_series(f, v, change=setting(ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"])), "mosaic"),
    "colour": (lambda f, v: write_series(f, v, change=setting(PhotometricInterpretation="RGB")), "no plain grey values"),
    "no position": (lambda f, v: write_series(f, v, change={1: without("ImagePositionPatient")}), "lacks ImagePositionP"),
    "skewed axes": (
        lambda f, v: write_series(f, v, change=setting(ImageOrientationPatient=[1, 0, 0, 0.5, 0.866, 0])),
        "not two directions at a right angle",
    ),
    "no spacing": (lambda f, v: write_series(f, v, change=setting(PixelSpacing=[0, 1])), "PixelSpacing is not positive"),
    "short pixels": (lambda f, v: write_series(f, v, change={3: setting(PixelData=b"12" * 9)}), "cut short or damaged"),
    "CT": (lambda f, v: write_series(f, v, change=setting(SOPClassUID=CTImageStorage)), "no MR images.* but CT Image"),
    "segmentation": (
        lambda f, v: write_series(f, v, change=setting(SOPClassUID=SegmentationStorage)),
        "no MR images.* but Segmentation Storage",
    ),
    "two enhanced files": (
        lambda f, v: [write_enhanced(f / f"{k}.dcm", v, np.eye(4), order=range(6)) for k in range(2)],
        "2 files, some of several frames",
    ),
    "no DICOM inside": (lambda f, v: (f.mkdir(), (f / "a.txt").write_text("a")), "is a folder without DICOM files"),
    "no DICOM by that name": (lambda f, v: (f.mkdir(), (f / "a.dcm").write_text("a")), r"a\.dcm: damaged, or no DICOM"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_volume_is_refused_with_the_reason(kind: str, values: np.ndarray, tmp_path: Path) -> None:
    write, reason = REFUSED[kind]
    write(tmp_path / "in", values)
    with pytest.raises(ValueError, match=reason) as raised:
        read_volume(tmp_path / "in")
    assert str(tmp_path / "in") in str(raised.value)


@pytest.mark.parametrize("length", [132, 140, 300, 700])
def test_file_cut_short_is_named(length: int, values: np.ndarray, tmp_path: Path) -> None:
    file = sorted(write_series(tmp_path, values).iterdir())[2]
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_volume(tmp_path)


def test_of_several_series_one_is_named_by_its_uid(values: np.ndarray, tmp_path: Path) -> None:
    study = tmp_path / "study"
    write_series(study / "a", values)
    write_series(study / "b", 2 * values, series="1.2.3.40", description="T2 tse")
    write_series(study / "c", values, series="1.2.3.41", change=setting(SOPClassUID=SegmentationStorage))
    with pytest.raises(
        ValueError, match=r"2 MR series.*study:UID: 1\.2\.3\.4 \(anat T1w, 6 images\), .*\(T2 tse, 6 images\)"
    ):
        read_volume(study)
    np.testing.assert_array_equal(read_volume(f"{study}:1.2.3.40")[0], 2 * values)
    with pytest.raises(ValueError, match=r"no series 1\.2\.3\.7, but 1\.2\.3\.4 \(anat"):
        read_volume(f"{study}:1.2.3.7")
    with pytest.raises(ValueError, match=r"1\.2\.3\.41 is Segmentation Storage"):
        read_volume(f"{study}:1.2.3.41")
    # the command line leaves it whole, too
    assert DefaultParseValue("study:1.2.3.40") == "study:1.2.3.40"


def test_what_is_no_image_beside_the_only_series_does_not_matter(values: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path, values)
    write_series(tmp_path / "seg", values, series="1.2.3.41", change=setting(SOPClassUID=SegmentationStorage))
    (tmp_path / "README").write_text("a")
    (tmp_path / "broken.txt").symlink_to("nowhere")
    (tmp_path / "round").symlink_to(tmp_path, target_is_directory=True)
    directory = pydicom.Dataset()
    directory.file_meta = pydicom.dataset.FileMetaDataset()
    directory.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    directory.file_meta.MediaStorageSOPInstanceUID, directory.file_meta.TransferSyntaxUID = (
        "1.2.8",
        ExplicitVRLittleEndian,
    )
    directory.save_as(tmp_path / "DICOMDIR", enforce_file_format=True)
    # the same instance once more, as exports have it
    file = next(tmp_path.glob("*.dcm"))
    (tmp_path / "again").write_bytes(file.read_bytes())
    np.testing.assert_array_equal(read_volume(tmp_path)[0], values)
    links = tmp_path.with_name("links")
    links.mkdir()
    (links / "scan").symlink_to(tmp_path, target_is_directory=True)
    np.testing.assert_array_equal(read_volume(links)[0], values)


def test_series_are_listed_as_files_are(
    values: np.ndarray, write_nifti: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "scans"
    for name in ("a.1_T1w", "a.1_T2w", "b_T1w"):
        write_series(folder / name, values)
    write_nifti("scans/b_T2w.nii.gz", values)
    (folder / "empty").mkdir()
    t1, t2 = ([str(folder / name) for name in names] for names in (("a.1_T1w", "b_T1w"), ("a.1_T2w", "b_T2w.nii.gz")))
    cases = find_scans(dataset_dir=folder)
    assert [case["image"] for case in cases] == [list(row) for row in zip(t1, t2, strict=True)]
    assert [case["output_name"] for case in cases] == ["a.1_T1w", "b_T1w"]

    series = [f"{folder / 'b_T1w'}:1.2.3.4", f"{folder / 'b_T1w'}:1.2.3.5"]
    assert [case["output_name"] for case in find_scans(image=series[:1])] == ["b_T1w_1.2.3.4"]
    assert [c["output_name"] for c in find_scans(image=series)] == ["b_T1w_1.2.3.4", "b_T1w_1.2.3.5"]
    monkeypatch.chdir(folder / "b_T1w")
    assert [c["output_name"] for c in find_scans(image=".")] == ["b_T1w"]
    with pytest.raises(ValueError, match="no such file"):
        find_scans(image=f"{folder / 'absent'}:1.2.3")
    # a folder a patient, a folder a modality
    for patient in "pq":
        write_series(tmp_path / "patients" / patient / "FLAIR", values)
    cases = list_scans({"T1": None, "FLAIR": None}, tmp_path / "patients", subfolders=True)
    assert [case["output_name"] for case in cases] == ["p_FLAIR", "q_FLAIR"]
    assert [case["image"][0] for case in cases] == [None, None]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("keyword", ["PatientBirthDate", "PatientSex", "ImagePositionPatient", "RescaleSlope"])
def test_odd_values_do_not_tell_the_patient(
    keyword: str, values: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    write_series(tmp_path, values, change=setting(RescaleSlope="1"))
    for file in tmp_path.iterdir():
        ds = pydicom.dcmread(file)
        with pydicom.config.disable_value_validation():
            ds[keyword]._value = " ".join(SECRETS)
            ds.save_as(file)
    caplog.clear()
    try:
        read_volume(tmp_path)
        message = ""
    except ValueError as error:
        message = str(error)
        assert keyword in message
    assert (message == "") == keyword.startswith("Patient")
    assert not any(secret in message + caplog.text for secret in SECRETS)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_are_a_volume_or_a_reason(seed: int, values: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "classic", values[..., :3])
    write_enhanced(tmp_path / "enhanced" / "e.dcm", values[..., :3], np.eye(4), order=[2, 0, 1])
    rng = np.random.default_rng(seed)
    for file in tmp_path.glob("*/*.dcm"):
        whole = file.read_bytes()
        for _ in range(15):
            content = bytearray(whole[: rng.integers(132, len(whole))] if rng.random() < 0.3 else whole)
            at = rng.integers(128, len(content), 3)
            content[at[0]] = content[at[1]] = rng.integers(256)
            content[at[2] : at[2] + 4] = rng.bytes(rng.integers(8))
            file.write_bytes(content)
            try:
                assert read_volume(file.parent).shape[0] == 1
            except ValueError as error:
                assert input_error(error) is error
                assert not any(secret in str(error) for secret in SECRETS)
        file.write_bytes(whole)


def test_files_without_a_preamble_are_read(values: np.ndarray, tmp_path: Path) -> None:
    """As old archives give them out."""
    folder = write_series(tmp_path / "scan", values)
    for file in folder.iterdir():
        ds = pydicom.dcmread(file)
        if file.name.endswith(("0.dcm", "2.dcm")):
            del ds.file_meta.TransferSyntaxUID  # without the group that says how it is written, too
            pydicom.dcmwrite(file, pydicom.Dataset(ds), implicit_vr=True, little_endian=True, enforce_file_format=False)
        else:
            file.write_bytes(file.read_bytes()[132:])
        assert file.read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(read_volume(folder)[0].numpy(), values)


def test_a_file_that_begins_by_chance_like_one_is_none(values: np.ndarray, tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", values)
    (folder / "stray.bin").write_bytes(bytes([2, 0, 0, 0]) + bytes(range(200)))
    np.testing.assert_array_equal(read_volume(folder)[0].numpy(), values)


def test_one_file_of_a_series_asks_for_its_folder(values: np.ndarray, tmp_path: Path) -> None:
    file = next(write_series(tmp_path / "scan", values).iterdir())
    with pytest.raises(ValueError, match="give the folder of its series"):
        read_volume(file)


def test_a_classic_file_may_say_that_it_has_one_frame(values: np.ndarray, tmp_path: Path) -> None:
    def one(ds: Dataset) -> None:
        ds.NumberOfFrames = 1

    series = write_series(tmp_path / "series", values, change=one)
    stack = read_stack(series)
    assert len(stack.planes) == values.shape[2]
    np.testing.assert_array_equal(read_pixels(stack), values)
