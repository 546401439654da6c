"""Raw data: what is written comes back in its place, and what cannot be reconstructed is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from memnet.datasets.ismrmrd import RawData, read_ismrmrd
from memnet.datasets.ismrmrd_writer import write_ismrmrd
from memnet.transforms.kspace_inputs import LoadKspaced

AFFINE = np.array([[0, -0.9, 0, 20], [1.1, 0, 0, -30], [0, 0, 1.3, 5], [0, 0, 0, 1]], dtype=float)


@pytest.fixture
def raw() -> RawData:
    rng = np.random.default_rng(0)
    kspace = (rng.normal(size=(2, 3, 8, 6, 5)) + 1j * rng.normal(size=(2, 3, 8, 6, 5))).astype(np.complex64)
    sampled = rng.uniform(size=(2, 6, 5)) < 0.7
    return RawData(kspace * sampled[:, None, None], sampled, AFFINE)


@pytest.fixture
def file(raw: RawData, tmp_path: Path) -> Path:
    path = tmp_path / "raw.h5"
    write_ismrmrd(path, raw.kspace, raw.sampled, raw.affine, "noise & <nothing>")
    return path


def edit(path: Path, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    with h5py.File(path, "r+") as file:
        rows = file["dataset/data"][()]
        changed = change(rows)
        del file["dataset/data"]
        file["dataset"].create_dataset("data", data=rows if changed is None else changed)


def with_twice_as_much(counter: str) -> Callable[[np.ndarray], np.ndarray]:
    """Add each readout again, doubled, under the next value of a counter."""

    def change(rows: np.ndarray) -> np.ndarray:
        others = rows.copy()
        others["head"]["idx"][counter] = 1
        others["data"] = [2 * values for values in others["data"]]
        return np.concatenate([rows, others])

    return change


def edit_xml(path: Path, old: str, new: str) -> None:
    with h5py.File(path, "r+") as file:
        xml = file["dataset/xml"][0].decode()
        assert old in xml
        file["dataset/xml"][0] = xml.replace(old, new)


def test_what_is_written_comes_back(raw: RawData, file: Path) -> None:
    back = read_ismrmrd(file)
    np.testing.assert_array_equal(back.kspace, raw.kspace)
    np.testing.assert_array_equal(back.sampled, raw.sampled)
    np.testing.assert_allclose(back.affine, AFFINE, atol=1e-4)
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_repeated_readouts_are_averaged(raw: RawData, file: Path) -> None:
    def twice(rows: np.ndarray) -> np.ndarray:
        again = rows.copy()
        again["data"] = [3 * values for values in again["data"]]
        return np.concatenate([rows, again])

    edit(file, twice)
    np.testing.assert_allclose(read_ismrmrd(file).kspace, 2 * raw.kspace, rtol=1e-6)


def test_noise_scans_and_navigators_are_left_out(raw: RawData, file: Path) -> None:
    def add(rows: np.ndarray) -> np.ndarray:
        extra = rows[:2].copy()
        extra["head"]["flags"] = [1 << 18, 1 << 22]
        return np.concatenate([extra, rows])

    edit(file, add)
    np.testing.assert_array_equal(read_ismrmrd(file).kspace, raw.kspace)


def test_reversed_and_asymmetric_readouts_find_their_place(raw: RawData, file: Path) -> None:
    def change(rows: np.ndarray) -> None:
        for i in range(len(rows)):
            samples = rows["data"][i].view(np.complex64).reshape(3, 8)[:, 2:]
            rows["data"][i] = np.ascontiguousarray(samples[:, ::-1]).view(np.float32).ravel()
        rows["head"]["number_of_samples"], rows["head"]["center_sample"] = 6, 6 - 1 - 2
        rows["head"]["flags"] = 1 << 21

    edit(file, change)
    expected = raw.kspace.copy()
    expected[:, :, :2] = 0
    np.testing.assert_array_equal(read_ismrmrd(file).kspace, expected)


def test_samples_to_discard_are_counted_as_they_were_acquired(raw: RawData, file: Path) -> None:
    def change(rows: np.ndarray) -> None:
        for i in range(len(rows)):
            samples = rows["data"][i].view(np.complex64).reshape(3, 8)
            rows["data"][i] = np.ascontiguousarray(samples[:, ::-1]).view(np.float32).ravel()
        rows["head"]["center_sample"], rows["head"]["flags"] = 8 - 1 - 4, 1 << 21
        rows["head"]["discard_pre"], rows["head"]["discard_post"] = 2, 1

    edit(file, change)
    expected = raw.kspace.copy()
    expected[:, :, -2:] = expected[:, :, :1] = 0
    np.testing.assert_array_equal(read_ismrmrd(file).kspace, expected)


@pytest.mark.parametrize("recon_x", [8, 16, 32])  # the scanner may interpolate
def test_readout_oversampling_is_removed(tmp_path: Path, recon_x: int) -> None:
    image = np.zeros((16, 4, 4), dtype=np.complex64)
    image[6:11, 1:3, 2] = 1
    kspace = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(image), norm="ortho"))[None, None]
    write_ismrmrd(tmp_path / "raw.h5", kspace, np.ones((1, 4, 4), bool), np.eye(4))
    recon = "<reconSpace><matrixSize><x>16</x><y>4</y><z>4</z></matrixSize><fieldOfView_mm><x>16.0</x>"
    edit_xml(tmp_path / "raw.h5", recon, recon.replace("<x>16<", f"<x>{recon_x}<").replace("16.0", "8.0"))
    raw = read_ismrmrd(tmp_path / "raw.h5")
    cropped = np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(raw.kspace[0, 0]), norm="ortho"))
    np.testing.assert_allclose(cropped, image[4:12], atol=1e-6)
    # a voxel stays where it was
    np.testing.assert_allclose(raw.affine @ [2, 0, 0, 1], [6, 0, 0, 1], atol=1e-5)


def reference_lines(rows: np.ndarray) -> np.ndarray:
    """The lines at the centre taken once more by a scan whose signal is ten times as strong, in an encoding 0 and another 1."""
    centre = (np.abs(rows["head"]["idx"]["kspace_encode_step_1"] - 3.0) < 2) & (rows["head"]["idx"]["phase"] == 0)
    own, other = rows[centre].copy(), rows.copy()
    own["head"]["flags"] = 1 << 19
    own["data"] = [10 * values for values in own["data"]]
    other["head"]["encoding_space_ref"], other["head"]["flags"] = 1, 1 << 19
    other["data"] = [100 * values for values in other["data"]]
    return np.concatenate([other, own, rows])


def test_a_separate_reference_scan_is_kept_apart(raw: RawData, file: Path) -> None:
    edit(file, reference_lines)
    edit_xml(
        file,
        "</trajectory></encoding>",
        "</trajectory><parallelImaging><calibrationMode>separate</calibrationMode></parallelImaging></encoding>"
        "<encoding><trajectory>radial</trajectory></encoding>",
    )
    back = read_ismrmrd(file)
    np.testing.assert_array_equal(back.kspace, raw.kspace)
    expected = np.zeros_like(raw.kspace[0])
    expected[:, :, 2:5] = 10 * raw.kspace[0, :, :, 2:5]
    np.testing.assert_allclose(back.calibration, expected, rtol=1e-6)


@pytest.mark.parametrize("mode", ["separate", ""])
def test_a_reference_scan_of_more_readouts_is_not_the_image(raw: RawData, file: Path, mode: str) -> None:
    """It was, where it lies in an encoding space of its own, without a word."""

    def add(rows: np.ndarray) -> np.ndarray:
        others = np.concatenate([rows.copy()] * 2)
        others["head"]["flags"], others["head"]["encoding_space_ref"] = 1 << 19, 1
        others["data"] = [1000 * values for values in others["data"]]
        return np.concatenate([others, rows])

    edit(file, add)
    with h5py.File(file, "r") as opened:
        encoding = opened["dataset/xml"][0].decode().split("<encoding>")[1].split("</encoding>")[0]
    told = f"<parallelImaging><calibrationMode>{mode}</calibrationMode></parallelImaging>" if mode else ""
    edit_xml(file, "</encoding>", f"</encoding><encoding>{encoding}{told}</encoding>")
    np.testing.assert_array_equal(read_ismrmrd(file).kspace, raw.kspace)


@pytest.mark.parametrize("oversampling", [1, 2])
def test_an_asymmetric_echo_says_which_samples_were_taken(oversampling: int, tmp_path: Path) -> None:
    """What was not counted as measured zeros."""
    rng = np.random.default_rng(0)
    n = 16 * oversampling
    image = rng.normal(size=(3, 2, 16, 6, 1)) + 1j * rng.normal(size=(3, 2, 16, 6, 1))
    image = np.pad(image, [(0, 0), (0, 0), ((n - 16) // 2,) * 2, (0, 0), (0, 0)])
    kspace = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(image, 2), axis=2, norm="ortho"), 2).astype(np.complex64)
    sampled = rng.uniform(size=(3, 6, 1)) < 0.7
    kspace *= sampled[:, None, None]
    write_ismrmrd(tmp_path / "raw.h5", kspace, sampled, AFFINE)

    def cut(rows: np.ndarray) -> None:
        rows["head"]["discard_pre"] = n // 4

    edit(tmp_path / "raw.h5", cut)
    if oversampling == 2:
        wide = f"<fieldOfView_mm><x>{n * 1.1}</x>"
        with h5py.File(tmp_path / "raw.h5", "r+") as opened:
            xml = opened["dataset/xml"][0].decode()
            before, behind = xml.split("<reconSpace>")
            opened["dataset/xml"][0] = f"{before}<reconSpace>{behind.replace(wide, '<fieldOfView_mm><x>17.6</x>', 1)}"
    raw = read_ismrmrd(tmp_path / "raw.h5")
    assert raw.support is not None and raw.kspace.shape[2] == 16
    expected = (np.arange(16) >= 4)[None, :, None, None] & sampled[:, None]
    np.testing.assert_array_equal(raw.support, expected)
    loaded = LoadKspaced("kspace", movie=True)({"kspace": str(tmp_path / "raw.h5")})
    np.testing.assert_array_equal(loaded["mask"][0].numpy(), expected[..., 0])


def test_whole_readouts_have_no_support_of_their_own(raw: RawData, file: Path) -> None:
    assert read_ismrmrd(file).support is None


def test_space_around_words_of_the_header_does_not_matter(raw: RawData, file: Path) -> None:
    edit_xml(file, "<trajectory>cartesian", "<trajectory> cartesian\n")
    np.testing.assert_array_equal(read_ismrmrd(file).kspace, raw.kspace)


def test_embedded_calibration_lines_are_part_of_the_image(raw: RawData, file: Path) -> None:
    def flag(rows: np.ndarray) -> None:
        rows["head"]["flags"][rows["head"]["idx"]["kspace_encode_step_1"] == 3] = 1 << 19

    edit(file, flag)
    back = read_ismrmrd(file)
    np.testing.assert_array_equal(back.kspace, raw.kspace)
    assert back.calibration is None


def test_of_repeated_cardiac_phases_the_first_is_taken(
    raw: RawData, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(file, with_twice_as_much("repetition"))
    np.testing.assert_array_equal(read_ismrmrd(file).kspace, raw.kspace)
    assert "2 values of repetition" in caplog.text


def test_counters_of_frames_may_begin_late_and_leave_some_out(raw: RawData, file: Path) -> None:
    def later(rows: np.ndarray) -> None:
        rows["head"]["idx"]["phase"] = 3 + 4 * rows["head"]["idx"]["phase"]

    edit(file, later)
    np.testing.assert_array_equal(read_ismrmrd(file).kspace, raw.kspace)


@pytest.mark.parametrize(("chopped", "sign_y", "sign_z"), [("ChopY", -1, 1), ("ChopZ", 1, -1)])
def test_alternating_signs_are_undone(raw: RawData, file: Path, chopped: str, sign_y: int, sign_z: int) -> None:
    told = f"<userParameterLong><name>{chopped}</name><value>0</value></userParameterLong>"
    edit_xml(file, "</ismrmrdHeader>", f"<userParameters>{told}</userParameters></ismrmrdHeader>")
    signs = float(sign_y) ** np.arange(6)[:, None] * float(sign_z) ** np.arange(5)
    np.testing.assert_array_equal(read_ismrmrd(file).kspace, raw.kspace * signs)


def test_what_a_pilot_tone_disturbs_is_left_out(raw: RawData, file: Path) -> None:
    told = "<userParameterLong><name>PilotTone</name><value>1</value></userParameterLong>"
    edit_xml(file, "</ismrmrdHeader>", f"<userParameters>{told}</userParameters></ismrmrdHeader>")
    expected = raw.kspace.copy()
    expected[:, :, [0, 1, 2, 7]] = 0
    np.testing.assert_array_equal(read_ismrmrd(file).kspace, expected)


def test_a_matrix_larger_than_its_limits_is_not_filled_with_zeros(raw: RawData, file: Path) -> None:
    """As OCMR's, whose header has square pixels; the field of view and the image's place stay."""
    edit_xml(file, "<x>8</x><y>6</y><z>5</z>", "<x>8</x><y>14</y><z>5</z>")
    back = read_ismrmrd(file)
    np.testing.assert_array_equal(back.kspace, raw.kspace)
    np.testing.assert_allclose(back.affine, AFFINE, atol=1e-4)


@pytest.mark.parametrize("centre", [0, 3, 5])
def test_whole_readouts_fit_wherever_their_centre_is_said_to_be(raw: RawData, file: Path, centre: int) -> None:
    def change(rows: np.ndarray) -> None:
        rows["head"]["center_sample"] = centre

    edit(file, change)
    shift = 4 - (centre or 4)
    moved = np.roll(raw.kspace, shift, 2)
    if shift:
        moved[:, :, 0 if shift > 0 else -1] = 0
    np.testing.assert_array_equal(read_ismrmrd(file).kspace, moved)


def test_limits_that_say_nothing_leave_the_centre_in_the_middle(raw: RawData, file: Path) -> None:
    edit_xml(file, "<maximum>5</maximum><center>3</center>", "<maximum>0</maximum><center>0</center>")
    np.testing.assert_array_equal(read_ismrmrd(file).kspace, raw.kspace)


def test_one_slice_of_several_is_taken(raw: RawData, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(file, with_twice_as_much("slice"))
    np.testing.assert_array_equal(read_ismrmrd(file, 0).kspace, raw.kspace)
    np.testing.assert_array_equal(read_ismrmrd(file).kspace, 2 * raw.kspace)
    assert "2 slices" in caplog.text
    with pytest.raises(ValueError, match="no slice 7; its slices are 0, 1"):
        read_ismrmrd(file, 7)


def _nan(rows: np.ndarray) -> None:
    rows["data"][3][5] = np.nan


def _dead_coil(rows: np.ndarray) -> None:
    for values in rows["data"]:
        values[16:32] = 0


def _cut_readout(rows: np.ndarray) -> None:
    rows["data"][0] = rows["data"][0][:-2]


def _swapped(rows: np.ndarray) -> None:
    steps = rows["head"]["idx"]
    steps["kspace_encode_step_2"] = steps["kspace_encode_step_1"].copy()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_nan, "not finite"),
        (_dead_coil, "coil 1 of 3 is zero"),
        (_cut_readout, "holds 46 numbers, expected 48"),
        (_swapped, "along z reaches from 0 to 5 where its header has 5"),
    ],
)
def test_damaged_samples_are_refused(file: Path, change: Callable[[np.ndarray], None], message: str) -> None:
    edit(file, change)
    with pytest.raises(ValueError, match=message):
        read_ismrmrd(file)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<trajectory>cartesian</trajectory>", "", "lacks encoding/trajectory"),
        ("cartesian", "spiral", "trajectory is spiral"),
        ("matrixSize", "size", "lacks encoding/encodedSpace/matrixSize/x"),
        ("</ismrmrdHeader>", "", "no XML"),
        ("<matrixSize><x>8", "<matrixSize><x>4", "does not fit the 4"),
    ],
)
def test_incomplete_headers_are_refused(file: Path, old: str, new: str, message: str) -> None:
    edit_xml(file, old, new)
    with pytest.raises(ValueError, match=message):
        read_ismrmrd(file)


def test_other_files_are_refused(file: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["kspace"] = np.zeros(3)
    with h5py.File(tmp_path / "group.h5", "w") as other:
        other["dataset/xml"] = [b"<a/>"]
        other.create_group("dataset/data")
    (tmp_path / "text.h5").write_text("no HDF5")
    (tmp_path / "cut.h5").write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    messages = {"other": "no ISMRMRD .it has kspace", "text": "not an HDF5", "cut": "damaged", "none": "no such file"}
    messages |= {"group": "damaged"}
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            read_ismrmrd(tmp_path / f"{name}.h5")
