"""Scaling of intensities; of skull-stripped brains the same comes out however the file was normalised before."""

import pytest
import torch
from monai.data import MetaTensor
from torch.nn import functional

from memnet.transforms.intensity import ScaleBraind, ScaleModalitiesd, scale_brain, zero_background


@pytest.fixture
def brain() -> torch.Tensor:
    """A ball of positive values in zeros, ``(1, 32, 32, 32)``."""
    axis = torch.arange(32) - 15.5
    ball = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2 < 169
    return (ball * (100 + 20 * torch.randn(32, 32, 32)).clamp(min=1))[None]


@pytest.mark.parametrize("normalise", [lambda x: 7 * x, lambda x: (x - x.mean()) / x.std(), "brain alone"])
def test_scaled_brain_does_not_depend_on_the_file_s_normalisation(brain, normalise):
    expected = ScaleBraind("image")({"image": zero_background(brain)})["image"]
    inside = brain > 0
    if normalise == "brain alone":
        # as nnU-Net does: the background stays 0, between the brain's values
        changed = torch.where(inside, (brain - brain[inside].mean()) / brain[inside].std(), 0.0)
    else:
        changed = normalise(brain)
    image = ScaleBraind("image")({"image": zero_background(MetaTensor(changed))})["image"]
    assert isinstance(image, MetaTensor)
    assert torch.allclose(image.as_tensor(), expected, atol=0.01)  # the least voxel may become background
    assert (image[~inside] == 0).all() and image[inside].median() == pytest.approx(1 / 3, abs=0.01)


def test_bright_tumour_does_not_move_the_rest(brain):
    expected = scale_brain(brain[0])
    changed = brain.clone()
    changed[0, 7:9, 7:9, 7:9] *= 10
    image = scale_brain(changed[0])
    rest = torch.ones(32, 32, 32, dtype=torch.bool)
    rest[7:9, 7:9, 7:9] = False
    assert (image - expected)[rest].abs().max() < 0.01
    assert image.max() == 1


def test_missing_channel_stays_empty_and_noise_is_no_background(brain):
    image = ScaleBraind("image")({"image": torch.cat([brain, torch.zeros_like(brain)])})["image"]
    assert (image[1] == 0).all() and (image[0] > 0).any()
    noise = torch.randn(1, 8, 8, 8)
    assert (zero_background(noise) == noise - noise.min()).all()


@pytest.mark.parametrize("margin", [2, 20, 60])
def test_scaling_of_a_small_brain_in_a_large_field_of_view(margin: int, recwarn: pytest.WarningsRecorder) -> None:
    """Its values were a hundred times too large, and a warning of a division by zero went with them."""
    brain = torch.rand(1, 20, 20, 20) + 0.5
    image = functional.pad(brain, [margin] * 6)
    scaled = ScaleModalitiesd("image")({"image": image})["image"]
    assert scaled.min() >= 0 and scaled.max() == 1 and not recwarn.list
    assert scaled[scaled > 0].median() == pytest.approx(1 / 1.5, abs=0.06)


def test_scaling_fills_the_unit_range_and_leaves_a_missing_channel(recwarn: pytest.WarningsRecorder) -> None:
    image = MetaTensor(torch.stack([torch.rand(12, 12, 12) * 500 - 100, torch.zeros(12, 12, 12)]))
    scaled = ScaleModalitiesd("image")({"image": image})["image"]
    assert scaled[0].min() == 0 and scaled[0].max() == 1
    assert not scaled[1].any() and not len(recwarn)
    torch.testing.assert_close((scaled[0] == 1).float().mean(), torch.tensor(0.005), atol=2e-3, rtol=0)
    assert image[0].max() > 300  # the input stays
