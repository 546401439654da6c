"""Bounds a residual branch's Lipschitz constant, so that iterating it inverts what it is added to."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

__all__ = ["OperatorNormBound", "contract", "refresh"]

_CONVOLUTIONS: dict[type, Callable[..., torch.Tensor]] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_NO_EXPANSIONS = (nn.ReLU, nn.Tanh, nn.Softplus, nn.Identity)


class OperatorNormBound(nn.Module):
    r"""Parametrization that bounds a convolution's operator norm: :math:`W \leftarrow W / \max(1, \lVert W v \rVert / b)`.

    The norm is that of the map from images to images, padding included. :math:`v`, a buffer, comes of power iterations through
    the convolution and its adjoint on an image of fixed size; that on larger ones was up to 3 % more for random weights.
    The norm of the kernel reshaped to a matrix, which ``torch.nn.utils.parametrizations.spectral_norm`` bounds, is another one,
    up to :math:`\sqrt{k}` times smaller for kernels of k samples. Between two calls of :meth:`refresh` the map from W is fixed
    and smooth, so that a computation can be repeated and differentiated.

    Args:
        convolution: the convolution, without stride.
        bound: :math:`b`.
        size: side of the image, voxels.
        n_iterations: power iterations to begin with.

    References:
        Invertible residual networks (Behrmann et al., 2019), https://arxiv.org/abs/1811.00995
        Regularisation of neural networks by enforcing Lipschitz continuity (Gouk et al., 2021),
        https://arxiv.org/abs/1804.04368
    """

    direction: torch.Tensor

    def __init__(self, convolution: _ConvNd, bound: float, size: int = 8, n_iterations: int = 50) -> None:
        super().__init__()
        self.convolve, weight = _CONVOLUTIONS[type(convolution)], convolution.weight
        self.padding = list(convolution._reversed_padding_repeated_twice)
        self.mode = {"zeros": "constant"}.get(convolution.padding_mode, convolution.padding_mode)
        self.dilation, self.groups, self.bound = convolution.dilation, convolution.groups, bound
        shape = (1, convolution.in_channels, *[size] * (weight.dim() - 2))
        generator = torch.Generator("cpu").manual_seed(0)
        v = torch.randn(shape, generator=generator, device="cpu").to(weight)
        self.register_buffer("direction", v / v.norm())
        self.refresh(weight, n_iterations)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight whose operator norm is at most the bound."""
        with _full_precision(weight):
            norm = self._apply_to(self.direction.clone(), weight).norm()
            return weight / (norm / self.bound).clamp(min=1)

    def refresh(self, weight: torch.Tensor, n_iterations: int = 1) -> None:
        """Make power iterations with a weight as it is before it is bounded."""
        if weight.is_meta:
            return
        weight = weight.detach()
        with _full_precision(weight), torch.enable_grad():
            for _ in range(n_iterations):
                v = self.direction.clone().requires_grad_()
                u = self._apply_to(v, weight)
                (v,) = torch.autograd.grad(u, v, u.detach())
                norm = v.norm()
                # anew, since calls that are not differentiated yet may need it as it was
                self.direction = torch.where(norm > 0, v / norm, self.direction)

    def _apply_to(self, v: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.convolve(F.pad(v, self.padding, self.mode), weight, dilation=self.dilation, groups=self.groups)


def _full_precision(x: torch.Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def contract(module: nn.Module, lipschitz: float) -> nn.Module:
    """Bound the Lipschitz constant of a chain of convolutions by the product of its operator norms, in place.

    Args:
        module: a ``Sequential`` of convolutions without stride and activations whose slope is at most 1, or one convolution.
        lipschitz: the bound, above 0; below 1 for a contraction. Each convolution gets the same share.

    Returns:
        The module; its state has the weights before they are bounded and one buffer more for each convolution.

    Raises:
        ValueError: the bound is not above 0, or the module has other parts.
    """
    if not lipschitz > 0:
        raise ValueError(f"lipschitz must be above 0, got {lipschitz}")
    convolutions = list(_convolutions(module))
    for convolution in convolutions:
        bound = OperatorNormBound(convolution, lipschitz ** (1 / len(convolutions)))
        parametrize.register_parametrization(convolution, "weight", bound)
    return module


def refresh(module: nn.Module) -> None:
    """Make a power iteration with each weight that :func:`contract` has bounded, as before a step of training."""
    for part in module.modules():
        if isinstance(part, parametrize.ParametrizationList) and isinstance(part[0], OperatorNormBound):
            part[0].refresh(part.original)


def _convolutions(module: nn.Module) -> Iterator[_ConvNd]:
    if isinstance(module, nn.Sequential):
        for part in module:
            yield from _convolutions(part)
    elif isinstance(module, _ConvNd) and type(module) in _CONVOLUTIONS and set(module.stride) == {1}:
        yield module
    elif not isinstance(module, _NO_EXPANSIONS):
        known = ", ".join(kind.__name__ for kind in _NO_EXPANSIONS)
        raise ValueError(f"cannot bound {module}: expected convolutions of stride 1 and {known}, one after another")
