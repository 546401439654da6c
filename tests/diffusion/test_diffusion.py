"""Tensors from diffusion series: axes, order, resolution, what is refused, what is prepared once."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from diffusion_cases import GRIDS, field, fsl_bvecs, positions, write_hcp, write_series

from memnet.datasets import diffusion
from memnet.datasets.diffusion import find_inputs, find_series, find_tensor_cases, prepare
from memnet.datasets.diffusion_blocks import cut_blocks
from memnet.datasets.diffusion_files import read_series, read_tensors, write_tensors
from memnet.diffusion.tensors import (
    as_channels,
    as_matrices,
    block_mean,
    coarse_affine,
    colour_fractional_anisotropy,
    fine_affine,
    fit_tensors,
    fractional_anisotropy,
    mean_diffusivity,
    rotate_tensors,
)
from memnet.transforms.tensors import FitTensorsd

grids = pytest.mark.parametrize("affine", GRIDS.values(), ids=GRIDS)


@grids
def test_fitted_tensors_are_those_of_the_world(affine, tmp_path):
    series = read_series(write_series(tmp_path, affine=affine))
    tensors = as_matrices(fit_tensors(series))
    expected = field(positions(series.mask.shape, affine))
    np.testing.assert_allclose(tensors[series.mask], expected[series.mask], atol=2e-8)
    assert not tensors[~series.mask].any()


@grids
def test_file_has_niftis_order_and_comes_back(affine, tmp_path):
    matrix = np.array([[1.1, 0.1, 0.2], [0.1, 0.9, 0.3], [0.2, 0.3, 0.7]]) * 1e-3
    tensors = np.broadcast_to(as_channels(matrix), (3, 4, 5, 6))
    write_tensors(tmp_path / "t.nii.gz", tensors, affine)
    image = nib.load(tmp_path / "t.nii.gz")
    assert image.shape == (3, 4, 5, 1, 6) and image.header.get_intent()[:2] == ("symmetric matrix", (3.0,))
    assert int(image.header["intent_code"]) == 1005
    np.testing.assert_allclose(
        image.get_fdata()[0, 0, 0, 0], np.array([1.1, 0.1, 0.9, 0.2, 0.3, 0.7]) * 1e-3, rtol=1e-6
    )
    np.testing.assert_allclose(image.get_qform(), affine, atol=1e-5)
    back, back_affine = read_tensors(tmp_path / "t.nii.gz")
    np.testing.assert_allclose(back, tensors, rtol=1e-6)
    np.testing.assert_allclose(back_affine, affine, atol=1e-6)


@grids
def test_tensors_of_fsl_and_mrtrix_are_understood(affine, tmp_path):
    shape = (4, 5, 6)
    world = field(positions(shape, affine))
    fsl_axes = fsl_bvecs(np.eye(3), affine)  # rows: the world's axes by FSL's
    in_fsl = np.einsum("ia,...ij,jb->...ab", fsl_axes, world, fsl_axes)
    upper = in_fsl[..., [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]
    nib.save(nib.Nifti1Image(upper.astype(np.float32), affine), tmp_path / "fsl.nii.gz")
    read = as_matrices(read_tensors(tmp_path / "fsl.nii.gz", "fsl", "fsl")[0])
    np.testing.assert_allclose(read, world, atol=1e-9)
    mrtrix = world[..., [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
    nib.save(nib.Nifti1Image(mrtrix.astype(np.float32), affine), tmp_path / "dt.nii.gz")
    np.testing.assert_allclose(as_matrices(read_tensors(tmp_path / "dt.nii.gz", "mrtrix")[0]), world, atol=1e-9)


@pytest.mark.parametrize("rate", [2, 3])
def test_blocks_lie_between_their_voxels(rate):
    affine = GRIDS["oblique"]
    centres = block_mean(positions((6, 7, 8), affine), rate)
    coarse = coarse_affine(affine, rate)
    np.testing.assert_allclose(centres, positions(centres.shape[:3], coarse), atol=1e-4)
    np.testing.assert_allclose(fine_affine(coarse, rate), affine, atol=1e-12)


def test_low_resolution_averages_signals_not_tensors(tmp_path):
    series = read_series(write_series(tmp_path, b=3000.0)).cropped(2)
    coarse = series.coarse(2)
    np.testing.assert_allclose(coarse.signals, block_mean(series.signals, 2))
    from_signals = fit_tensors(coarse)
    from_tensors = block_mean(fit_tensors(replace(series, mask=np.ones_like(series.mask))), 2)
    assert np.abs(from_signals - from_tensors)[coarse.mask].max() > 1e-5  # mm^2/s: a mean of tensors would be wrong


def test_interpolated_signals_lie_on_the_fine_grid(tmp_path):
    """Tensors fitted to them are nearly those of the smooth field, at the fine voxels' places."""
    coarse = read_series(write_series(tmp_path, (14, 14, 14), GRIDS["oblique"], margin=0)).coarse(2)
    fine = coarse.fine(2)
    np.testing.assert_allclose(fine.affine, GRIDS["oblique"], atol=1e-9)
    inside = (slice(5, -5),) * 3
    found = as_matrices(fit_tensors(fine))[inside]
    np.testing.assert_allclose(found, field(positions((14, 14, 14), fine.affine))[inside], atol=3e-5)
    signals = coarse.signals.copy()
    signals[3, 3, 3], signals[4:, 4:, 4:] = 1000, 1
    jumps = replace(coarse, signals=signals).fine(2).signals
    assert 1 <= jumps.min() and jumps.max() <= 1000


def test_interpolated_signals_are_fitted_in_the_whole_fine_brain(tmp_path):
    """Also where less than half of a coarse voxel is brain: an error of the whole tensor would stand there."""
    write_series(tmp_path / "sub", (13, 13, 13), margin=1)
    case = prepare(find_series(tmp_path / "sub"), tmp_path / "cache", None, 2, False, interpolated=True)[0]
    low, high, interpolated = (nib.load(case[f"mask_{at}"]).get_fdata() > 0 for at in ("low", "high", "interpolated"))
    assert (high & ~low.repeat(2, 0).repeat(2, 1).repeat(2, 2)).any()
    np.testing.assert_array_equal(interpolated, high)
    assert read_tensors(case["tensor_interpolated"])[0][high].any(-1).all()


def test_maps():
    tensors = as_channels(np.diag([1.7e-3, 0.3e-3, 0.2e-3]))[None]
    values = np.array([1.7, 0.3, 0.2])
    expected = np.sqrt(1.5 * ((values - values.mean()) ** 2).sum() / (values**2).sum())
    np.testing.assert_allclose(mean_diffusivity(tensors), values.mean() * 1e-3)
    np.testing.assert_allclose(fractional_anisotropy(tensors), expected)
    np.testing.assert_allclose(colour_fractional_anisotropy(tensors), [[expected, 0, 0]], atol=1e-12)
    assert fractional_anisotropy(np.zeros((1, 6))) == 0
    turned = rotate_tensors(tensors, np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]]))
    np.testing.assert_allclose(colour_fractional_anisotropy(turned), [[0, expected, 0]], atol=1e-12)


def test_negative_eigenvalues_are_counted_kept_and_clamped_in_maps_alone(tmp_path, caplog):
    tensors = np.tile(as_channels(np.diag([1.0e-3, 1.0e-3, 1.0e-3])), (3, 3, 3, 1))
    tensors[0, 0, 0] = as_channels(np.diag([1.2e-3, 0.3e-3, -0.6e-3]))
    write_tensors(tmp_path / "t.nii.gz", tensors, np.eye(4))
    with caplog.at_level("WARNING", logger="memnet"):
        read = read_tensors(tmp_path / "t.nii.gz")[0]
    assert "1 of 27 tensors have a negative eigenvalue" in caplog.text
    np.testing.assert_allclose(read, tensors, rtol=1e-6)
    np.testing.assert_allclose(mean_diffusivity(read)[0, 0, 0], 0.5e-3, rtol=1e-6)
    assert fractional_anisotropy(read).max() <= 1


def spoil(folder: Path, kind: str) -> None:
    """Break a series in one way."""
    bvals, bvecs = np.loadtxt(folder / "bvals"), np.loadtxt(folder / "bvecs")
    if kind == "bvals too short":
        np.savetxt(folder / "bvals", bvals[None, :-1])
    elif kind == "bvecs not unit":
        np.savetxt(folder / "bvecs", bvecs * 1.3)
    elif kind == "bvecs of two rows":
        np.savetxt(folder / "bvecs", bvecs[:2])
    elif kind == "no b = 0":
        np.savetxt(folder / "bvals", bvals[None] + 1000)
    elif kind == "no bvals":
        (folder / "bvals").unlink()
    elif kind == "bvals not numbers":
        (folder / "bvals").write_text("a b c")
    elif kind == "mask of another grid":
        nib.save(nib.Nifti1Image(np.ones((5, 5, 5), np.uint8), np.eye(4)), folder / "nodif_brain_mask.nii.gz")
    elif kind == "mask elsewhere":
        nib.save(nib.Nifti1Image(np.ones((12, 14, 12), np.uint8), np.eye(4)), folder / "nodif_brain_mask.nii.gz")
    elif kind == "not diffusion":
        nib.save(nib.Nifti1Image(np.ones((12, 14, 12), np.float32), GRIDS["LAS"]), folder / "data.nii.gz")
    elif kind == "cut short":
        data = (folder / "data.nii.gz").read_bytes()
        (folder / "data.nii.gz").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("bvals too short", "13 images, but 12 b-values"),
        ("bvecs not unit", "12 of 12 directions are no unit vectors"),
        ("bvecs of two rows", "expected three rows"),
        ("no b = 0", "no image of b = 0"),
        ("no bvals", "b-values are missing; looked beside it for data.bval"),
        ("bvals not numbers", "cannot be read as numbers"),
        ("mask of another grid", r"mask's grid \(\(5, 5, 5\)\)"),
        ("mask elsewhere", "mask's grid"),
        ("not diffusion", "expected a 4D series"),
        ("cut short", "cut short or damaged"),
    ],
)
def test_bad_series_are_refused_by_name(kind, said, tmp_path):
    path = write_series(tmp_path)
    spoil(tmp_path, kind)
    with pytest.raises(ValueError, match=said) as raised:
        read_series(path)
    assert str(tmp_path) in str(raised.value)


def test_shells(tmp_path):
    series = read_series(write_series(tmp_path))
    assert series.select([1050]).bvals.tolist() == series.select().bvals.tolist() == series.bvals.tolist()
    with pytest.raises(ValueError, match="no image of b = 3000 s/mm\\^2; there are b = 0, 1000"):
        series.select([1000, 3000])
    few = replace(series, signals=series.signals[..., :6], bvals=series.bvals[:6], bvecs=series.bvecs[:6])
    with pytest.raises(ValueError, match="5 directions in the chosen shells do not determine a tensor"):
        few.select()
    two = replace(series, bvals=np.where(np.arange(13) > 8, 3000.0, series.bvals))
    assert two.select().bvals.max() == 1000 and two.select([1000, 3000]).bvals.max() == 3000


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full((4, 4, 4, 6), 1.0), "no diffusivities in mm\\^2/s"),
        (np.zeros((4, 4, 4, 6)), "no diffusivities in mm\\^2/s"),
        (np.full((4, 4, 4, 5), 1e-3), "six values a voxel"),
        (np.full((4, 4, 4, 6), np.nan), "NaN or infinite"),
    ],
)
def test_images_that_hold_no_tensors_are_refused(values, said, tmp_path):
    nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4)), tmp_path / "t.nii.gz")
    with pytest.raises(ValueError, match=said):
        read_tensors(tmp_path / "t.nii.gz")


def test_layouts_are_found(tmp_path):
    hcp = write_hcp(tmp_path / "hcp", 2, shape=(4, 4, 4))
    assert [one["subject"] for one in find_series(hcp)] == ["100300", "100301"]
    assert [one["subject"] for one in find_series(hcp / "100301")] == ["100301"]
    bids = ("sub-01_dwi.nii.gz", "sub-01_dwi.bval", "sub-01_dwi.bvec", "sub-01_desc-brain_mask.nii.gz")
    write_series(tmp_path / "bids" / "sub-01" / "dwi", (4, 4, 4), names=bids)
    (found,) = find_series(tmp_path / "bids")
    assert found["subject"] == "sub-01" and read_series(found["data"]).mask.sum() == 8
    # of a pipeline, where the data set itself has none
    (tmp_path / "whole" / "derivatives").mkdir(parents=True)
    for name in ("prep", "other"):
        shutil.copytree(tmp_path / "bids", tmp_path / "whole" / "derivatives" / name)
        if name == "prep":
            for folder in ("whole", "whole/derivatives", "whole/derivatives/prep"):
                (found,) = find_series(tmp_path / folder)
                assert found["patient"] == "sub-01" and "prep" in found["data"]
    with pytest.raises(ValueError, match=r"several pipelines; name one of .*derivatives/other, .*derivatives/prep"):
        find_series(tmp_path / "whole")
    with pytest.raises(ValueError, match="no diffusion series found"):
        find_series(tmp_path)
    (tmp_path / "plain").mkdir()
    names = ("Diffusion.nii.gz", "Diffusion.bvals", "Diffusion.bvecs", "m.nii.gz")
    write_series(tmp_path / "plain", (4, 4, 4), names=names)
    assert [one["subject"] for one in find_series(tmp_path / "plain")] == ["Diffusion"]


def test_brain_without_a_mask_leaves_the_skull_out(tmp_path):
    shape = (24, 24, 24)
    path = write_series(tmp_path, shape)
    image = nib.load(path)
    radius = np.linalg.norm(positions(shape, np.eye(4)) - 11.5, axis=-1)
    levels = np.select([radius < 7, radius < 9.5, radius < 10.2], [1.0, 0.0, 0.2], 0.0)  # air, but for a thin skull
    nib.save(nib.Nifti1Image((image.get_fdata() * levels[..., None]).astype(np.float32), image.affine), path)
    (tmp_path / "nodif_brain_mask.nii.gz").unlink()
    found = read_series(path).mask
    assert 2 * (found & (radius < 7)).sum() / (found.sum() + (radius < 7).sum()) > 0.95
    assert not found[radius >= 8].any()  # the skull


def test_subjects_are_prepared_once_and_again_where_something_changed(tmp_path, monkeypatch):
    series = find_series(write_hcp(tmp_path / "hcp", 2, shape=(7, 6, 6)))
    fits, fit = [], diffusion.fit_tensors
    monkeypatch.setattr(diffusion, "fit_tensors", lambda at, progress: fits.append(at.name) or fit(at, progress))
    cases = prepare(series, tmp_path / "cache", progress=False)
    assert len(fits) == 4  # two resolutions of two subjects
    high, low = (read_tensors(cases[0][key]) for key in ("tensor_high", "tensor_low"))
    assert high[0].shape == (6, 6, 6, 6) and low[0].shape == (3, 3, 3, 6)
    np.testing.assert_allclose(low[1], coarse_affine(high[1], 2), atol=1e-5)
    assert prepare(series, tmp_path / "cache", progress=False) == cases and len(fits) == 4
    Path(cases[1]["tensor_low"]).unlink()  # as if interrupted
    prepare(series, tmp_path / "cache", progress=False)
    assert len(fits) == 5
    prepare(series, tmp_path / "cache", [1000], progress=False)
    assert len(fits) == 9
    bvals = Path(series[0]["data"]).with_name("bvals")
    bvals.write_text(bvals.read_text().replace("1000", "990"))
    prepare(series, tmp_path / "cache", [1000], progress=False)
    assert len(fits) == 11
    prepare(series, tmp_path / "cache", [1000], progress=False, interpolated=True)
    assert len(fits) == 13  # what is asked for besides, alone


def test_a_series_more_in_the_folder_prepares_no_other_again(tmp_path, monkeypatch):
    fits, series = [], []
    monkeypatch.setattr("memnet.datasets.diffusion.fit_tensors", lambda at, _: (fits.append(at), fit_tensors(at))[1])
    for n, one in enumerate(find_series(write_hcp(tmp_path / "hcp", 2, shape=(7, 6, 6)))):
        source = Path(one["data"]).parent
        for file, suffix in (("data.nii.gz", ".nii.gz"), ("bvals", ".bval"), ("bvecs", ".bvec")):
            shutil.copy(source / file, tmp_path / f"{n}{suffix}")
        shutil.copy(source / "nodif_brain_mask.nii.gz", tmp_path / f"{n}_mask.nii.gz")
        series.append({"subject": str(n), "data": str(tmp_path / f"{n}.nii.gz")})
        prepare(series, tmp_path / "cache", progress=False)
        assert len(fits) == 2 * len(series)  # two resolutions


def test_another_mask_prepares_a_series_again(tmp_path):
    data = find_series(write_hcp(tmp_path / "hcp", 1, shape=(7, 6, 6)))[0]["data"]
    image = nib.load(data)
    sizes = []
    for n in (5, 6):
        mask = np.zeros(image.shape[:3], np.uint8)
        mask[:n] = 1
        nib.save(nib.Nifti1Image(mask, image.affine), tmp_path / "mask.nii.gz")
        (case,) = find_inputs(dwi=data, mask=tmp_path / "mask.nii.gz")
        case = FitTensorsd("series", "image", "mask", tmp_path / "cache")(case)
        sizes.append(int(np.asarray(nib.load(case["mask"]).dataobj).sum()))
    assert sizes == [5 * 36, 6 * 36]


def test_a_series_of_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="absent/a.nii.gz: no such file"):
        find_inputs(dwi=tmp_path / "absent" / "a.nii.gz")


def test_negative_eigenvalues_of_prepared_tensors_are_told_once(tmp_path, caplog, monkeypatch):
    series = find_series(write_hcp(tmp_path / "hcp", 1, shape=(7, 6, 6)))
    bad = as_channels(np.diag([1.2e-3, 0.3e-3, -0.6e-3]))
    monkeypatch.setattr("memnet.datasets.diffusion.fit_tensors", lambda at, _: at.mask[..., None] * bad)
    with caplog.at_level("WARNING", logger="memnet"):
        for _ in range(2):
            case = prepare(series, tmp_path / "cache", None, 2, False)[0]
            read_tensors(case["tensor_low"])
    assert caplog.text.count("negative eigenvalue") == 2  # of two resolutions


def test_blocks_are_apart_and_where_they_were(tmp_path):
    path = write_series(tmp_path / "whole", (6, 20, 6))
    written = cut_blocks(path, tmp_path / "blocks", (0.5, 0.2, 0.3), gap=2)
    whole = read_series(path)
    seen = np.zeros(20, dtype=int)
    for part in written:
        block = read_series(part)
        begin = round(float((np.linalg.inv(whole.affine) @ block.affine)[1, 3]))
        rows = slice(begin, begin + block.mask.shape[1])
        np.testing.assert_array_equal(block.signals, whole.signals[:, rows])
        np.testing.assert_array_equal(block.mask, whole.mask[:, rows])
        np.testing.assert_allclose(block.bvecs, whole.bvecs, atol=1e-6)
        seen[rows] += 1
    assert seen.tolist() == [1] * 10 + [0] * 2 + [1] * 2 + [0] * 2 + [1] * 4
    split = find_tensor_cases(str(tmp_path / "blocks"), tmp_path / "cache", n_training=1)
    assert [len(split[s]) for s in ("training", "validation", "test")] == [1, 1, 1]
    shutil.rmtree(tmp_path / "blocks" / "test")
    with pytest.raises(ValueError, match="shares"):
        cut_blocks(path, tmp_path / "blocks", (0.5, 0.2, 0.2))


@pytest.mark.parametrize("gap, margin, said", [(-1, 0, "gap is -1"), (1, 8, "for test, hold no brain")])
def test_blocks_that_cannot_be_are_not_begun(gap, margin, said, tmp_path):
    path = write_series(tmp_path / "whole", (6, 20, 6))
    mask = np.zeros((6, 20, 6), np.uint8)
    mask[:, : 20 - margin] = 1
    nib.save(nib.Nifti1Image(mask, nib.load(path).affine), path.parent / "nodif_brain_mask.nii.gz")
    with pytest.raises(ValueError, match=said):
        cut_blocks(path, tmp_path / "blocks", (0.5, 0.2, 0.3), gap)
    assert not (tmp_path / "blocks").exists()


def test_interpolated_signals_of_other_data_are_not_kept(tmp_path):
    """A training in between, which does not need them, made the folder look as if it were of the new data."""
    data = write_series(tmp_path / "one", (8, 8, 8))
    series, cache = find_series(tmp_path / "one"), tmp_path / "cache"
    prepare(series, cache, progress=False, interpolated=True)
    image = nib.load(data)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1] ** 0.9, image.affine), data)
    prepare(series, cache, progress=False)
    (case,) = prepare(series, cache, progress=False, interpolated=True)
    (fresh,) = prepare(series, tmp_path / "fresh", progress=False, interpolated=True)
    found, expected = (read_tensors(one["tensor_interpolated"])[0] for one in (case, fresh))
    np.testing.assert_array_equal(found, expected)


def test_voxels_without_a_signal_have_no_tensor(tmp_path):
    data = write_series(tmp_path, (6, 6, 6), margin=0)
    image = nib.load(data)
    signals = np.asarray(image.dataobj).copy()
    signals[0], signals[1, ..., 0], signals[2, ..., 1:] = 0, 0, 0
    nib.save(nib.Nifti1Image(signals, image.affine), data)
    tensors = fit_tensors(read_series(data))
    assert not tensors[:3].any() and tensors[3:].all(-1).any()
