"""What of a network's output is kept."""

import pytest
import torch
from monai.data import MetaTensor

from memnet.transforms.predictions import KeepLargePiecesd, KeepLogitsd


def test_pieces_stay_by_their_size_whatever_their_labels():
    labels = torch.zeros(1, 12, 8, 8, dtype=torch.uint8)
    labels[0, :4, :4, :4] = 2
    labels[0, 1:3, 1:3, 1:3] = 3
    labels[0, 6:8, 6:8, 6:8] = 1
    labels[0, 11, 0, 0] = 2
    expected = labels.clone()
    expected[0, 11] = 0
    kept = KeepLargePiecesd("pred", share=0.1)({"pred": MetaTensor(labels)})["pred"]
    assert isinstance(kept, MetaTensor) and kept.dtype == torch.uint8 and torch.equal(kept.as_tensor(), expected)
    assert torch.equal(KeepLargePiecesd("pred", share=0.0)({"pred": labels})["pred"], labels)
    assert (KeepLargePiecesd("pred", share=1.0)({"pred": labels})["pred"] > 0).sum() == 64
    empty = torch.zeros_like(labels)
    assert torch.equal(KeepLargePiecesd("pred")({"pred": empty})["pred"], empty)
    with pytest.raises(ValueError, match="between 0 and 1"):
        KeepLargePiecesd("pred", share=3)


def test_logits_are_kept() -> None:
    logits = torch.rand(4, 2, 2, 2)
    assert KeepLogitsd("pred")({"pred": (logits, torch.zeros(2))})["pred"] is logits
    assert KeepLogitsd("pred")({"pred": logits})["pred"] is logits
