"""Bounds on operator norms: against the matrix of the convolution, and against what the whole branch does."""

import pytest
import torch
from torch import nn

from memnet.nets.contraction import OperatorNormBound, contract, refresh


def matrix_norm(convolution: nn.Module, *sides: int) -> float:
    """Operator norm of a convolution without its bias, by singular values of its matrix."""
    units = torch.eye(convolution.in_channels * torch.Size(sides).numel(), dtype=torch.float64)
    images = units.view(-1, convolution.in_channels, *sides)
    bias = 0 if convolution.bias is None else convolution.bias.view(-1, *[1] * len(sides))
    return torch.linalg.matrix_norm((convolution(images) - bias).flatten(1), 2).item()


@pytest.mark.parametrize("padding_mode", ["zeros", "replicate", "circular"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_norm_is_that_of_the_matrix(kind, padding_mode):
    dims = int(kind.__name__[4])
    convolution = kind(2, 3, 3, padding=1, padding_mode=padding_mode).double()
    before = matrix_norm(convolution, *[4] * dims)
    bound = OperatorNormBound(convolution, 0.5 * before, size=4, n_iterations=500)
    nn.utils.parametrize.register_parametrization(convolution, "weight", bound)
    assert matrix_norm(convolution, *[4] * dims) == pytest.approx(0.5 * before, rel=5e-3)


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_what_is_within_the_bound_stays_as_it_is(factor):
    convolution = nn.Conv2d(2, 2, 3, padding=1)
    nn.init.constant_(convolution.weight, 0.1 * factor)
    weight = convolution.weight.detach().clone()
    contract(convolution, 100.0)
    refresh(convolution)
    assert torch.equal(convolution.weight, weight)
    convolution(torch.ones(1, 2, 4, 4)).sum().backward()
    assert torch.isfinite(convolution.parametrizations.weight.original.grad).all()


def test_the_branch_stays_a_contraction_when_training_makes_its_weights_large():
    convolutions = [nn.Conv2d(a, b, 3, padding=1, padding_mode="replicate") for a, b in ((2, 4), (4, 2))]
    branch = contract(nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1]), 0.8)
    with torch.no_grad():
        for p in branch.parameters():
            p.mul_(4 + torch.rand_like(p))
        convolutions[0].bias.fill_(100.0)  # opens the ReLUs, where the branch is steepest
    for _ in range(100):
        refresh(branch)
    jacobian = torch.autograd.functional.jacobian(branch, torch.randn(1, 2, 8, 8)).view(128, 128)
    assert 0.3 < torch.linalg.matrix_norm(jacobian, 2) < 0.801


def test_gradients_are_those_of_finite_differences():
    convolution = nn.Conv2d(2, 2, 3, padding=1).double()
    bound = OperatorNormBound(convolution, 0.1, size=4)
    assert torch.autograd.gradcheck(bound, convolution.weight.detach().requires_grad_())


@pytest.mark.parametrize(
    "module", [nn.BatchNorm2d(2), nn.Sequential(nn.Conv2d(2, 2, 3, stride=2)), nn.Sequential(nn.PReLU())]
)
def test_what_cannot_be_bounded_is_refused(module):
    with pytest.raises(ValueError, match="cannot bound"):
        contract(module, 0.9)


def test_a_weight_of_zeros_leaves_the_direction() -> None:
    """It has no norm to search for; a direction that became NaN would stay so."""
    convolution = nn.Conv3d(2, 2, 3, padding=1)
    contract(convolution, 0.9)
    part = convolution.parametrizations.weight[0]
    before = part.direction.clone()
    part.refresh(torch.zeros_like(convolution.weight))
    assert torch.equal(part.direction, before)
