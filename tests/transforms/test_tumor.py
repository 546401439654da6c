"""Synthetic tumours: where they may lie, what they look like, what is missing."""

import pytest
import torch
from monai.transforms import Compose

from memnet.transforms.acquisition import RandAcquireModalitiesd, RandStripSkulld
from memnet.transforms.deformation import RandDeformLabelsd
from memnet.transforms.intensity import scale_brain
from memnet.transforms.labels import ENHANCING, NECROTIC, OEDEMA
from memnet.transforms.tumor import RandAddLesionsd, RandGrowTumord, smooth_noise
from memnet.transforms.tumor_images import MODALITIES, RandScaleBraind, RandSynthesizeTumord

SIZE = (32, 32, 32)
ALL = ((1.0, MODALITIES),)


@pytest.fixture
def brain() -> torch.Tensor:
    """Shells of skin, fluid, cortex, white matter and a ventricle, ``(1, 40, 40, 40)``."""
    axis = torch.arange(40) - 19.5
    radius = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2).sqrt()
    labels = torch.zeros(1, 40, 40, 40, dtype=torch.int16)
    for value, outer in [(511, 20), (24, 18), (3, 16), (2, 13), (4, 4)]:
        labels[0][radius < outer] = value
    return labels


def pipeline(seed: int = 0) -> Compose:
    transforms = [
        RandDeformLabelsd("label", SIZE, prob_anywhere=0.0),
        RandAddLesionsd("label"),
        RandGrowTumord("label", radius=(3.0, 10.0)),
        RandSynthesizeTumord("label"),
        RandAcquireModalitiesd("image"),
        RandStripSkulld("image", prob=1.0),
        RandScaleBraind("image"),
    ]
    return Compose(transforms).set_random_state(seed=seed)


def test_patches_depend_on_the_seed_alone_and_have_shape_and_range(brain):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, again, other = pipeline(1), pipeline(1), pipeline(2)
    differs = False
    for _ in range(6):
        a, b, c = (transform({"label": brain}) for transform in (first, again, other))
        assert set(a) == {"image", "label"}
        assert a["image"].shape == (4, *SIZE) and a["label"].shape == (1, *SIZE)
        assert a["image"].dtype == torch.float32 and a["label"].dtype == torch.uint8
        assert a["image"].min() >= 0 and a["image"].max() <= 1 and a["label"].max() <= ENHANCING
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
        differs |= not torch.equal(a["image"], c["image"])
    assert differs
    assert torch.equal(torch.rand(3), expected)


def test_tumour_stays_in_the_brain_and_oedema_out_of_fluid(brain):
    transform = RandGrowTumord("label", prob=1.0, radius=(4.0, 10.0)).set_random_state(seed=0)
    seen = torch.zeros(4)
    for _ in range(12):
        out = transform({"label": brain})
        assert out["label"].shape == brain.shape and out["label"].dtype == brain.dtype
        tumor, labels = out["tumor"], out["label"]
        assert not ((tumor > 0) & ((labels == 511) | (labels == 0) | (labels == 4))).any()
        assert not ((tumor == OEDEMA) & (labels == 24)).any()
        seen += torch.bincount(tumor.flatten().long(), minlength=4)
    assert (seen > 200).all()
    # oedema prefers white matter, which has less than half of the volume that is open to it
    still = RandGrowTumord("label", prob=1.0, radius=(3.0, 4.0), mass_effect=0.0, reach=12.0).set_random_state(seed=0)
    share = torch.zeros(2)
    for _ in range(12):
        oedema = still({"label": brain})["tumor"] == OEDEMA
        share += torch.stack([(oedema & (brain == value)).sum() / (brain == value).sum() for value in (2, 3)])
    assert share[0] > 2 * share[1]


def test_low_grade_never_enhances_and_no_tumour_changes_nothing(brain):
    low = RandGrowTumord("label", prob=1.0, radius=(4.0, 8.0), prob_low_grade=1.0).set_random_state(seed=0)
    tumors = [low({"label": brain})["tumor"] for _ in range(5)]
    assert all((t == NECROTIC).any() and not (t == ENHANCING).any() for t in tumors)
    out = RandGrowTumord("label", prob=0.0).set_random_state(seed=0)({"label": brain})
    assert torch.equal(out["label"], brain) and not out["tumor"].any()
    # nowhere to grow
    out = RandGrowTumord("label", prob=1.0).set_random_state(seed=0)({"label": torch.full_like(brain, 511)})
    assert not out["tumor"].any()


def test_mass_effect_pushes_tissue_away_from_the_tumour():
    # the only seat is a spot of white matter in the middle of brainstem-like fluid, with a plate 8 voxels away
    labels = torch.full((1, 33, 33, 33), 4, dtype=torch.int16)
    labels[0, 15:18, 15:18, 15:18] = 2
    labels[0, 24] = 24
    arguments = {"prob": 1.0, "radius": (6.0, 6.0), "prob_multifocal": 0.0}
    still = RandGrowTumord("label", mass_effect=0.0, **arguments).set_random_state(seed=0)({"label": labels})
    assert torch.equal(still["label"], labels)
    pushed = RandGrowTumord("label", mass_effect=0.9, **arguments).set_random_state(seed=0)({"label": labels})
    line = (pushed["label"][0, :, 16, 16] == 24).nonzero().flatten()
    assert line.min() > 24
    assert (pushed["label"][0, -1] == labels[0, -1]).all()


def test_parts_look_as_they_do_in_each_modality(brain):
    grow = RandGrowTumord("label", prob=1.0, radius=(5.0, 7.0), reach=8.0, prob_low_grade=0.0).set_random_state(seed=3)
    draw = RandSynthesizeTumord("label", modality_sets=ALL, texture=0.0, tumor_texture=0.0).set_random_state(seed=3)
    checked = 0
    for _ in range(10):
        grown = grow({"label": brain})
        labels, tumor = grown["label"][0], grown["tumor"][0]
        out = draw(dict(grown))
        assert torch.equal(out["label"][0], tumor)
        assert ((tumor > 0) <= out["brain"][0]).all()
        if min(int((tumor == part).sum()) for part in (OEDEMA, ENHANCING)) < 60:
            continue
        checked += 1

        def mean(name, where, image=out["image"]):
            return float(image[MODALITIES.index(name)][where].median())

        white, fluid = (labels == 2) & (tumor == 0), (labels == 4) & (tumor == 0)
        oedema, enhancing = tumor == OEDEMA, tumor == ENHANCING
        assert mean("FLAIR", oedema & (labels == 2)) > 1.01 * mean("FLAIR", white)
        assert mean("T2", oedema & (labels == 2)) > 1.01 * mean("T2", white)
        assert mean("T1", oedema & (labels == 2)) < mean("T1", white)
        assert mean("T1c", enhancing) / mean("T1c", white) > mean("T1", enhancing) / mean("T1", white)
        assert mean("FLAIR", fluid) < 0.5 * mean("FLAIR", white) and mean("T2", fluid) > 1.5 * mean("T2", white)
    assert checked >= 3


def test_modalities_are_present_in_the_sets_asked_for(brain):
    grown = RandGrowTumord("label", prob=0.0).set_random_state(seed=0)({"label": brain})
    pair = RandSynthesizeTumord("label", modality_sets=[[0.7, ["T1c", "FLAIR"]]]).set_random_state(seed=0)
    present = [tuple((pair(dict(grown))["image"] > 0).flatten(1).any(1).tolist()) for _ in range(40)]
    assert all(any(p) for p in present)
    assert 20 < present.count((False, True, False, True)) < 40
    assert len(set(present)) > 4
    with pytest.raises(ValueError, match="at most 1"):
        RandSynthesizeTumord("label", modality_sets=[[0.7, ["T1"]], [0.7, ["T2"]]])
    with pytest.raises(ValueError, match="expected some of T1, T1c, T2, FLAIR"):
        RandSynthesizeTumord("label", modality_sets=[[0.7, ["PET"]]])


def test_lesions_of_age_replace_white_matter_alone(brain):
    out = RandAddLesionsd("label", prob=1.0, extent=0.2).set_random_state(seed=1)({"label": brain})["label"]
    changed = out != brain
    assert changed.any() and (out[changed] == 77).all() and (brain[changed] == 2).all()


def test_patch_is_scaled_as_the_whole_volume_whatever_the_tumour(brain):
    inside = (brain[0] > 0) & (brain[0] != 511)
    image = torch.where(brain[0] == 2, 5.0, torch.where(inside, 4.0, 0.0)) * (1 + 0.02 * torch.randn(brain[0].shape))
    whole = scale_brain(image, lower=0)
    label = torch.zeros_like(brain, dtype=torch.uint8)
    label[0, 10:30, 10:30, 10:22] = OEDEMA
    image = torch.where(label[0] > 0, 3 * image, image)
    transform = RandScaleBraind("image", jitter=0.0, prob_cut=0.0)
    out = transform({"image": torch.stack([image, torch.zeros_like(image)]), "label": label})["image"]
    healthy = inside & (label[0] == 0)
    assert (out[0] > 0)[healthy].all() and not out[1].any()
    assert float(out[0][healthy].median()) == pytest.approx(1 / 3, abs=0.04)
    assert whole.max() <= 1


def test_field_of_view_ends_for_image_and_label_alike(brain):
    data = {"image": torch.rand(2, *SIZE) + 0.1, "label": torch.ones(1, *SIZE, dtype=torch.uint8)}
    out = RandScaleBraind("image", prob_cut=1.0).set_random_state(seed=0)(data)
    gone = (out["image"] == 0).all(0)
    assert 0 < gone.sum() < gone.numel() / 2
    assert torch.equal(gone, out["label"][0] == 0)
    assert data["label"].all()


def test_smooth_noise_has_unit_spread_and_is_smooth():
    noise = smooth_noise((48, 48, 48), 4.0, torch.Generator().manual_seed(0))
    assert float(noise.std()) == pytest.approx(1, abs=0.15) and abs(float(noise.mean())) < 0.15
    assert float(noise.diff(dim=0).std()) < 0.5
