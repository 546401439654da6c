"""Sampling masks: as many samples as asked for, spread as they should be, the same from the same seed."""

import numpy as np
import pytest
import torch

from memnet.mri.sampling import GoldenRatioMask, PoissonDiscMask, golden_ratio_lines, poisson_disc


def random(seed: int = 0) -> np.random.RandomState:
    return np.random.RandomState(seed)


@pytest.mark.parametrize(("shape", "acceleration"), [((48, 40), 4.0), ((31, 45), 6.5)])
def test_poisson_disc_takes_exactly_its_share_and_the_centre_whole(shape, acceleration):
    mask = poisson_disc(shape, acceleration, 8, random())
    assert mask.sum() == round(mask.size / acceleration)
    y, z = (n // 2 - 4 for n in shape)
    assert mask[y : y + 8, z : z + 8].all()
    # the corners beyond the ellipse
    assert not mask[0, 0] and not mask[-1, -1]


def test_poisson_discs_lie_apart_and_farther_apart_outside():
    mask = poisson_disc((64, 64), 8, 0, random())
    y, z = np.argwhere(mask).T
    separation = np.hypot(y[:, None] - y, z[:, None] - z) + 99 * np.eye(len(y))
    nearest = separation.min(1)
    radius = np.hypot(y - 32, z - 32)
    assert nearest[radius > 22].mean() > 1.5 * nearest[radius < 12].mean()
    # random samples as many as these would have a neighbour at distance 1 in more than a third of the cases
    assert (nearest[radius > 16] < 2).mean() < 0.02


def test_masks_follow_their_seed():
    draws = [poisson_disc((24, 24), 4, 6, random(seed)) for seed in (1, 1, 2)]
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()


def test_golden_ratio_lines_are_as_many_in_every_frame_and_all_together():
    lines = golden_ratio_lines(16, 64, 8, 2, random())
    assert (lines.sum(1) == 8).all()
    assert lines[:, 31:33].all()
    assert lines.any(0).mean() > 0.9
    assert (lines[0] != lines[1]).any()
    # denser at the centre
    assert lines[:, 20:44].mean() > 1.3 * lines[:, np.r_[:20, 44:64]].mean()


@pytest.mark.parametrize(
    ("n_lines", "n_drawn"), [(200, 21), (136, 13), (160, 16), (96, 8), (304, 34), (120, 11), (48, 5)]
)
def test_golden_ratio_lines_cover_kspace_whatever_their_number(n_lines, n_drawn):
    lines = golden_ratio_lines(20, n_lines, n_lines / (n_drawn + 4), 4, random())
    assert lines.any(0).mean() > 0.9
    drawn = lines & ~lines.all(0)
    repeated = (drawn[1:] & drawn[:-1]).sum() / drawn[1:].sum()
    assert repeated < 0.1


@pytest.mark.parametrize("draw", [lambda a: poisson_disc((16, 16), a, 6), lambda a: golden_ratio_lines(3, 16, a, 4)])
@pytest.mark.parametrize("acceleration", [1.0 / 2, 12.0])
def test_impossible_accelerations_are_refused(draw, acceleration):
    with pytest.raises(ValueError, match=f"acceleration {acceleration:g}"):
        draw(acceleration)


@pytest.mark.parametrize(
    ("mask", "shape"), [(PoissonDiscMask([3.0], 4), (1, 1, 16, 12)), (GoldenRatioMask([3.0], 2), (1, 5, 1, 12))]
)
def test_masks_are_monais(mask, shape):
    kspace = torch.randn(2, 5, 16, 12, dtype=torch.complex64)
    left, drawn = mask.set_random_state(seed=3)(kspace)
    assert drawn.shape == shape and drawn.dtype == torch.bool
    assert torch.equal(left != 0, drawn.expand_as(kspace))
    again = mask.set_random_state(seed=3)(kspace)[1]
    assert torch.equal(again, drawn)
