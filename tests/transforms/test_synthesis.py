"""Synthesis of images from label maps: what must hold for every draw."""

import numpy as np
import pytest
import torch
from monai.transforms import Compose

from memnet.transforms.acquisition import RandAcquireModalitiesd, RandScaleModalitiesd, RandStripSkulld
from memnet.transforms.deformation import RandDeformLabelsd
from memnet.transforms.labels import FREESURFER_TISSUE
from memnet.transforms.synthesis import STRUCTURES, RandSynthesizeModalitiesd, touching
from memnet.workflow.label_maps import draw_examples, find_label_maps

SIZE = (20, 24, 28)


@pytest.fixture
def head() -> torch.Tensor:
    """Shells of skin, bone, fluid, cortex, white matter and a ventricle, ``(1, 48, 48, 48)``."""
    axis = torch.arange(48) - 23.5
    radius = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2).sqrt()
    labels = torch.zeros(1, 48, 48, 48, dtype=torch.int16)
    for value, outer in [(511, 22), (515, 20), (24, 18), (3, 16), (2, 12), (4, 4)]:
        labels[0][radius < outer] = value
    return labels


def pipeline(prob_stripped: float = 1.0, seed: int = 0, **synthesis) -> Compose:
    transforms = [
        RandDeformLabelsd("label", SIZE, prob_anywhere=0.0),
        RandSynthesizeModalitiesd("label", **synthesis),
        RandAcquireModalitiesd("image"),
        RandStripSkulld("image", prob=prob_stripped),
        RandScaleModalitiesd("image"),
    ]
    return Compose(transforms).set_random_state(seed=seed)


@pytest.mark.parametrize("prob_stripped", [0.0, 1.0])
def test_image_and_label_have_the_patch_size_and_range(head, prob_stripped):
    transform = pipeline(prob_stripped)
    for _ in range(5):
        out = transform({"label": head})
        assert set(out) == {"image", "label"}
        assert out["image"].shape == (2, *SIZE) and out["image"].dtype == torch.float32
        assert out["label"].shape == (1, *SIZE) and out["label"].dtype == torch.uint8
        assert torch.isfinite(out["image"]).all()
        assert out["image"].min() >= 0 and out["image"].max() <= 1
        assert out["label"].max() <= 3


def test_the_same_seed_draws_the_same_and_another_does_not(head):
    first, again, other = (pipeline(seed=s)({"label": head}) for s in (3, 3, 4))
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["label"], again["label"])
    assert not torch.equal(first["image"], other["image"])


def test_the_global_random_state_is_left_alone(head):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    pipeline()({"label": head})
    assert torch.equal(torch.rand(3), expected)


def test_no_modality_or_one_is_missing_never_both(head):
    transform = RandSynthesizeModalitiesd("label", prob_missing=(0.5, 0.5)).set_random_state(seed=0)
    present = [tuple((transform({"label": head})["image"] != 0).flatten(1).any(1).tolist()) for _ in range(20)]
    assert set(present) == {(True, False), (False, True)}
    transform = RandSynthesizeModalitiesd("label", prob_missing=(0.0, 0.0)).set_random_state(seed=0)
    assert all((transform({"label": head})["image"] != 0).flatten(1).any(1).all() for _ in range(5))


def test_a_missing_modality_stays_exactly_zero_to_the_end(head):
    out = pipeline(prob_stripped=0.0, prob_missing=(1.0, 0.0))({"label": head})
    assert (out["image"][0] == 0).all() and (out["image"][1] != 0).any()


def test_stripped_background_is_exactly_zero_in_image_and_label(head):
    transform = pipeline(prob_missing=(0.0, 0.0))
    for _ in range(8):
        out = transform({"label": head})
        empty = (out["image"] == 0).all(0)
        assert empty.any()
        assert (out["label"][0][empty] == 0).float().mean() > 0.99


def test_undeformed_labels_become_tissue_but_for_the_fluid_that_touches_cortex(head):
    out = RandSynthesizeModalitiesd("label", white_share=1.0).set_random_state(seed=0)({"label": head})
    expected = head.clone()
    for value in head.unique().tolist():
        expected[head == value] = FREESURFER_TISSUE[value]
    changed = out["label"] != expected
    assert changed.any()
    assert torch.equal(changed[0], touching(head[0] == 3) & (head[0] == 24))
    assert (out["label"][changed] == 2).all()


@pytest.mark.parametrize(("grey", "white"), [(3, 2), (42, 41), (8, 7)])
def test_cortex_among_white_matter_counts_as_white_and_looks_between_the_two(grey, white):
    labels = torch.full((1, 12, 12, 12), grey, dtype=torch.int16)
    labels[:, :, :, 6:] = white
    transform = RandSynthesizeModalitiesd(
        "label", prob_missing=(0, 0), prob_random=(0, 0), texture=0.0, white_share=0.3, white_mixture=(0.5, 0.5)
    )
    out = transform.set_random_state(seed=0)({"label": labels})
    # nine of a voxel's 27 neighbours are white in the first layer of cortex, none in the second
    assert (out["label"][..., 5:] == 3).all() and (out["label"][..., :5] == 2).all()
    t1 = out["image"][0].mean((0, 1))
    assert t1[4] < t1[5] - 0.05 and t1[5] < t1[6] - 0.05
    further = RandSynthesizeModalitiesd("label", white_share=0.34).set_random_state(seed=0)({"label": labels})
    assert (further["label"][..., 5] == 2).all()


def test_undeformed_patch_of_the_identity_is_the_map_itself(head):
    still = RandDeformLabelsd("label", (48, 48, 48), 0.0, 0.0, 0.0, 0.0, prob_flip=0.0).set_random_state(seed=0)
    still.randomize(head[0])
    still._centre = np.full(3, 23.5)
    index, outside = still._index(head.shape[1:])
    assert not outside.any()
    assert torch.equal(head[0].take(index), head[0])


def test_deformation_adds_no_label_values(head):
    transform = RandDeformLabelsd("label", SIZE).set_random_state(seed=0)
    known = set(head.unique().tolist())
    assert all(set(transform({"label": head})["label"].unique().tolist()) <= known for _ in range(5))


def test_unknown_label_values_are_refused_by_value(head):
    head[0, 5, 5, 5] = 600
    with pytest.raises(ValueError, match="600"):
        RandSynthesizeModalitiesd("label")({"label": head})


@pytest.mark.parametrize("prob_missing", [(0.6, 0.6), (-0.1, 0.5)])
def test_impossible_probabilities_are_refused(prob_missing):
    with pytest.raises(ValueError, match="prob_missing"):
        RandSynthesizeModalitiesd("label", prob_missing=prob_missing)


def test_every_structure_has_a_tissue():
    assert all(value in FREESURFER_TISSUE for values, *_ in STRUCTURES.values() for value in values)


def test_examples_depend_on_the_seed_alone(head):
    first, again = (draw_examples([{"label": head}], pipeline(), n_draws=2, seed=7) for _ in range(2))
    assert len(first) == 2
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))


def test_label_maps_are_split_by_name_and_too_few_are_refused(tmp_path):
    for i in range(3):
        (tmp_path / f"map_{i}.nii.gz").touch()
    cases = find_label_maps(tmp_path, n_validation=1)
    assert [c["label"][-8:-7] for c in cases["training"]] == ["0", "1"] and len(cases["validation"]) == 1
    with pytest.raises(ValueError, match="3 NIfTI files found, 3"):
        find_label_maps(tmp_path, n_validation=3)
    with pytest.raises(ValueError, match="nowhere"):
        find_label_maps(tmp_path / "nowhere")
