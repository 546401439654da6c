"""Loading and dropping of modalities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import phantom
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose

from memnet.transforms.modalities import LoadModalitiesd, RandDropModalityd
from memnet.transforms.volumes import read_volume

BUNDLES = Path(__file__).parents[2] / "bundles"


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


def test_the_files_that_were_joined_are_named(write_nifti: Callable[..., Path]) -> None:
    paths = [write_nifti(f"{name}.nii", phantom()[0]) for name in ("t1", "t2")]
    load = LoadModalitiesd("image")
    both = write_nifti("both.nii", np.stack([phantom()[0]] * 2, -1))
    assert LoadModalitiesd("image", lone=None)({"image": str(both)})["image"].meta["beside"] == ""
    joined, alone = (load({"image": entry})["image"].meta for entry in (paths, str(paths[0])))
    assert Path(joined["filename_or_obj"]).name == "t1.nii" and joined["beside"] == "t2.nii" and alone["beside"] == ""


def test_a_name_comes_before_what_a_lone_file_is_else(write_nifti: Callable[..., Path]) -> None:
    """In training a T2 was taken for a T1 where inference took it for what its name tells."""
    values = np.random.default_rng(0).random((6, 6, 6), dtype=np.float32)
    for name, channel in (("a_T2w.nii", 1), ("a_T1w.nii", 0), ("a.nii", 0)):
        image = LoadModalitiesd("image")({"image": str(write_nifti(name, values))})["image"]
        assert [bool(part.any()) for part in image] == [channel == 0, channel == 1]


def test_smaller_voxels_of_a_second_modality_are_averaged(write_nifti: Callable[..., Path]) -> None:
    """Of 0.5 mm in the plane, turned: three of four were left out, and the noise stayed as it was."""
    noise = 100 + np.random.default_rng(0).normal(0, 10, (8, 48, 48)).astype(np.float32)
    turned = np.array([[0, 0, 0.5, 0], [0, 0.5, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 1]])
    paths = [write_nifti("t1.nii", phantom((24, 24, 8))[0]), write_nifti("t2.nii", noise, turned)]
    moved = LoadModalitiesd("image")({"image": paths})["image"][1, 2:-2, 2:-2]
    assert abs(float(moved.mean()) - 100) < 1
    assert float(moved.std()) < 6  # 10 without, 5 would be the mean of four


FOUR = ("T1", "T1c", "T2", "FLAIR")


@pytest.fixture
def four() -> np.ndarray:
    """T1, T1c and FLAIR, and no T2, as the volumes of one image."""
    volumes = [phantom(seed=k)[0] for k in range(4)]
    return np.stack([volumes[0], volumes[1], 0 * volumes[2], volumes[3]], -1)


@pytest.mark.parametrize("host", ["a file", "one volume a file", "in memory"])
def test_four_modalities_in_one_image(host: str, four: np.ndarray, write_nifti: Callable[..., Path]) -> None:
    affine = np.diag([1.0, 2, 3, 1])
    path = write_nifti("four.nii.gz", four, affine)
    entries: dict[str, Any] = {
        "a file": str(path),
        "one volume a file": [f"{path}:0", f"{path}:1", None, f"{path}:3"],
        "in memory": MetaTensor(torch.from_numpy(four.transpose(3, 0, 1, 2)), affine=torch.from_numpy(affine)),
    }
    image = LoadModalitiesd("image", FOUR, lone=None, shown="FLAIR")({"image": entries[host]})["image"]
    np.testing.assert_array_equal(image, four.transpose(3, 0, 1, 2))
    np.testing.assert_allclose(image.affine, affine)
    if host != "in memory":
        assert torch.equal(read_volume(image.meta["shown"])[0], image[3])


def test_empty_volume_is_no_modality(four: np.ndarray, write_nifti: Callable[..., Path]) -> None:
    four[..., [0, 3]] = 0
    path = write_nifti("four.nii.gz", four)
    image = LoadModalitiesd("image", FOUR, lone=None, shown="FLAIR")({"image": str(path)})["image"]
    assert image.meta["filename_or_obj"] == f"{path}:1" and "shown" not in image.meta


def test_one_modality_in_memory(four: np.ndarray) -> None:
    image = LoadModalitiesd("image", FOUR, lone="FLAIR")({"image": four[..., 3]})["image"]
    np.testing.assert_array_equal(image[3], four[..., 3])
    assert not image[:3].any()


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        (lambda four: four[..., 0], "which of T1, T1c, T2, FLAIR is it"),
        (lambda four: four[..., :2].transpose(3, 0, 1, 2), r"shape \(2, 20, 24, 22\), expected \(D, H, W\), or 4"),
        (lambda four: 0 * four.transpose(3, 0, 1, 2), "every voxel is 0"),
    ],
    ids=["no name", "two channels", "empty"],
)
def test_images_in_memory_that_say_too_little(
    shown: Callable[[np.ndarray], np.ndarray], message: str, four: np.ndarray
) -> None:
    with pytest.raises(ValueError, match=message):
        LoadModalitiesd("image", FOUR, lone=None)({"image": shown(four)})


def test_two_volumes_are_no_modalities_where_files_are_of_one(write_nifti: Callable[..., Path]) -> None:
    path = write_nifti("echoes.nii", np.stack([phantom()[0]] * 2, -1))
    with pytest.raises(ValueError, match="expected a 3D volume"):
        LoadModalitiesd("image")({"image": str(path)})


def test_channels_of_four_modalities(write_nifti: Callable[..., Path]) -> None:
    paths = [write_nifti(f"{k}.nii.gz", phantom(seed=k)[0]) for k in range(4)]
    load = LoadModalitiesd("image", FOUR, lone=None, shown="FLAIR")
    image = load({"image": [None, paths[1], None, paths[3]]})["image"]
    assert [bool(channel.any()) for channel in image] == [False, True, False, True]
    assert torch.equal(image[3], read_volume(paths[3])[0])
    assert image.meta["filename_or_obj"] == str(paths[1]) and image.meta["shown"] == str(paths[3])
    other_grid = write_nifti("flair.nii.gz", phantom()[0], np.diag([1.0, 1, 1.1, 1]))
    assert "shown" not in load({"image": [None, paths[1], None, other_grid]})["image"].meta
    with pytest.raises(ValueError, match="3.nii.gz: which of T1, T1c, T2, FLAIR"):
        load({"image": str(paths[3])})
    alone = LoadModalitiesd("image", FOUR, lone="FLAIR")({"image": str(paths[3])})["image"]
    assert alone[3].any() and not alone[:3].any()
    assert load({"image": str(write_nifti("sub_T1w.nii.gz", phantom()[0]))})["image"][0].any()
    with pytest.raises(ValueError, match="expected one file or 4"):
        load({"image": paths[:2]})


@pytest.mark.parametrize("kind", ["shape", "voxel size", "orientation", "origin"])
def test_the_file_of_another_grid_is_named(write_nifti: Callable[..., Path], kind: str) -> None:
    t1 = phantom()[0]
    odd = t1[:-1] if kind == "shape" else t1
    affine = {
        "shape": np.eye(4),
        "voxel size": np.diag([1.0, 1, 1.01, 1]),
        "orientation": np.array([[-1, 0, 0, 19.0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        "origin": np.array([[1, 0, 0, 0.2], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
    }[kind]
    # the first differs from the other two
    paths = [write_nifti("odd.nii.gz", odd, affine), *(write_nifti(f"{k}.nii.gz", t1) for k in (1, 2)), None]
    with pytest.raises(
        ValueError, match=r"odd\.nii\.gz: its grid .* differs from that of .*1\.nii\.gz.*--resample true"
    ):
        LoadModalitiesd("image", FOUR, resample=False)({"image": paths})
    assert LoadModalitiesd("image", FOUR)({"image": paths})["image"].shape == (4, *odd.shape)


def test_rounding_of_affines_is_no_other_grid(write_nifti: Callable[..., Path]) -> None:
    t1 = phantom()[0]
    paths = [write_nifti("a.nii", t1), write_nifti("b.nii", t1, np.diag([1.0001, 1, 1, 1]))]
    image = LoadModalitiesd("image", resample=False)({"image": paths})["image"]
    assert torch.equal(image[0], image[1])


def test_background_other_than_zero_is_taken_off_before_resampling(write_nifti: Callable[..., Path]) -> None:
    t1 = phantom((24, 24, 24))[0]
    scored = (t1 - t1.mean()) / t1.std()
    paths = [write_nifti("a.nii", t1), write_nifti("b.nii", scored[4:-4], np.array(
        [[1, 0, 0, 4.0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))]  # fmt: skip
    image = LoadModalitiesd("image", strip_background=True)({"image": paths})["image"]
    assert image[1][torch.from_numpy(t1) == 0].abs().max() < 1e-3 * image[1].max()
    assert torch.corrcoef(image[:, 4:-4].flatten(1))[0, 1] > 0.999


@pytest.mark.parametrize("kind", ["ringing", "z-scores"])
def test_tissue_bundle_sees_a_stripped_scan_as_it_was_before(kind: str, write_nifti: Callable[..., Path]) -> None:
    """Splines ring below the background's 0, z-scores put it amid the brain; either made air as bright as tissue."""
    t1 = phantom((24, 24, 24))[0].clip(0)
    changed = t1.copy()
    if kind == "ringing":
        edge = (t1 == 0) & (np.roll(t1, 1, 0) > 0)
        changed[edge] = -0.2 * t1.max()
    else:
        inside = t1 > 0
        changed[inside] = (t1[inside] - t1[inside].mean()) / t1[inside].std()
    parser = ConfigParser()
    parser.read_config(str(BUNDLES / "brain_mri_tissue_invres" / "configs" / "inference.json"))
    prepare = parser.get_parsed_content("preprocessing")
    images = [prepare({"image": str(write_nifti(f"{i}.nii", x))})["image"] for i, x in enumerate((t1, changed))]
    before, after = (image[0].as_tensor() for image in images)
    assert before.shape == after.shape
    assert (after[before == 0] == 0).float().mean() > 0.9
    assert torch.corrcoef(torch.stack([before[before > 0], after[before > 0]]))[0, 1] > 0.99
    if kind == "ringing":
        torch.testing.assert_close(after, before, atol=1e-3, rtol=0)


def test_one_modality_is_dropped_never_the_last() -> None:
    transform = RandDropModalityd("image", prob=0.6)
    transform.set_random_state(seed=0)
    kept = [transform({"image": torch.ones(2, 2, 2, 2)})["image"].flatten(1).any(1).tolist() for _ in range(300)]
    assert 0.3 < kept.count([True, True]) / 300 < 0.5
    assert kept.count([True, False]) > 60 and kept.count([False, True]) > 60
    alone = torch.stack([torch.zeros(2, 2, 2), torch.ones(2, 2, 2)])
    assert all(transform({"image": alone})["image"][1].all() for _ in range(20))


def test_any_of_four_modalities_are_dropped_never_all() -> None:
    transform = RandDropModalityd("image", prob=1.0)
    transform.set_random_state(seed=0)
    kept = [tuple(transform({"image": torch.ones(4, 2, 2, 2)})["image"][:, 0, 0, 0].tolist()) for _ in range(300)]
    assert len(set(kept)) == 14
    assert 0.3 < sum(sum(k) == 2 for k in kept) / 300 < 0.55


def test_tissue_bundle_never_trains_on_noise_alone() -> None:
    """Noise in the channel of a missing modality made it look present, so that the only real one could be dropped."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLES / "brain_mri_tissue_invres" / "configs" / "train.json"))
    steps = [t for t in parser.get_parsed_content("train#random_transforms") if "Affine" not in type(t).__name__]
    draw = Compose(steps[next(i for i, t in enumerate(steps) if type(t).__name__ == "RandFlipd") :])
    draw.set_random_state(seed=0)
    image = torch.stack([torch.rand(4, 4, 4) + 0.5, torch.zeros(4, 4, 4)])
    drawn = [draw({"image": image, "label": torch.ones(1, 4, 4, 4)})["image"] for _ in range(200)]
    assert all(bool((x[0] > 0.1).all()) and not x[1].any() for x in drawn)
    both = [draw({"image": image[[0, 0]], "label": torch.ones(1, 4, 4, 4)})["image"] for _ in range(200)]
    assert any(x.flatten(1).any(1).all() and x[0].ne(x[1]).any() for x in both)  # noise is still drawn
    assert any(not x[0].any() for x in both)  # and modalities are still dropped


@pytest.mark.parametrize("bundle", ["tissue", "tumor"])
def test_a_label_map_cut_to_its_labels_ends_where_it_ends(bundle: str, write_nifti: Callable[..., Path]) -> None:
    """Resampling repeated the labels of its faces to the image's edge."""
    t1, _, labels = phantom((24, 24, 24))
    whole, there = (labels > 0).astype(np.uint8), np.eye(4)
    there[2, 3] = 12
    parser = ConfigParser()
    parser.read_config(str(BUNDLES / f"brain_mri_{bundle}_invres" / "configs" / "train.json"))
    parser["label_map"], parser["resample"] = {"0": 0, "1": 1}, True
    steps = parser.get_parsed_content("image_transforms") + parser.get_parsed_content("label_transforms")
    image = [str(write_nifti("t1.nii", t1)), *[None] * (1 if bundle == "tissue" else 3)]
    cut = write_nifti("cut.nii", whole[:, :, 12:], there)
    label = Compose(steps)({"image": image, "label": str(cut)})["label"]
    assert whole[:, :, 12].any() and int(label.sum()) == int(whole[:, :, 12:].sum())
