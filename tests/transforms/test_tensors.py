"""Tensor images in networks: axes, edge, regions, patches, symmetries, interpolation."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import nibabel as nib
import numpy as np
import pytest
import torch
from diffusion_cases import GRIDS, Enlarge, field, positions
from monai.data import MetaTensor

import memnet
from memnet.datasets.diffusion_files import write_tensors
from memnet.diffusion.superresolution import TensorLoss, ValidPatchInferer, errors_in
from memnet.diffusion.tensors import as_channels, as_matrices, block_mean, coarse_affine, complete_edge, fine_affine
from memnet.transforms.tensors import (
    CompleteEdged,
    LoadTensorsd,
    MarkRegionsd,
    RandTensorPatchd,
    RandTensorSymmetryd,
    interpolate,
    signed_permutations,
    turn,
)


@pytest.mark.parametrize("affine", GRIDS.values(), ids=GRIDS)
def test_loaded_tensors_are_in_the_axes_of_the_turned_grid(affine, tmp_path):
    """Along the first axis of the loaded array a tensor's xx is its diffusivity."""
    shape = (4, 5, 6)
    write_tensors(tmp_path / "t.nii.gz", as_channels(field(positions(shape, affine))), affine)
    loaded = LoadTensorsd("image", "mask")({"image": str(tmp_path / "t.nii.gz")})["image"]
    turned = np.asarray(loaded.affine)
    assert nib.aff2axcodes(turned) == ("R", "A", "S")
    axes = turned[:3, :3] / np.linalg.norm(turned[:3, :3], axis=0)
    world = field(positions(tuple(loaded.shape[1:]), turned))
    expected = np.einsum("ia,...ij,jb->...ab", axes, world, axes) * 1e3
    found = as_matrices(np.moveaxis(loaded[:6].numpy(), 0, -1))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert bool((loaded[6] == 1).all())


def test_mask_of_another_grid_is_refused(tmp_path):
    write_tensors(tmp_path / "t.nii.gz", np.full((4, 5, 6, 6), 1e-3), np.eye(4))
    nib.save(nib.Nifti1Image(np.ones((4, 5, 5), np.uint8), np.eye(4)), tmp_path / "m.nii.gz")
    entry = {"image": str(tmp_path / "t.nii.gz"), "mask": str(tmp_path / "m.nii.gz")}
    with pytest.raises(ValueError, match=r"mask's grid .* is not that of"):
        LoadTensorsd("image", "mask")(entry)


def test_edge_is_completed_from_the_nearest_voxel_of_the_brain():
    tensors, brain = torch.rand(6, 7, 6, 5).numpy(), np.zeros((7, 6, 5), dtype=bool)
    brain[2:5, 2:4, 1:4] = True
    completed = complete_edge(tensors, brain)
    assert np.array_equal(completed[:, brain], tensors[:, brain])
    assert np.array_equal(completed[:, 0, 2, 2], tensors[:, 2, 2, 2])
    assert np.array_equal(completed[:, 6, 5, 4], tensors[:, 4, 3, 3])


def pair(sizes: tuple[int, int, int] = (12, 11, 13), rate: int = 2) -> dict[str, MetaTensor]:
    """Coarse tensors that are the block means of fine ones, with their brains."""
    fine = torch.rand(7, *(rate * n for n in sizes))
    fine[6] = 0
    fine[6, 4:-4, 4:-4, 4:-4] = 1
    coarse = torch.from_numpy(np.moveaxis(block_mean(np.moveaxis(fine.numpy(), 0, -1), rate), -1, 0).copy())
    return {"image": MetaTensor(coarse), "label": MetaTensor(fine)}


def test_regions():
    data = MarkRegionsd("label", neighbourhood=5)(CompleteEdged("image")(pair()))
    regions = data["label"][6].numpy()
    brain = data["brain"][0].numpy() > 0
    for voxel in np.ndindex(*brain.shape):
        around = tuple(slice(max(0, v - 2), v + 3) for v in voxel)
        inside = all(2 <= v < n - 2 for v, n in zip(voxel, brain.shape, strict=True)) and brain[around].all()
        block = regions[tuple(slice(2 * v, 2 * v + 2) for v in voxel)]
        assert set(np.unique(block)) == {2.0 if inside else 1.0 if brain[voxel] else 0.0}, voxel
    assert (regions == 2).sum() == 8 * 4 * 3 * 5


@pytest.mark.parametrize("patch_size", [5, 7, 11])
def test_patches_of_both_resolutions_show_the_same(patch_size):
    data = MarkRegionsd("label")(CompleteEdged("image")(pair()))
    draw = RandTensorPatchd(patch_size=patch_size).set_random_state(0)
    centres = set()
    for _ in range(20):
        patch = draw(data)
        assert patch["image"].shape == (6, *(patch_size,) * 3)
        label = patch["label"]
        assert label.shape == (7, *(2 * (patch_size - 4),) * 3)
        seen = label[6] > 0
        coarse = torch.from_numpy(block_mean(np.moveaxis(label[:6].numpy(), 0, -1), 2))
        whole = torch.from_numpy(block_mean(seen.float().numpy(), 2)) == 1
        inner = patch["image"][:, 2:-2, 2:-2, 2:-2].permute(1, 2, 3, 0)
        torch.testing.assert_close(coarse[whole], inner[whole])
        middle = (patch_size - 4) // 2
        assert bool(whole[middle, middle, middle])  # centred in the brain
        centres.add(tuple(coarse[middle, middle, middle].tolist()))
    assert len(centres) > 15
    assert bool((data["label"][6] > 0).any()) and data["brain"].shape == (1, 12, 11, 13)


def test_volume_smaller_than_a_patch_is_refused():
    data = MarkRegionsd("label")(CompleteEdged("image")(pair((12, 11, 9))))
    with pytest.raises(ValueError, match=r"\(12, 11, *9\) voxels are fewer than a patch's 11"):
        RandTensorPatchd()(data)


def test_symmetries_turn_vectors_with_their_field():
    vectors = torch.randn(3, 3, 4, 5, dtype=torch.float64)
    products = np.einsum("ixyz,jxyz->xyzij", vectors, vectors)
    tensors = torch.from_numpy(np.moveaxis(as_channels(products), -1, 0).copy()).float()
    found = set()
    for order, sign in signed_permutations():
        matrix = np.zeros((3, 3))
        matrix[range(3), order] = sign
        moved = vectors.permute(0, *(1 + axis for axis in order)).flip([1 + i for i in range(3) if sign[i] < 0])
        turned = np.einsum("ai,ixyz->axyz", matrix, moved)
        expected = np.moveaxis(as_channels(np.einsum("ixyz,jxyz->xyzij", turned, turned)), -1, 0)
        torch.testing.assert_close(
            turn(tensors, order, sign).double(), torch.from_numpy(expected.copy()), atol=1e-5, rtol=0
        )
        found.add(turn(tensors, order, sign).numpy().tobytes())
    assert len(found) == 48


def test_image_and_label_are_turned_alike():
    data = pair((6, 6, 6))
    turned = RandTensorSymmetryd(["image", "label"]).set_random_state(3)({k: v.as_tensor() for k, v in data.items()})
    coarse = np.moveaxis(block_mean(np.moveaxis(turned["label"].numpy(), 0, -1), 2), -1, 0)
    torch.testing.assert_close(turned["image"], torch.from_numpy(coarse.copy()))
    assert not torch.equal(turned["image"], data["image"].as_tensor())


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("rate", [2, 3])
def test_interpolation_knows_the_half_voxel(rate, order):
    affine = GRIDS["oblique"]
    coarse = positions((16, 15, 14), affine).astype(np.float32)
    fine = interpolate(torch.from_numpy(np.moveaxis(coarse, -1, 0).copy()), rate, order).numpy()
    expected = positions(fine.shape[1:], fine_affine(affine, rate))
    inside = tuple(slice(5 * rate, -5 * rate) for _ in range(3))
    np.testing.assert_allclose(np.moveaxis(fine, 0, -1)[inside], expected[inside], atol=0.02)
    np.testing.assert_allclose(coarse_affine(fine_affine(affine, rate), rate), affine, atol=1e-12)


@pytest.mark.parametrize("patch_size", [5, 11])
@pytest.mark.parametrize("sizes", [(7, 14, 3), (12, 1, 9)])
def test_patches_fill_the_whole_volume(patch_size, sizes):
    x = torch.rand(2, 6, *sizes)
    refined = ValidPatchInferer(patch_size, batch_size=3)(MetaTensor(x), Enlarge())
    expected = x
    for axis in (2, 3, 4):
        expected = expected.repeat_interleave(2, axis)
    assert torch.equal(refined, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("reflections", "known", "unknown"),
    [(2, (-1, -1, -1), (-1, 1, 1)), (4, (-1, 1, 1), (1, -1, 1)), (8, (1, -1, 1), None), (8, (1, 1, -1), None)],
)
def test_averages_over_reflections_do_not_depend_on_how_the_brain_lies(reflections, known, unknown):
    torch.manual_seed(0)
    network, tensors = memnet.ESPCN(in_channels=6, upsampling_rate=2).eval(), torch.rand(6, 9, 8, 7)
    one, several = ValidPatchInferer(), ValidPatchInferer(reflections=reflections)

    def reflected(x, sign):
        return turn(x, (0, 1, 2), sign)

    refined = several(tensors[None], network)[0]
    torch.testing.assert_close(several(reflected(tensors, known)[None], network)[0], reflected(refined, known))
    assert not torch.allclose(one(reflected(tensors, known)[None], network)[0], reflected(refined, known), atol=1e-3)
    if unknown:
        found = several(reflected(tensors, unknown)[None], network)[0]
        assert not torch.allclose(found, reflected(refined, unknown), atol=1e-3)
    else:
        signs = list(itertools.product((1, -1), repeat=3))
        passes = [reflected(one(reflected(tensors, s)[None], network)[0], s) for s in signs]
        torch.testing.assert_close(refined, sum(passes) / 8)


def test_only_tensors_are_reflected():
    with pytest.raises(ValueError, match="6 channels are reflected, got 3"):
        ValidPatchInferer(reflections=2)(torch.rand(1, 3, 11, 11, 11), Enlarge())
    with pytest.raises(ValueError, match="got 3"):
        ValidPatchInferer(reflections=3)


@pytest.mark.parametrize("reflections", [1, 8])
def test_patches_without_brain_are_not_refined(reflections):
    x, brain, sizes = torch.rand(1, 6, 21, 9, 16), torch.zeros(1, 1, 21, 9, 16), []
    brain[0, 0, 17, 3, 12] = 1
    network = Enlarge()
    network.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    whole = ValidPatchInferer(reflections=reflections)(x, network)
    n_patches = sum(sizes)
    sizes.clear()
    refined = ValidPatchInferer(reflections=reflections)(x, network, brain=brain)
    assert sum(sizes) == reflections < n_patches
    torch.testing.assert_close(refined[0, :, 34:36, 6:8, 24:26], whole[0, :, 34:36, 6:8, 24:26])
    assert not refined[0, :, :14].any()


def test_loss_looks_at_the_brain_alone():
    pred, label = torch.rand(2, 6, 4, 4, 4), torch.rand(2, 7, 4, 4, 4)
    label[:, 6] = 0
    label[0, 6, 1] = 1
    label[1, 6, 2] = 2
    label[:, :6][label[:, 6:].expand_as(pred) == 0] = 1e6
    difference = torch.cat([(pred - label[:, :6])[0, :, 1].flatten(), (pred - label[:, :6])[1, :, 2].flatten()])
    torch.testing.assert_close(TensorLoss()(pred, label), difference.square().mean())
    torch.testing.assert_close(TensorLoss("absolute")(pred, label), difference.abs().mean())
    assert TensorLoss()(pred, torch.zeros(2, 7, 4, 4, 4)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_half_precision_does_not_round_the_labels(dtype):
    label = torch.rand(2, 7, 24, 24, 24)
    pred = (label[:, :6] + 0.003).to(dtype).requires_grad_()
    twin = pred.detach().float().requires_grad_()
    for x in (pred, twin):
        (2.0**14 * TensorLoss()(x, label)).backward()  # as a scaler of gradients does
    assert twin.grad.norm() > 0
    assert (pred.grad.float() - twin.grad).norm() < 0.01 * twin.grad.norm()


def test_patches_are_refined_in_float32_on_an_old_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "memnet.diffusion.superresolution.bfloat16_autocast", lambda *a: asked.append(a) or nullcontext()
    )
    ValidPatchInferer(amp=True)(torch.rand(1, 6, 11, 11, 11), Enlarge())
    assert asked == [(torch.device("cpu"), True)]


def test_errors_are_in_units_of_1e_5_by_region():
    label = torch.zeros(7, 2, 2, 2)
    label[[0, 2, 5]] = 1.0
    label[6, 0], label[6, 1, 0], label[6, 1, 1, 0] = 2, 1, 0
    pred = label[:6].clone()
    pred[:, 0] += 0.03  # um^2/ms: 3e-5 mm^2/s
    pred[:, 1, 0] += 0.05
    pred[:, 1, 1] += 9
    label[6, 1, 1] = 0
    found = {}
    for region in ("interior", "edge", "total"):
        (a,), (b,) = errors_in(region)([{"pred": pred, "label": label}])
        found[region] = float((a - b).square().mean().sqrt())
    assert found == pytest.approx({"interior": 3, "edge": 5, "total": np.sqrt((4 * 9 + 2 * 25) / 6)}, rel=1e-4)
    pred = label[:6].clone()
    pred[[0, 2, 5]] += 0.1
    (a,), (b,) = errors_in("total", quantity="md")([{"pred": pred, "label": label}])
    torch.testing.assert_close(a - b, torch.full_like(a, 10), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="nowhere"):
        errors_in("nowhere")
