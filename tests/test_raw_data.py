"""Raw data of fastMRI, CMRxRecon and BART are read as what they are, and damaged ones are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from memnet.datasets.bart import write_cfl
from memnet.datasets.ismrmrd_writer import write_ismrmrd
from memnet.datasets.kspace import find_reconstruction_cases
from memnet.datasets.raw_data import read_raw_data
from memnet.mri.fourier import image_to_kspace, kspace_to_image
from memnet.mri.sampling import PoissonDiscMask
from memnet.transforms.kspace import RandUndersampled
from memnet.transforms.kspace_inputs import LoadKspaced

_HEADER = """<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding>
<encodedSpace><matrixSize><x>16</x><y>9</y><z>1</z></matrixSize>
<fieldOfView_mm><x>48</x><y>18</y><z>4.5</z></fieldOfView_mm></encodedSpace>
<reconSpace><matrixSize><x>8</x><y>8</y><z>1</z></matrixSize>
<fieldOfView_mm><x>24</x><y>16</y><z>4.5</z></fieldOfView_mm></reconSpace></encoding></ismrmrdHeader>"""


def noise(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)


def fastmri(path: Path, kspace: Any, header: str | None = _HEADER, mask: np.ndarray | None = None) -> None:
    with h5py.File(path, "w") as file:
        file["kspace"] = kspace
        if mask is not None:
            file["mask"] = mask
        if header is not None:
            file["ismrmrd_header"] = header


def cmrxrecon(path: Path, kspace: np.ndarray, name: str = "kspace_full") -> None:
    """Write ``(x, y, coils, slices, frames)`` as MATLAB does: dimensions turned about, parts in a compound."""
    turned = kspace.transpose()
    compound = np.zeros(turned.shape, dtype=[("real", "<f4"), ("imag", "<f4")])
    compound["real"], compound["imag"] = turned.real, turned.imag
    with h5py.File(path, "w") as file:
        file[name] = compound


def test_fastmri_is_a_stack_of_slices_without_oversampling(tmp_path: Path) -> None:
    kspace = noise(3, 2, 16, 9)
    kspace[..., 4] = 0
    fastmri(tmp_path / "in.h5", kspace)
    raw = read_raw_data(tmp_path / "in.h5")
    assert raw.is_stack and raw.kspace.shape == (1, 2, 3, 8, 9) and raw.kspace.dtype == np.complex64
    whole = kspace_to_image(torch.from_numpy(kspace), (-2,))[:, :, 4:12]
    expected = image_to_kspace(whole, (-2,)).movedim(1, 0)
    np.testing.assert_allclose(raw.kspace[0], expected.numpy(), atol=1e-5)
    assert raw.sampled.shape == (1, 8, 9) and (raw.sampled == (np.arange(9) != 4)).all()
    np.testing.assert_allclose(np.abs(np.diag(raw.affine)), [4.5, 3, 2, 1])
    np.testing.assert_allclose(raw.affine @ [1, 4, 4, 1], [0, 0, 0, 1])


def test_scattered_samples_of_slices_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fastmri(tmp_path / "in.h5", noise(3, 2, 32, 24))
    undersample = RandUndersampled(PoissonDiscMask([2.0], 4), seed=0)
    caplog.clear()
    for _ in range(2):
        undersample(LoadKspaced("image")({"image": str(tmp_path / "in.h5")}))
    (told,) = (record.getMessage() for record in caplog.records if "slices of a 2D scan" in record.getMessage())
    assert told.startswith(str(tmp_path / "in.h5"))


@pytest.mark.parametrize("shape", [(9,), (1, 9, 1)])
def test_lines_that_a_fastmri_mask_leaves_out_are_not_sampled(shape: tuple[int, ...], tmp_path: Path) -> None:
    mask = np.arange(9) % 2 == 0
    fastmri(tmp_path / "in.h5", noise(3, 2, 16, 9), mask=mask.reshape(shape))
    raw = read_raw_data(tmp_path / "in.h5")
    assert (raw.sampled == mask).all() and not raw.kspace[..., ~mask].any() and raw.kspace[..., mask].any()


def test_stacks_are_not_transformed_along_their_slices(tmp_path: Path) -> None:
    kspace = noise(3, 2, 8, 9)
    fastmri(tmp_path / "in.h5", kspace, None)
    data = LoadKspaced("image")({"image": str(tmp_path / "in.h5")})
    np.testing.assert_array_equal(data["kspace"].numpy(), kspace.swapaxes(0, 1))
    assert data["mask"].shape == (1, 1, 8, 9)


def test_a_single_coil_is_one_coil(tmp_path: Path) -> None:
    fastmri(tmp_path / "in.h5", noise(3, 8, 9), None)
    assert read_raw_data(tmp_path / "in.h5").kspace.shape == (1, 1, 3, 8, 9)


def test_cmrxrecon_gives_the_frames_of_a_slice(tmp_path: Path) -> None:
    kspace = noise(8, 6, 2, 3, 4)
    kspace[:, 1::2, :, :, 0] = 0
    cmrxrecon(tmp_path / "in.mat", kspace)
    for index in (None, 2):
        raw = read_raw_data(tmp_path / "in.mat", index)
        chosen = kspace[:, :, :, 1 if index is None else index]
        np.testing.assert_array_equal(raw.kspace[..., 0], chosen.transpose(3, 2, 0, 1))
        assert raw.sampled.shape == (4, 6, 1)
        assert raw.sampled[0, :, 0].tolist() == [True, False] * 3 and raw.sampled[1:].all()
    data = LoadKspaced("image", movie=True)({"image": str(tmp_path / "in.mat"), "slice_index": 2})
    np.testing.assert_array_equal(data["kspace"].numpy(), kspace[:, :, :, 2].transpose(2, 3, 0, 1))
    assert data["mask"].shape == (1, 4, 1, 6)


@pytest.mark.parametrize("name", ["kspace_single_sub04", "kus"])
def test_cmrxrecon_of_one_coil_and_of_later_years(name: str, tmp_path: Path) -> None:
    kspace = noise(8, 6, 1, 3, 4)
    cmrxrecon(tmp_path / "in.mat", kspace[:, :, 0] if "single" in name else kspace, name)
    raw = read_raw_data(tmp_path / "in.mat", 2)
    np.testing.assert_array_equal(raw.kspace[:, 0, :, :, 0], kspace[:, :, 0, 2].transpose(2, 0, 1))


@pytest.mark.parametrize("n_frames", [1, 4])
def test_bart_gives_a_volume_or_frames(n_frames: int, tmp_path: Path) -> None:
    values = noise(8, 6, 5, 2, 1, 1, 1, 1, 1, 1, n_frames)
    write_cfl(tmp_path / "in", values)
    raw = read_raw_data(tmp_path / "in.cfl")
    np.testing.assert_array_equal(raw.kspace, values.reshape(8, 6, 5, 2, n_frames).transpose(4, 3, 0, 1, 2))
    assert raw.sampled.shape == (n_frames, 6, 5) and raw.sampled.all() and not raw.is_stack


@pytest.mark.parametrize("kind", ["mat", "cfl"])
def test_a_mask_in_the_plane_of_a_movie_is_its_mask(kind: str, tmp_path: Path) -> None:
    """Samples that were not taken of a readout counted as zeros, and such a file as fully sampled."""
    taken = np.random.default_rng(1).uniform(size=(12, 10, 4)) < 0.3  # x, y, frames
    kspace = noise(12, 10, 2, 1, 4) * taken[:, :, None, None]
    path = tmp_path / f"in.{kind}"
    if kind == "mat":
        cmrxrecon(path, kspace, "kus")
    else:
        write_cfl(path, kspace.transpose(0, 1, 3, 2, 4).reshape(12, 10, 1, 2, *[1] * 6, 4))
    loaded = LoadKspaced("kspace", movie=True)({"kspace": str(path)})
    np.testing.assert_array_equal(loaded["mask"][0].numpy(), taken.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["zeros by chance", "padded readouts", "whole"])
def test_zeros_of_a_fully_sampled_movie_are_samples(kind: str, tmp_path: Path) -> None:
    """Rounded to whole numbers, some are zero in all coils; readouts may be padded to both sides."""
    kspace = noise(16, 10, 2, 1, 4)
    if kind == "zeros by chance":
        kspace *= (np.random.default_rng(0).uniform(size=(16, 10, 1, 1, 4)) > 0.1).astype(np.float32)
    elif kind == "padded readouts":
        kspace = np.pad(kspace, [(8, 8), *[(0, 0)] * 4])
    cmrxrecon(tmp_path / "in.mat", kspace)
    loaded = LoadKspaced("kspace", movie=True)({"kspace": str(tmp_path / "in.mat")})
    assert loaded["mask"].shape == (1, 4, 1, 10) and bool(loaded["mask"].all())


def test_a_volume_with_other_samples_missing_of_each_readout_is_refused(tmp_path: Path) -> None:
    taken = np.random.default_rng(1).uniform(size=(12, 10, 8)) < 0.5
    write_cfl(tmp_path / "in.cfl", noise(12, 10, 8, 2) * taken[..., None])
    with pytest.raises(ValueError, match="of its readouts along x samples are missing in between"):
        LoadKspaced("kspace")({"kspace": str(tmp_path / "in.cfl")})
    kspace = noise(12, 10, 8, 2) * taken[:1, ..., None]
    kspace[1::2] = 0
    write_cfl(tmp_path / "in.cfl", kspace)
    with pytest.raises(ValueError, match="samples are missing in between"):
        LoadKspaced("kspace")({"kspace": str(tmp_path / "in.cfl")})
    kspace = noise(12, 10, 8, 2) * taken[:1, ..., None]
    kspace[:4] = 0  # an asymmetric echo
    kspace[5, 3, 2] = 0  # and a zero by chance
    write_cfl(tmp_path / "in.cfl", kspace)
    mask = LoadKspaced("kspace")({"kspace": str(tmp_path / "in.cfl")})["mask"]
    np.testing.assert_array_equal(mask[0, 0].numpy(), taken[0])


def test_every_slice_of_a_movie_is_a_case(tmp_path: Path) -> None:
    """Of CMRxRecon's files the middle slice alone was trained on, without a word."""
    cmrxrecon(tmp_path / "a.mat", noise(12, 10, 2, 3, 4))
    cmrxrecon(tmp_path / "b.mat", noise(12, 10, 2, 1, 4))
    write_ismrmrd(tmp_path / "c.h5", noise(3, 2, 8, 6, 1), np.ones((3, 6, 1), bool), np.eye(4))
    with h5py.File(tmp_path / "c.h5", "r+") as file:
        rows = file["dataset/data"][()]
        rows = np.concatenate([rows, rows])
        rows["head"]["idx"]["slice"] = np.repeat([2, 5], len(rows) // 2)
        reference = rows[:4].copy()  # of other slices, in another encoding space
        reference["head"]["idx"]["slice"] = [6, 7, 8, 9]
        reference["head"]["flags"], reference["head"]["encoding_space_ref"] = 1 << 19, 1
        rows = np.concatenate([rows, reference])
        del file["dataset/data"]
        file["dataset"].create_dataset("data", data=rows)
    cases = find_reconstruction_cases(tmp_path, movie=True, subset="all")["validation"]
    assert [(Path(c["image"]).name, c.get("slice_index")) for c in cases] == [
        ("a.mat", 0), ("a.mat", 1), ("a.mat", 2), ("b.mat", None), ("c.h5", 2), ("c.h5", 5)
    ]  # fmt: skip
    for case in cases:
        read_raw_data(case["image"], case.get("slice_index"))


@pytest.mark.parametrize(("fold", "kept"), [(-1, [8, 9]), (0, [0, 1]), (2, [4, 5])])
def test_slices_of_one_movie_are_split_by_folds(fold: int, kept: list[int], tmp_path: Path) -> None:
    """The last were kept whatever the fold."""
    cmrxrecon(tmp_path / "a.mat", noise(6, 5, 1, 10, 2))
    split = find_reconstruction_cases(tmp_path, n_folds=5, fold=fold, movie=True)
    assert [case["slice_index"] for case in split["validation"]] == kept
    assert sorted(c["slice_index"] for part in split.values() for c in part) == list(range(10))
    for wrong in ((5, 5), (0, 0)):
        with pytest.raises(ValueError, match="expected a fold from 0 to"):
            find_reconstruction_cases(tmp_path, n_folds=wrong[0], fold=wrong[1], movie=True)


def test_ismrmrd_is_known_by_its_content(tmp_path: Path) -> None:
    kspace = noise(1, 2, 4, 6, 5)
    write_ismrmrd(tmp_path / "in.h5", kspace, np.ones((1, 6, 5), bool), np.eye(4))
    np.testing.assert_array_equal(read_raw_data(tmp_path / "in.h5").kspace, kspace)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def not_finite(*shape: int) -> np.ndarray:
    values = noise(*shape)
    values.flat[-1] = np.nan
    return values


def without_a_coil(axis: int, *shape: int) -> np.ndarray:
    values = noise(*shape)
    np.moveaxis(values, axis, 0)[1] = 0
    return values


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("in.h5", lambda p: None, "no such file"),
        ("in.h5", lambda p: (fastmri(p, noise(3, 2, 64, 64)), cut(p)), "damaged"),
        ("in.h5", lambda p: fastmri(p, np.ones((3, 2, 8, 9))), "expected complex"),
        ("in.h5", lambda p: fastmri(p, noise(3, 2, 8, 9, 2)), "expected complex"),
        ("in.h5", lambda p: fastmri(p, not_finite(3, 2, 8, 9)), "not finite"),
        ("in.h5", lambda p: fastmri(p, without_a_coil(1, 3, 2, 8, 9)), "coil 1 of 2 is zero"),
        ("in.h5", lambda p: fastmri(p, noise(3, 320, 2, 2)), "320 values along its coils; is the order"),
        (
            "in.h5",
            lambda p: fastmri(p, noise(3, 2, 8, 9), mask=np.ones(8)),
            r"mask has the shape \(8,\), .* 8 x 9 samples",
        ),
        ("in.mat", lambda p: p.write_bytes(b"MATLAB 5.0 MAT-file"), "version 7.3"),
        ("in.mat", lambda p: cmrxrecon(p, noise(8, 6, 2, 3, 4), "img"), "one variable kspace"),
        ("in.mat", lambda p: cmrxrecon(p, noise(8, 6, 2, 3)), r"shape \(8, 6, 2, 3\)"),
        ("in.mat", lambda p: cmrxrecon(p, noise(8, 6, 2, 2, 4)), "no slice 2"),
        ("in.mat", lambda p: cmrxrecon(p, not_finite(8, 6, 2, 3, 4)), "not finite"),
        ("in.mat", lambda p: cmrxrecon(p, without_a_coil(2, 8, 6, 2, 3, 4)), "coil 1 of 2 is zero"),
        ("in.cfl", lambda p: write_cfl(p, noise(8, 6, 5, 2, 2)), "dimension 4"),
        ("in.cfl", lambda p: write_cfl(p, not_finite(8, 6, 5, 2)), "not finite"),
        ("in.cfl", lambda p: write_cfl(p, without_a_coil(3, 8, 6, 5, 2)), "coil 1 of 2 is zero"),
        ("in.cfl", lambda p: (write_cfl(p, noise(8, 6, 5, 2)), cut(p)), "truncated"),
    ],
)
def test_what_cannot_be_read_is_told(name: str, make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        read_raw_data(tmp_path / name, 2)
    assert name in str(caught.value)
