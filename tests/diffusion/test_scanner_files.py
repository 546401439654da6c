"""Diffusion files as scanners and programs write them: read as what they are, whatever their disguise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from diffusion_cases import GRIDS, field, fsl_bvecs, positions, write_series

from memnet.datasets.diffusion import find_series
from memnet.datasets.diffusion_files import read_series, read_tensors, write_tensors
from memnet.diffusion.tensors import TENSOR_ORDERS, as_channels, as_matrices, fit_tensors, has_tensor
from memnet.transforms.tensors import LoadTensorsd

AFFINE = GRIDS["oblique"]  # right-handed, so that FSL's first axis is reversed
SHAPE = (5, 6, 4)


def _reshape(*shape: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name, wanted in (("data.nii.gz", shape), ("nodif_brain_mask.nii.gz", (*SHAPE, 1))):
            image = nib.load(folder / name)
            nib.save(nib.Nifti1Image(np.asarray(image.dataobj).reshape(wanted), AFFINE), folder / name)

    return change


def _scaled_integers(folder: Path) -> None:
    for name, slope in (("data.nii.gz", 0.05), ("nodif_brain_mask.nii.gz", 1 / 255)):
        values = nib.load(folder / name).get_fdata()
        image = nib.Nifti1Image(np.round(values / slope).astype(np.int16), AFFINE)
        image.header.set_slope_inter(slope, 0)
        nib.save(image, folder / name)


def _soft_mask(folder: Path) -> None:
    path = folder / "nodif_brain_mask.nii.gz"
    mask = nib.load(path).get_fdata()
    nib.save(nib.Nifti1Image(np.clip(mask, 0.02, 0.97).astype(np.float64), AFFINE), path)


def _columns(folder: Path) -> None:
    """Columns parted by commas, with the NaN that some programs write for b = 0."""
    bvals, bvecs = np.loadtxt(folder / "bvals"), np.loadtxt(folder / "bvecs").T
    bvecs[bvals == 0] = np.nan
    np.savetxt(folder / "bvals", bvals[:, None], fmt="%g")
    np.savetxt(folder / "bvecs", bvecs, delimiter=", ")


def _trace(folder: Path) -> None:
    """The mean of the weighted images, which a scanner put behind them."""
    image = nib.load(folder / "data.nii.gz")
    values = image.get_fdata()
    values = np.concatenate([values, values[..., 1:].mean(-1, keepdims=True)], -1)
    nib.save(nib.Nifti1Image(values.astype(np.float32), AFFINE), folder / "data.nii.gz")
    bvals, bvecs = np.loadtxt(folder / "bvals"), np.loadtxt(folder / "bvecs")
    np.savetxt(folder / "bvals", [[*bvals, 1000]])
    np.savetxt(folder / "bvecs", np.concatenate([bvecs, np.zeros((3, 1))], 1))


_TWO_SHELLS = (5, 995, 1005, 990, 1000, 1010, 995, 1005, 990, 2990, 3005, 2995, 3010)
_HCP_7T = (65, 995, 1005, 990, 1000, 1010, 995, 1005, 990, 1000, 1045, 960, 1000)


@pytest.mark.parametrize(
    ("change", "bvals"),
    [
        (_reshape(*SHAPE, 1, 13), None),
        (_reshape(*SHAPE, 13, 1), None),
        (_scaled_integers, None),
        (_soft_mask, None),
        (_columns, None),
        (_trace, None),
        (lambda folder: None, _TWO_SHELLS),
        (lambda folder: None, _HCP_7T),
    ],
    ids=["t,n", "n,t", "scaled integers", "soft mask", "columns", "trace", "two shells", "HCP 7T"],
)
def test_tensors_are_those_of_the_world_whatever_the_files(change, bvals, tmp_path):
    path = write_series(tmp_path, SHAPE, AFFINE, bvals=bvals)
    change(tmp_path)
    series = read_series(path)
    assert series.mask.sum() == 24
    write_tensors(tmp_path / "tensor.nii.gz", as_channels(field(positions(SHAPE, AFFINE))), AFFINE)
    files = {"image": tmp_path / "tensor.nii.gz", "mask": tmp_path / "nodif_brain_mask.nii.gz"}
    assert LoadTensorsd("image", "mask")(files)["image"][6].sum() == 24
    found = as_matrices(fit_tensors(series.select([1000])))[series.mask]
    np.testing.assert_allclose(found, field(positions(SHAPE, AFFINE))[series.mask], atol=2e-6)


@pytest.mark.parametrize("where", ["sub-01", "."])
def test_bids_inherits_gradients_and_keeps_what_holds_no_tensors_out(where, tmp_path, caplog):
    names = ("sub-01_dir-AP_desc-preproc_dwi.nii.gz", "a", "b", "sub-01_dir-AP_desc-brain_mask.nii.gz")
    folder = tmp_path / "sub-01" / "ses-2" / "dwi"
    data = write_series(folder, SHAPE, names=names)
    for name, suffix in (("a", "bval"), ("b", "bvec")):
        # nearest first, then the name that says most
        (folder / name).rename(tmp_path / where / f"dir-AP_dwi.{suffix}")
        (tmp_path / where / f"dwi.{suffix}").write_text("0 0")
        (tmp_path / where / f"dir-PA_dwi.{suffix}").write_text("0")
    for name in ("sub-01_dir-PA_dwi.nii.gz", "sub-01_dir-AP_part-phase_dwi.nii.gz"):
        (folder / name).write_bytes(data.read_bytes())
    (found,) = find_series(tmp_path)
    assert found == {"subject": "sub-01_dir-AP_desc-preproc", "data": str(data), "patient": "sub-01"}
    assert "dir-PA_dwi.nii.gz: left out" in caplog.text and "part-phase_dwi.nii.gz: left out" in caplog.text
    series = read_series(data)
    assert len(series.bvals) == 13 and series.mask.sum() == 24


def test_a_series_of_each_folder_and_of_7_tesla(tmp_path):
    for subject in ("a", "b"):
        write_series(tmp_path / "fsl" / subject, SHAPE)
        write_series(tmp_path / "hcp" / subject / "T1w" / "Diffusion_7T", SHAPE)
    for layout in ("fsl", "hcp"):
        assert [one["subject"] for one in find_series(tmp_path / layout)] == ["a", "b"]


@pytest.mark.parametrize("written", ["fsl", "mrtrix"])
def test_tensors_of_another_order_than_named_are_refused(written, tmp_path):
    tensors = as_channels(field(positions(SHAPE, AFFINE)))
    order = [TENSOR_ORDERS["nifti"].index(entry) for entry in TENSOR_ORDERS[written]]
    nib.save(nib.Nifti1Image(tensors[..., order].astype(np.float32), AFFINE), tmp_path / "dti_tensor.nii.gz")
    with pytest.raises(ValueError, match=f"give --tensor_order {written}"):
        read_tensors(tmp_path / "dti_tensor.nii.gz")
    found = read_tensors(tmp_path / "dti_tensor.nii.gz", written, "world")[0]
    np.testing.assert_allclose(found, tensors, rtol=1e-5)


def test_the_order_of_fsl_means_its_axes(tmp_path):
    """Signs of xy and xz were silently wrong with the order alone."""
    voxel = fsl_bvecs(np.eye(3), AFFINE)  # FSL's axes of the world's
    tensors = voxel.T @ field(positions(SHAPE, AFFINE)) @ voxel
    order = [TENSOR_ORDERS["nifti"].index(entry) for entry in TENSOR_ORDERS["fsl"]]
    nib.save(
        nib.Nifti1Image(as_channels(tensors)[..., order].astype(np.float32), AFFINE), tmp_path / "dti_tensor.nii.gz"
    )
    found, named = (read_tensors(tmp_path / "dti_tensor.nii.gz", "fsl", axes)[0] for axes in (None, "fsl"))
    np.testing.assert_array_equal(found, named)
    np.testing.assert_allclose(found, as_channels(field(positions(SHAPE, AFFINE))), atol=1e-8)


def test_own_tensors_say_themselves_what_their_axes_are(tmp_path):
    tensors = as_channels(field(positions(SHAPE, AFFINE))).astype(np.float32)
    write_tensors(tmp_path / "t.nii.gz", tensors, AFFINE)
    np.testing.assert_array_equal(read_tensors(tmp_path / "t.nii.gz", "fsl", "fsl")[0], tensors)


@pytest.mark.parametrize(
    "factor, said", [(-1, "whatever their order"), (1e-6, "no diffusivities"), (1e6, "no diffusivities")]
)
def test_values_that_are_no_tensors(factor, said, tmp_path):
    tensors = factor * as_channels(field(positions(SHAPE, AFFINE)))
    nib.save(nib.Nifti1Image(tensors.astype(np.float32), AFFINE), tmp_path / "t.nii.gz")
    with pytest.raises(ValueError, match=f"t.nii.gz: .*{said}"):
        read_tensors(tmp_path / "t.nii.gz")


def test_scaled_integers_have_a_background(tmp_path):
    """Zero is not quite zero in them, and was brain."""
    tensors = as_channels(field(positions(SHAPE, AFFINE)))
    tensors[:3] = 0
    image = nib.Nifti1Image(tensors.astype(np.float32), AFFINE)
    image.set_data_dtype(np.int16)
    nib.save(image, tmp_path / "t.nii.gz")
    stored = read_tensors(tmp_path / "t.nii.gz")[0]
    assert stored[:3].any() and not has_tensor(stored[:3]).any() and has_tensor(stored[3:]).all()


def test_no_nifti_image(tmp_path):
    nib.save(nib.MGHImage(np.zeros((3, 3, 3, 6), np.float32), np.eye(4)), tmp_path / "t.mgz")
    with pytest.raises(ValueError, match="t.mgz: not a NIfTI image, but MGHImage"):
        read_tensors(tmp_path / "t.mgz")


def test_complex_series_are_refused(tmp_path):
    data = write_series(tmp_path, SHAPE)
    image = nib.load(data)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj).astype(np.complex64), image.affine), data)
    with pytest.raises(ValueError, match="data.nii.gz: it holds complex values"):
        read_series(data)


@pytest.mark.parametrize("factor, unit", [(1e6, "s/m\\^2"), (1e-3, "ms/um\\^2")])
def test_b_values_in_another_unit(factor, unit, tmp_path):
    write_series(tmp_path, SHAPE)
    np.savetxt(tmp_path / "bvals", np.loadtxt(tmp_path / "bvals")[None] * factor, fmt="%g")
    with pytest.raises(ValueError, match=f"are they in {unit}"):
        read_series(find_series(tmp_path)[0]["data"])


def test_a_direction_that_is_no_number_is_counted(tmp_path):
    write_series(tmp_path, SHAPE)
    bvecs = np.loadtxt(tmp_path / "bvecs")
    bvecs[:, 4] = np.nan
    np.savetxt(tmp_path / "bvecs", bvecs)
    with pytest.raises(ValueError, match="1 of 12 directions are no unit vectors"):
        read_series(tmp_path / "data.nii.gz")


def test_why_a_series_is_left_out(tmp_path, caplog):
    for subject in ("sub-1", "sub-2", "sub-3"):
        write_series(
            tmp_path / subject / "dwi",
            SHAPE,
            names=[f"{subject}_dwi{s}" for s in (".nii.gz", ".bval", ".bvec", "_mask.nii.gz")],
        )
    (tmp_path / "sub-1" / "dwi" / "sub-1_dwi.bval").unlink()
    (tmp_path / "sub-2" / "dwi" / "sub-2_dwi.bval").write_text("")
    assert [one["patient"] for one in find_series(tmp_path)] == ["sub-2", "sub-3"]
    assert "sub-1_dwi.nii.gz: left out, it has no .bval" in caplog.text
    with pytest.raises(
        ValueError, match="sub-2_dwi.bval: holds no numbers"
    ):  # in its turn, and without a warning of numpy's
        read_series(tmp_path / "sub-2" / "dwi" / "sub-2_dwi.nii.gz")
