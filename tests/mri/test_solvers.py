"""Conjugate gradients: against a dense solve, past convergence, and both gradients."""

import pytest
import torch

from memnet.benchmarks.unrolled import simulated_slab
from memnet.mri.operators import SenseOperator
from memnet.mri.solvers import conjugate_gradient

N = 6


@pytest.fixture
def normal():
    factor = torch.randn(N, N, dtype=torch.complex128)
    matrix = factor @ factor.mH

    def apply(x):
        return x @ matrix.mT

    apply.matrix = matrix
    return apply


def right_side(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, N, dtype=torch.complex128)


def dense(matrix: torch.Tensor, right: torch.Tensor, mu) -> torch.Tensor:
    return torch.linalg.solve(matrix + mu * torch.eye(N), right.mT).mT


def test_it_solves(normal):
    right = right_side()
    solution = conjugate_gradient(normal, right, 0.3, 2 * N)
    torch.testing.assert_close(solution, dense(normal.matrix, right, 0.3))


def test_items_of_a_batch_do_not_see_each_other(normal):
    right = right_side(3) * torch.tensor([1.0, 1e-6, 0.0])[:, None]
    together = conjugate_gradient(normal, right, 0.3, 4)
    apart = [conjugate_gradient(normal, r[None], 0.3, 4) for r in right]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-12, atol=1e-20)


@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
def test_nothing_is_nan_past_convergence(gradient):
    # the identity is solved in one step, and a right side of zero in none
    right = torch.tensor([[1.0, 2, 3], [0, 0, 0]], requires_grad=True)
    mu = torch.tensor(1.0, requires_grad=True)
    solution = conjugate_gradient(lambda x: x, right, mu, 50, gradient=gradient)
    torch.testing.assert_close(solution, right / 2)
    solution.sum().backward()
    torch.testing.assert_close(right.grad[0], torch.full((3,), 0.5))
    assert torch.isfinite(right.grad).all()
    torch.testing.assert_close(mu.grad, torch.tensor(-1.5))


def test_it_stops_at_the_tolerance(normal):
    calls = []
    right = right_side()

    def counted(x):
        calls.append(1)
        return normal(x)

    loose = conjugate_gradient(counted, right, 0.3, 100, tolerance=0.3)
    assert 1 < len(calls) < N
    residual = right - normal(loose) - 0.3 * loose
    assert (residual.norm(dim=1) <= 0.3 * right.norm(dim=1)).all()


@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
def test_without_a_tolerance_nothing_waits_for_values(gradient):
    """On the meta device, which has none; a GPU would have to be waited for."""
    right = torch.zeros(2, N, dtype=torch.complex64, device="meta", requires_grad=True)
    x = conjugate_gradient(lambda v: 2 * v, right, 0.5, max_iterations=3, gradient=gradient)
    x.abs().sum().backward()
    assert right.grad is not None


def test_the_unrolled_gradient_is_exact_before_convergence(normal):
    right, mu = right_side().requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b, m: conjugate_gradient(normal, b, m, 3), (right, mu))


def test_the_implicit_gradient_is_exact_at_convergence(normal):
    right, mu = right_side().requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def solve(b, m):
        return conjugate_gradient(normal, b, m, 2 * N, gradient="implicit")

    assert torch.autograd.gradcheck(solve, (right, mu), atol=1e-6)


def test_both_gradients_agree_on_an_encoding_operator():
    operator = SenseOperator(torch.randn(1, 3, 8, 8, dtype=torch.complex128), torch.rand(1, 1, 8, 8) < 0.5)
    kspace = torch.randn(1, 3, 8, 8, dtype=torch.complex128)
    found = {}
    for gradient in ("unrolled", "implicit"):
        mu = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        right = operator.adjoint(kspace).requires_grad_()
        conjugate_gradient(operator.normal, right, mu, 60, 1e-13, gradient).abs().square().sum().backward()
        found[gradient] = right.grad, mu.grad
    torch.testing.assert_close(found["unrolled"], found["implicit"], rtol=1e-6, atol=1e-8)


def test_the_implicit_gradient_keeps_the_solution_alone(normal):
    saved = []
    right = right_side().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        solution = conjugate_gradient(normal, right, torch.tensor(0.3), 5, gradient="implicit")
    assert [x.shape for x in saved if x.dim()] == [solution.shape]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_iterations": 0}, "max_iterations"), ({"tolerance": -1.0}, "tolerance"), ({"gradient": "none"}, "'none'")],
)
def test_bad_arguments_are_refused(normal, arguments, message):
    with pytest.raises(ValueError, match=message):
        conjugate_gradient(normal, right_side(), 0.3, **arguments)


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value, tolerance):
    right = torch.tensor([[value, 1.0], [1.0, 2.0]])
    solution = conjugate_gradient(lambda x: x, right, 1.0, 5, tolerance)
    assert solution[0].isnan().all()
    torch.testing.assert_close(solution[1], right[1] / 2)


@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
def test_float32_solves_do_not_underflow_past_convergence(gradient):
    """Of one coil the operator has two eigenvalues: two iterations converge, and further ones square ever smaller numbers."""
    torch.manual_seed(0)
    csm, mask = torch.ones(1, 1, 64, 64, dtype=torch.complex64), torch.rand(1, 1, 1, 64) > 0.5
    sense, double = SenseOperator(csm, mask), SenseOperator(csm.to(torch.complex128), mask)
    right = torch.randn(1, 64, 64, dtype=torch.complex64, requires_grad=True)
    mu = torch.tensor(0.05, requires_grad=True)
    x = conjugate_gradient(sense.normal, right, mu, 12, gradient=gradient)
    x.abs().square().sum().backward()
    exact = conjugate_gradient(double.normal, right.detach().to(torch.complex128), 0.05, 3)
    assert float((x.detach() - exact).norm() / exact.norm()) < 1e-5
    assert bool(right.grad.isfinite().all()) and bool(mu.grad.isfinite())


def test_the_gradient_of_many_float32_iterations_is_that_of_float64():
    """It converges after the solution does, so that iterations must not stop with that."""
    torch.manual_seed(0)
    kspace, csm, mask = simulated_slab((1, 24, 24), n_coils=4)
    right = SenseOperator(csm, mask).adjoint(kspace).to(torch.complex128)
    weight = torch.randn_like(right)
    found = []
    for kind in (torch.complex64, torch.complex128):
        b = right.to(kind).requires_grad_()
        x = conjugate_gradient(SenseOperator(csm.to(kind), mask).normal, b, 0.05, 40)
        (x * weight.to(kind)).real.sum().backward()
        found.append(b.grad)
    assert (found[0] - found[1]).norm() < 1e-5 * found[1].norm()
