"""What of a file becomes a volume, and what is refused."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from conftest import phantom
from monai.transforms import Orientation

from memnet.transforms.grids import ToSpacingd
from memnet.transforms.kspace_inputs import LoadKspaced
from memnet.transforms.modalities import LoadModalitiesd
from memnet.transforms.volumes import LoadVolumed, read_volume
from memnet.workflow.scans import find_scans


def test_reads_what_nibabel_reads(write_nifti: Callable[..., Path]) -> None:
    affine = np.diag([1.0, 2, 3, 1])
    volume = read_volume(write_nifti("a.nii.gz", phantom()[0].astype(np.int16), affine))
    assert volume.shape == (1, 20, 24, 22) and volume.dtype == torch.float32
    np.testing.assert_allclose(volume.affine, affine)


@pytest.mark.parametrize("suffix", ["nrrd", "nhdr", "mha", "mhd"])
def test_reads_what_slicer_writes(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 900, (6, 5, 4)).astype(np.int16)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    image = SimpleITK.GetImageFromArray(values.transpose())
    image.SetSpacing((0.9, 1.1, 2.5))
    image.SetOrigin((-20.0, 30, 5))
    image.SetDirection(turn.ravel().tolist())
    SimpleITK.WriteImage(image, str(tmp_path / f"a.{suffix}"))
    SimpleITK.WriteImage(image, str(tmp_path / "a.nii"))
    volume, same = read_volume(tmp_path / f"a.{suffix}"), read_volume(tmp_path / "a.nii")
    assert torch.equal(volume.as_tensor(), same.as_tensor())
    np.testing.assert_allclose(volume.affine, same.affine, atol=1e-4)
    (case,) = find_scans(dataset_dir=tmp_path, pattern=f"*.{suffix}")
    assert case["output_name"] == "a"
    (tmp_path / f"b.{suffix}").write_text("no image")
    with pytest.raises(ValueError, match=f"b.{suffix}: not an NRRD or MetaImage file, or damaged"):
        read_volume(tmp_path / f"b.{suffix}")
    SimpleITK.WriteImage(SimpleITK.Compose(image, image), str(tmp_path / f"c.{suffix}"))
    with pytest.raises(ValueError, match=f"c.{suffix}: has shape .* expected a 3D volume"):
        read_volume(tmp_path / f"c.{suffix}")


def test_reads_analyze_with_a_fourth_axis(iseg_folder: Path) -> None:
    assert read_volume(iseg_folder / "subject-1-T1.hdr").shape == (1, 20, 24, 22)
    assert torch.equal(read_volume(iseg_folder / "subject-1-T1.img"), read_volume(iseg_folder / "subject-1-T1.hdr"))


@pytest.mark.parametrize("volume", ["4", "1.2"])
def test_volume_that_is_not_there(volume: str, write_nifti: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=f"four.nii:{volume}: no such volume, the file has shape"):
        read_volume(f"{write_nifti('four.nii', np.ones((5, 4, 3, 4)))}:{volume}")


def test_label_map_of_another_grid_is_refused(write_nifti: Callable[..., Path]) -> None:
    t1, _, labels = phantom()
    image = LoadModalitiesd("image")({"image": str(write_nifti("a.nii", t1))})["image"]
    here, there = write_nifti("here.nii", labels), write_nifti("there.nii", labels, np.diag([1.0, 1, 1.2, 1]))
    turned = Orientation("LPS", labels=None)(ToSpacingd("image", 2.0)({"image": image})["image"])
    load = LoadVolumed("label", grid_key="image")
    assert load({"image": turned, "label": str(here)})["label"].shape == (1, *labels.shape)
    with pytest.raises(ValueError, match=r"there\.nii: its grid .* differs from that of .*a\.nii"):
        load({"image": turned, "label": str(there)})
    empty = write_nifti("empty.nii", np.zeros_like(labels))
    assert not LoadVolumed("label", constant=True)({"label": str(empty)})["label"].any()


@pytest.mark.parametrize(
    ("dtype", "told"),
    [(np.complex64, "complex values"), (np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]), "colours")],
)
def test_what_has_no_real_numbers_is_refused(dtype: Any, told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), dtype), np.eye(4)), path)
    for read in (read_volume, lambda file: LoadKspaced("image")({"image": str(file)})):
        with pytest.raises(ValueError, match=f"a.nii.gz: .*holds {told}, expected real numbers"):
            read(path)


@pytest.mark.parametrize("name", ["a.mgh", "a.mgz", "a.PAR", "a.REC", "a.gii", "a.mnc", "a.v", "a.trk"])
@pytest.mark.parametrize("content", [b"words, no image", gzip.compress(b"nor this")], ids=["words", "compressed"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of files that nibabel leaves open
def test_what_only_has_the_name_of_an_image_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: not a NIfTI"):
        read_volume(tmp_path / name)


@pytest.mark.parametrize("name", ["a.mgz", "a.nii.bz2"])
def test_other_compressed_formats_are_not_cut_short(name: str, tmp_path: Path) -> None:
    values = phantom()[0].astype(np.float32)
    image = nib.MGHImage(values, np.eye(4)) if name.endswith("mgz") else nib.Nifti1Image(values, np.eye(4))
    nib.save(image, tmp_path / name)
    np.testing.assert_array_equal(read_volume(tmp_path / name)[0], values)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name}: .*damaged"):
        read_volume(tmp_path / name)
