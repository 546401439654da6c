"""Instance norm and leaky ReLU in one: MONAI's results, and fewer activations kept."""

import copy

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.blocks import ADN
from torch import nn

from memnet.normalization import NormLeakyReLU, run_in_place


def _pair(channels=3, spatial_dims=3):
    fused = NormLeakyReLU(channels, spatial_dims)
    plain = ADN("NA", channels, "leakyrelu", ("instance", {"affine": True}), norm_dim=spatial_dims)
    for p in fused.parameters():
        nn.init.normal_(p)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def _gradients(module, x):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    y.float().sin().sum().backward()
    return y.detach(), {"x": x.grad} | {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_equals_monais_layers(spatial_dims, batch):
    fused, plain = _pair(3, spatial_dims)
    x = torch.randn(batch, 3, *(4, 5, 6)[:spatial_dims])
    (y, gradients), (expected, expected_gradients) = _gradients(fused, x), _gradients(plain, x)
    assert torch.equal(y, expected)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("batch", [1, 2])
def test_gradient_is_that_of_finite_differences(batch):
    fused = _pair(2, 1)[0].double()
    x = torch.randn(batch, 2, 5, dtype=torch.float64, requires_grad=True)

    def run(x, weight, bias):
        return torch.func.functional_call(fused, {"N.weight": weight, "N.bias": bias}, x)

    assert torch.autograd.gradcheck(run, (x, *fused.parameters()))
    assert torch.autograd.gradgradcheck(run, (x, *fused.parameters()))


def test_memory_format_is_preserved():
    fused, x = _pair()[0], torch.randn(2, 3, 4, 5, 6)
    last = x.to(memory_format=torch.channels_last_3d)
    (y, gradients), (expected, expected_gradients) = _gradients(fused, last), _gradients(copy.deepcopy(fused), x)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert gradients["x"].is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients["x"], expected_gradients["x"])


def test_statistics_are_exact_channels_last():
    """PyTorch's batch norm is wrong by 5e-4 here: it adds up one voxel after another."""
    fused, x = _pair()[0], torch.randn(1, 3, 64, 64, 64) + 1
    last = x.to(memory_format=torch.channels_last_3d)
    (y, gradients), (expected, expected_gradients) = _gradients(fused, last), _gradients(fused.double(), x.double())
    for value, exact in ((y, expected), (gradients["x"], expected_gradients["x"])):
        assert (value - exact).norm() < 3e-7 * exact.norm()


def test_second_derivatives_channels_last():
    fused, x = _pair()[0], torch.randn(2, 3, 4, 5, 6)

    def second(x):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(fused(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    expected = second(x.clone())
    torch.testing.assert_close(second(x.to(memory_format=torch.channels_last_3d)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_input_of_lower_precision(parameters):
    fused, plain = _pair()
    x = torch.randn(2, 3, 4, 5, 6)
    y, gradients = _gradients(fused.to(parameters), x.bfloat16())
    expected, expected_gradients = _gradients(plain, x)
    assert y.dtype == gradients["x"].dtype == torch.bfloat16 and gradients["N.weight"].dtype == parameters
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(gradients["x"].float(), expected_gradients["x"], rtol=0.1, atol=0.05)


def test_keeps_its_output_and_nothing_else_of_its_size():
    fused, kept, x = _pair()[0], [], torch.randn(1, 3, 4, 4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = fused(x)
    assert {t.data_ptr() for t in kept if t.numel() == x.numel()} == {x.data_ptr(), y.data_ptr()}


def test_lower_precision_under_autocast():
    fused, plain = _pair()
    x = torch.randn(1, 3, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y, gradients = _gradients(fused, x)
    assert y.dtype == torch.bfloat16
    expected, expected_gradients = _gradients(plain, x)
    assert torch.equal(y, expected.bfloat16())
    torch.testing.assert_close(gradients, expected_gradients, rtol=0.02, atol=0.02)


def test_frozen_parameters_get_no_gradient():
    fused = _pair()[0]
    fused.N.weight.requires_grad_(False)
    _, gradients = _gradients(fused, torch.randn(2, 3, 4, 4, 4))
    assert gradients["N.weight"] is None and gradients["N.bias"] is not None and gradients["x"] is not None


def test_metatensor_stays_one():
    x = MetaTensor(torch.randn(1, 3, 4, 4, 4), affine=2 * torch.eye(4))
    assert torch.equal(_pair()[0](x).affine, x.affine)


def test_one_voxel_is_refused():
    with pytest.raises(ValueError, match=r"more than one voxel.*\(1, 3, 1, 1\)"):
        _pair(3, 2)[0](torch.zeros(1, 3, 1, 1))


class Squashed(nn.Conv1d):
    """Its output is needed for its gradient."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


def test_activations_write_over_nothing_that_is_not_theirs():
    """Of a subclass that needs its output, of a method that was replaced, of what was compiled."""
    x = torch.randn(1, 2, 8)
    subclass = nn.Sequential(Squashed(2, 2, 1), nn.LeakyReLU(0.2))
    patched = nn.Sequential(nn.Conv1d(2, 2, 1), nn.LeakyReLU(0.2))
    patched[1].forward = lambda t: 5 * t
    outer = nn.Sequential(nn.Conv1d(2, 2, 1), nn.LeakyReLU(0.2))
    outer.forward = lambda t: 7 * t
    compiled, calls = nn.Sequential(nn.Conv1d(2, 2, 1), nn.LeakyReLU(0.2)), []
    compiled._compiled_call_impl = lambda t: [calls.append(1), compiled.forward(t)][1]
    for module in (subclass, patched, outer, compiled):
        (expected, wanted), (found, got) = (_through(run, module, x) for run in (type(module).__call__, run_in_place))
        assert torch.equal(found, expected) and torch.equal(got, wanted)
    assert len(calls) == 2


def _through(run, module, x):
    x = x.clone().requires_grad_()
    y = run(module, x)
    y.square().sum().backward()
    return y.detach(), x.grad
