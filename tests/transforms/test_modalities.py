"""Loading, scaling and dropping of modalities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import phantom
from monai.data import MetaTensor

from memnet.transforms.modalities import (
    KeepLogitsd,
    LoadModalitiesd,
    RandDropModalityd,
    ScaleModalitiesd,
    ToSpacingd,
    read_volume,
)


def test_reads_what_nibabel_reads(write_nifti: Callable[..., Path]) -> None:
    affine = np.diag([1.0, 2, 3, 1])
    volume = read_volume(write_nifti("a.nii.gz", phantom()[0].astype(np.int16), affine))
    assert volume.shape == (1, 20, 24, 22) and volume.dtype == torch.float32
    np.testing.assert_allclose(volume.affine, affine)


def test_reads_analyze_with_a_fourth_axis(iseg_folder: Path) -> None:
    assert read_volume(iseg_folder / "subject-1-T1.hdr").shape == (1, 20, 24, 22)
    assert torch.equal(read_volume(iseg_folder / "subject-1-T1.img"), read_volume(iseg_folder / "subject-1-T1.hdr"))


def test_missing_modality_is_a_zero_channel(write_nifti: Callable[..., Path]) -> None:
    path = write_nifti("a.nii.gz", phantom()[0])
    load = LoadModalitiesd("image")
    first = load({"image": str(path)})["image"]
    second = load({"image": [None, path], "output_name": "b"})["image"]
    assert first[0].any() and not first[1].any()
    assert torch.equal(second[1], first[0]) and not second[0].any()
    assert second.meta["output_name"] == "b"


def test_second_modality_is_moved_onto_the_first_ones_grid(write_nifti: Callable[..., Path]) -> None:
    t1 = phantom((24, 24, 24))[0]
    affine = np.array([[0, 0, 2.0, 1], [-1, 0, 0, 23], [0, 1.0, 0, 0], [0, 0, 0, 1]])
    coordinates = nib.affines.apply_affine(affine, np.stack(np.indices((24, 24, 12)), -1)).astype(int)
    moved = t1[tuple(np.clip(coordinates, 0, 23).transpose(3, 0, 1, 2))]
    paths = [write_nifti("t1.nii", t1), write_nifti("t2.nii", moved, affine)]
    image = LoadModalitiesd("image")({"image": paths})["image"]
    # every other slice of the coarser volume falls on one of the finer
    torch.testing.assert_close(image[1, 1:24:2], image[0, 1:24:2], atol=1e-2, rtol=1e-3)


def test_scaling_fills_the_unit_range_and_leaves_a_missing_channel(recwarn: pytest.WarningsRecorder) -> None:
    image = MetaTensor(torch.stack([torch.rand(12, 12, 12) * 500 - 100, torch.zeros(12, 12, 12)]))
    scaled = ScaleModalitiesd("image")({"image": image})["image"]
    assert scaled[0].min() == 0 and scaled[0].max() == 1
    assert not scaled[1].any() and not len(recwarn)
    torch.testing.assert_close((scaled[0] == 1).float().mean(), torch.tensor(0.005), atol=2e-3, rtol=0)
    assert image[0].max() > 300  # the input stays


def test_spacing_goes_there_and_back_beside_an_image_path() -> None:
    # MONAI Label hands over image_path, a string, beside image
    affine = torch.diag(torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=torch.float64))
    image = MetaTensor(torch.rand(2, 20, 10, 6), affine=affine, meta={"filename_or_obj": "a.nii.gz"})
    transform = ToSpacingd("image")
    there = transform({"image": image, "image_path": "a.nii.gz"})
    assert abs(there["image"].shape[1] - 10) <= 1 and abs(there["image"].shape[3] - 12) <= 1
    back = transform.inverse(there)["image"]
    assert back.shape == image.shape
    torch.testing.assert_close(back.affine, affine)


def test_one_modality_is_dropped_never_the_last() -> None:
    transform = RandDropModalityd("image", prob=0.6)
    transform.set_random_state(seed=0)
    kept = [transform({"image": torch.ones(2, 2, 2, 2)})["image"].flatten(1).any(1).tolist() for _ in range(300)]
    assert 0.3 < kept.count([True, True]) / 300 < 0.5
    assert kept.count([True, False]) > 60 and kept.count([False, True]) > 60
    alone = torch.stack([torch.zeros(2, 2, 2), torch.ones(2, 2, 2)])
    assert all(transform({"image": alone})["image"][1].all() for _ in range(20))


def test_logits_are_kept() -> None:
    logits = torch.rand(4, 2, 2, 2)
    assert KeepLogitsd("pred")({"pred": (logits, torch.zeros(2))})["pred"] is logits
    assert KeepLogitsd("pred")({"pred": logits})["pred"] is logits
