"""Removal of what was taken for brain elsewhere in the head, and filling of what a stripped scan shows."""

import torch
from monai.data import MetaTensor

from memnet.transforms.brain import FillStrippedd, KeepBraind


def scores(labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels.long(), 4).permute(3, 0, 1, 2).float()


def head() -> torch.Tensor:
    """A brain of white and grey matter, fluid about it, and a separate piece of grey matter in the neck."""
    labels = torch.zeros(48, 40, 40)
    labels[16:46, 4:36, 4:36] = 1
    labels[18:44, 6:34, 6:34] = 2
    labels[22:40, 10:30, 10:30] = 3
    return labels


def test_a_clean_brain_is_left_as_it_is():
    clean = scores(head())
    assert torch.equal(KeepBraind("pred")({"pred": clean})["pred"], clean)


def test_a_separate_or_thinly_connected_piece_is_removed():
    labels = head()
    labels[0:9, 14:26, 14:26] = 2
    labels[9:18, 19:21, 19:21] = 2
    kept = KeepBraind("pred")({"pred": scores(labels)})["pred"].argmax(0)
    assert (kept[:9] == 0).all()
    assert torch.equal(kept[22:], labels[22:].long())


def test_metadata_and_the_input_stay():
    labels = head()
    labels[0:9, 14:26, 14:26] = 2
    given = MetaTensor(scores(labels), affine=torch.diag(torch.tensor([2.0, 1, 1, 1])))
    before = given.as_tensor().clone()
    out = KeepBraind("pred")({"pred": given})["pred"]
    assert isinstance(out, MetaTensor) and torch.equal(out.affine, given.affine)
    assert torch.equal(given.as_tensor(), before)


def test_nothing_that_is_brain_gives_nothing():
    empty = scores(torch.zeros(8, 8, 8))
    assert torch.equal(KeepBraind("pred")({"pred": empty})["pred"], empty)


def test_everything_left_in_a_stripped_scan_becomes_tissue_and_black_becomes_background():
    labels = head()
    image = torch.stack([(labels > 0).float() * 0.5, torch.zeros_like(labels)])
    found = labels.clone()
    found[16:18] = 0  # a rim that was missed
    found[:2, :2, :2] = 2  # tissue where there is nothing
    filled = FillStrippedd("pred")({"pred": scores(found), "image": image})["pred"].argmax(0)
    assert torch.equal(filled > 0, labels > 0)
    assert torch.equal(filled[18:], labels[18:].long())


def test_a_whole_head_is_left_as_it_is():
    given = scores(head())
    out = FillStrippedd("pred")({"pred": given, "image": torch.full((2, 48, 40, 40), 0.5)})["pred"]
    assert torch.equal(out, given)


def test_islands_are_removed_though_the_brain_is_the_only_large_piece():
    labels = head()
    labels[2:7, 16:21, 16:21] = 2
    kept = KeepBraind("pred")({"pred": scores(labels)})["pred"].argmax(0)
    assert torch.equal(kept, head().long())
