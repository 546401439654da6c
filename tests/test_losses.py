"""The paper's loss."""

import pytest
import torch
from monai.losses import DiceLoss
from torch.nn import functional

from memnet import InvResLoss


@pytest.fixture
def example():
    return torch.randn(2, 4, 5, 6), torch.randint(0, 4, (2, 1, 5, 6))


def test_is_cross_entropy_and_dice(example):
    logits, labels = example
    dice = DiceLoss(to_onehot_y=True, softmax=True, include_background=False)(logits, labels)
    expected = functional.cross_entropy(logits, labels[:, 0]) + dice
    torch.testing.assert_close(InvResLoss()(logits, labels), expected)


def test_adds_a_tenth_of_each_regularisation(example):
    logits, labels = example
    regularisation = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    loss = InvResLoss()
    expected = loss(logits, labels) + 0.1 * 2.0 + 0.1 * 20.0
    torch.testing.assert_close(loss((logits, regularisation), labels), expected)


def test_weights_of_the_regularisation(example):
    logits, labels = example
    loss = InvResLoss(lambda_l2=0.0, lambda_kl=2.0)
    expected = loss(logits, labels) + 2.0 * 5.0
    torch.testing.assert_close(loss((logits, torch.tensor([[7.0, 5.0]])), labels), expected)


def test_vanishes_for_a_right_and_certain_prediction():
    labels = torch.randint(0, 4, (1, 1, 6, 6))
    logits = 50.0 * functional.one_hot(labels[:, 0], 4).permute(0, 3, 1, 2)
    assert InvResLoss()(logits, labels) < 1e-3


def test_half_precision_logits_are_summed_in_float32(example):
    logits, labels = example
    assert InvResLoss()(logits.bfloat16(), labels).dtype == torch.float32


def test_gradient_reaches_logits_and_regularisation(example):
    logits, labels = example
    prediction = logits.requires_grad_(), torch.rand(2, 2, requires_grad=True)
    InvResLoss()(prediction, labels).backward()
    assert logits.grad.abs().sum() > 0
    torch.testing.assert_close(prediction[1].grad, torch.full((2, 2), 0.05))
