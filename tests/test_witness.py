"""Some values of a state stand for it."""

import pytest
import torch

from memnet.witness import some_values


@pytest.mark.parametrize("shape", [(5000,), (1, 2, 4000), (2, 16, 40, 40, 40), (1, 24, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_about_a_thousand_values_from_all_over(shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    found = some_values((x,))
    parts = 2 if dtype.is_complex else 1
    assert 64 * parts <= len(found) <= 2048 * parts
    # what happens to any eighth of it is seen
    x.flatten()[-x.numel() // 8 :] += 1
    assert not torch.equal(some_values((x,)), found)


def test_the_same_values_whatever_the_strides():
    x = torch.randn(2, 8, 12, 12, 12)
    assert torch.equal(some_values((x.contiguous(memory_format=torch.channels_last_3d),)), some_values((x,)))


def test_no_tensor_with_values_to_compare():
    assert some_values((torch.arange(3), torch.zeros(0))).numel() == 0
    assert len(some_values((torch.tensor(2.0),))) == 1
