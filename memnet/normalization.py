"""Norms and leaky ReLUs that keep one activation between them."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from monai.networks.blocks import ADN
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from memnet.recompute import is_watched
from memnet.tracing import is_traced

__all__ = ["NormLeakyReLU", "activate", "run_in_place", "slabs", "wide"]


class NormLeakyReLU(ADN):
    r"""Instance norm with a learned scale and shift, then leaky ReLU.

    .. math:: y = \max(z, 0.01 z), \qquad z = \gamma \frac{x - \mathrm{mean}(x)}{\sqrt{\mathrm{var}(x) + \epsilon}} + \beta

    One module for both, since backpropagation needs :math:`x`, which the caller has anyway, and of :math:`z` the sign alone,
    which is that of :math:`y`: no :math:`z` is kept. Under autocast :math:`y` is in the lower precision, the statistics are
    not. Memory format (channels last) is preserved. Exporters see MONAI's ADN.

    Args:
        channels: channels of the input.
        spatial_dims: 1, 2 or 3.

    Raises:
        ValueError: at run time, if there is one voxel, which has no variance, or none.

    References:
        Instance normalization: the missing ingredient for fast stylization (Ulyanov et al., 2016),
        https://arxiv.org/abs/1607.08022
        In-place activated BatchNorm for memory-optimized training of DNNs (Rota Bulò et al., 2018),
        https://arxiv.org/abs/1712.02616
    """

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__(
            "NA", channels, ("leakyrelu", {"inplace": False}), ("instance", {"affine": True}), spatial_dims
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, C, ...)`` to the same shape."""
        if not torch.jit.is_scripting():
            if not is_traced():
                return self.fused(x)
        for module in self:
            x = module(x)
        return x

    @torch.jit.unused
    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """Compute both at once."""
        if x.shape[0] == 0 or math.prod(x.shape[2:]) <= 1:
            raise ValueError(f"instance norm needs more than one voxel, got an input of shape {tuple(x.shape)}")
        norm: Any = self.N
        act: Any = self.A
        return _NormLeakyReLU.apply(x, norm.weight, norm.bias, norm.eps, act.negative_slope)


class _NormLeakyReLU(torch.autograd.Function):
    """Keeps the input, which its caller keeps too, its statistics, and the output, which the next layer keeps too."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, slope: float):
        device, full = x.device.type, torch.promote_types(x.dtype, torch.float32)
        weight, bias = weight.to(full), bias.to(full)  # as batch norm keeps its statistics
        lower = x.dtype == torch.float32 and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if lower else x.dtype
        normalize = _normalize_in_slabs if _sums_are_inexact(x) else _normalize
        y, mean, scale = normalize(x, weight, bias, eps, slope, dtype)
        ctx.eps, ctx.slope = eps, slope
        ctx.save_for_backward(x, weight, mean, scale, y)
        return y

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, weight, mean, scale, y = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()
        wanted = list(ctx.needs_input_grad[:3])
        if _sums_are_inexact(x) and not torch.is_grad_enabled():  # else the gradient is to be differentiated
            return *_pull_back_in_slabs(gradient, x, weight, mean, scale, y, ctx.slope, wanted), None, None
        gradient = torch.ops.aten.leaky_relu_backward(gradient.to(x.dtype), y, ctx.slope, True)
        del y
        parts = [
            torch.ops.aten.native_batch_norm_backward(
                gradient[i : i + 1], x[i : i + 1], weight, None, None, mean[i], scale[i], True, ctx.eps, wanted
            )
            for i in range(x.shape[0])
        ]
        del gradient
        if len(parts) == 1:
            return *(part if needed else None for part, needed in zip(parts[0], wanted, strict=True)), None, None
        joins = (torch.cat, _sum, _sum)
        columns = zip(joins, zip(*parts, strict=True), wanted, strict=True)
        return *(join(column) if needed else None for join, column, needed in columns), None, None


def _normalize(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, slope: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the output, and each channel's mean and inverse standard deviation."""
    y = torch.empty_like(x)
    mean, scale = weight.new_empty(x.shape[:2]), weight.new_empty(x.shape[:2])
    for i in range(x.shape[0]):  # instance norm is batch norm of one; slices keep the memory format
        out = {"out": y[i : i + 1], "save_mean": mean[i], "save_invstd": scale[i]}
        torch.ops.aten.native_batch_norm.out(x[i : i + 1], weight, bias, None, None, True, 0.0, eps, **out)
    return torch.nn.functional.leaky_relu(y, slope, inplace=True).to(dtype), mean, scale


def _sums_are_inexact(x: torch.Tensor) -> bool:
    """Tell whether batch norm adds up one number after another: on a CPU, channels last, to errors of 1e-3 at 128^3."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not x.is_contiguous()


def _normalize_in_slabs(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, slope: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what :func:`_normalize` does."""
    dims = list(range(2, x.dim()))
    mean = x.mean(dims)
    variance = torch.zeros_like(mean)
    for part in slabs(x):
        variance += (part - wide(mean, x)).square_().sum(dims)
    scale = (variance / math.prod(x.shape[2:]) + eps).rsqrt()
    factor = weight * scale
    factor, shift = wide(factor, x), wide(bias - mean * factor, x)
    y = torch.empty_like(x, dtype=dtype)
    for part, out in zip(slabs(x), slabs(y), strict=True):
        out.copy_(torch.nn.functional.leaky_relu_(torch.addcmul(shift, part, factor), slope))
    return y, mean, scale


def _pull_back_in_slabs(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    y: torch.Tensor,
    slope: float,
    wanted: Sequence[bool],
) -> Iterator[torch.Tensor | None]:
    """Yield the gradients of input, weight and bias, None if not wanted."""
    dims = list(range(2, x.dim()))
    total, along = torch.zeros_like(mean), torch.zeros_like(mean)
    inner = torch.empty_like(x)  # the gradient of what the leaky ReLU takes
    for part, out, *given in zip(slabs(x), slabs(inner), slabs(gradient), slabs(y), strict=True):
        out.copy_(torch.ops.aten.leaky_relu_backward(*(g.to(x.dtype) for g in given), slope, True))
        total += out.sum(dims)
        along += (part - wide(mean, x)).mul_(out).sum(dims)
    along *= scale
    if wanted[0]:
        n, factor = math.prod(x.shape[2:]), weight * scale
        tilt = factor * scale * along / n
        inner.mul_(wide(factor, x)).addcmul_(x, wide(-tilt, x)).add_(wide(tilt * mean - factor * total / n, x))
    results = (inner, along.sum(0), total.sum(0))
    return (result if needed else None for result, needed in zip(results, wanted, strict=True))


def slabs(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Cut the first spatial dimension of ``(B, C, ...)``, where parts are in one piece, into up to eight or so."""
    return x.split(max(1, x.shape[2] // 8), 2)


def wide(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Give ``(B, C)`` the dimensions of ``(B, C, ...)``."""
    return values.view(*values.shape, *[1] * (x.dim() - 2))


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(parts)).sum(0)


def run_in_place(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Call a module; leaky ReLUs of a sequence write over what the layer before returned where that does not need it."""
    if type(module) is not nn.Sequential or not _is_plain(module):
        return module(x)
    for before, layer in pairwise([None, *module]):
        x = activate(layer, x, before) if _may_overwrite(before, layer) else run_in_place(layer, x)
    return x


def activate(activation: Any, x: torch.Tensor, before: nn.Module | None) -> torch.Tensor:
    """Apply an activation, over ``x`` if it may write over what the layer before it returned."""
    if _may_overwrite(before, activation):
        return _overwrite(x, activation.negative_slope)
    return activation(x)


def _may_overwrite(before: Any, after: Any) -> bool:
    if type(after) is not nn.LeakyReLU or after.negative_slope < 0 or not _is_plain(after):
        return False
    # a subclass may compute what it returns by an operation that needs it for its gradient
    is_known = isinstance(before, nn.GroupNorm | _NormBase | _ConvNd) and type(before).forward.__module__.startswith(
        "torch."
    )
    return is_known and "forward" not in vars(before) and not before._forward_hooks


def _is_plain(module: nn.Module) -> bool:
    """Tell whether calling a module does what its class does: no hooks, no other ``forward``, not compiled."""
    return not is_watched(module) and "forward" not in vars(module) and module._compiled_call_impl is None


def _overwrite(x: torch.Tensor, slope: float) -> torch.Tensor:
    return _Overwrite.apply(x, slope)


class _Overwrite(torch.autograd.Function):
    """Leaky ReLU in the memory of its input: the gradient depends on the sign alone, which input and output share.

    An in-place operation would do for autograd, too, if it were not for instance norm's output, a view, of which autograd
    then makes copies.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, slope: float) -> torch.Tensor:
        y = torch.nn.functional.leaky_relu_(x.detach(), slope)
        ctx.slope = slope
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return torch.ops.aten.leaky_relu_backward(gradient, *ctx.saved_tensors, ctx.slope, True), None
