"""Computes and differentiates a module tile by tile, so that one tile's activations are alive at a time."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from monai.data import MetaTensor
from monai.utils import ensure_tuple
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd

from memnet.metadata import plain_tensor
from memnet.normalization import NormLeakyReLU, activate, slabs, wide
from memnet.recompute import Gradients, Replay, accumulate, replay_with_grad
from memnet.tracing import is_traced

__all__ = ["Tile", "TiledCall", "require_tileable", "run_in_tiles"]

Tile = Sequence[int] | Literal["auto"]
"""Voxels of a tile along each of the last dimensions, 0 for all, or ``auto``: about an eighth of the volume, cut along the first
dimension, where slabs are in one piece. If they were so thin that PyTorch's convolution on a CPU fell to its slow kernel, they
are cut along the last, which that kernel's choice does not look at.
"""

_N_SLABS = (8, 7, 6)  # the most that have no slow kernel
_LEAST_SLAB = 4  # voxels
_SLOW_BELOW = 20480  # channels * depth * height of one float32 volume up to which PyTorch unfolds it for a convolution

Slices = tuple[Any, ...]  # of an ellipsis and slices
_POINTWISE = (nn.LeakyReLU, nn.ReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Identity)


def run_in_tiles(module: nn.Module, x: torch.Tensor, halo: int, size: Sequence[int]) -> torch.Tensor:
    """Apply a module whose output depends on a neighbourhood of the input alone in tiles, with the halo they need.

    Output and gradients are the module's own to rounding, at the image's border, too, where the module's padding acts.
    Backpropagation keeps the input, and computes each tile again. Norms see more than a neighbourhood (but see
    :class:`TiledCall`), and what changes the resolution sees another one in a tile that begins elsewhere.

    Args:
        module: from ``(B, C, *dims)`` to ``(B, C', *dims)``.
        x: its input.
        halo: how far the neighbourhood reaches in each direction, voxels: the sum of the radii of the module's kernels.
        size: voxels of a tile along each of the last ``len(size)`` dimensions, 0 for all; a last tile that would be smaller
            than the halo joins the one before.

    Returns:
        The module's output.

    Raises:
        ValueError: ``halo`` or ``size`` is negative, there are more sizes than dimensions, a convolution pads one side with the
            other (``padding_mode="circular"``), or the module has a norm or softmax over the image or the batch, a stride or
            another change of resolution.
    """
    call = TiledCall(module, x.shape, size, halo)
    if len(call) == 1 or is_traced():
        return module(x)
    for part in module.modules():
        _require_local(part)
    parameters = list(module.parameters())
    y = _Tiled.apply(call, parameters, plain_tensor(x), *parameters)
    return MetaTensor(y).copy_meta_from(x) if isinstance(x, MetaTensor) else y


def _require_local(part: nn.Module) -> None:
    """Refuse a layer whose output in a tile is another than in the whole image."""
    if getattr(part, "padding_mode", None) == "circular":
        raise ValueError(
            'a convolution with padding_mode="circular" sees the other side of the image, which a tile lacks'
        )
    name = type(part).__name__
    if isinstance(part, nn.GroupNorm | _InstanceNorm) and not (
        isinstance(part, _InstanceNorm) and part.track_running_stats and not part.training
    ):
        raise ValueError(f"{name} sees the whole image, a tile would be normalised by what is in it alone")
    if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
        raise ValueError(f"{name} in training sees the whole image, a tile would be normalised by what is in it alone")
    if isinstance(part, nn.LayerNorm | nn.LocalResponseNorm) or (
        isinstance(part, nn.Softmax | nn.LogSoftmax | nn.Softmin) and part.dim != 1
    ):
        raise ValueError(f"{name} sees more of the image than a tile has")
    strides = getattr(part, "stride", 1)
    if isinstance(
        part, nn.Upsample | nn.PixelShuffle | nn.PixelUnshuffle | _AdaptiveAvgPoolNd | _AdaptiveMaxPoolNd
    ) or any(s != 1 for s in ensure_tuple(strides) if isinstance(s, int)):
        raise ValueError(f"{name} changes the resolution, by what depends on where a tile begins")


def require_tileable(branch: nn.Module) -> None:
    """Refuse a branch that :class:`TiledCall` cannot take apart.

    Raises:
        ValueError: it is no sequence of one instance or group norm, if any, convolutions that keep the size, and activations.
    """
    _split(branch, 0)


class TiledCall:
    r"""One call of a module in tiles, to be repeated and differentiated tile by tile.

    Without a ``halo`` the module is a sequence of an instance or group norm (or none), convolutions that keep the size, and
    activations. Of the norm a tile needs no more than each channel's mean and variance, two passes over the input; and their
    gradients, which all tiles add to, reach the input in a pass of its own:

    .. math:: \bar x = \gamma \sigma^{-1} \bar z - \sigma^{-1} (m_1 + \hat x m_2), \qquad
        m_1 = \mathrm{mean}(\gamma \bar z), \quad m_2 = \mathrm{mean}(\gamma \bar z \hat x)

    for :math:`z = \gamma \hat x + \beta`, means over the voxels, and the channels of a group.

    Args:
        module: from ``(B, C, *dims)`` to ``(B, C', *dims)``.
        shape: of its input.
        size: see :data:`Tile`; a last tile that would be smaller than the halo joins the one before.
        halo: how far an output sees, voxels; None to take the module apart.

    Raises:
        ValueError: a size is negative, there are more sizes than dimensions, or the module cannot be taken apart.
    """

    def __init__(self, module: nn.Module, shape: Sequence[int], size: Tile, halo: int | None = None) -> None:
        self._module = module
        self._norm: nn.Module | None = None
        self._layers: list[nn.Module] | None = None
        n_dims = len(shape) - 2
        self._halos = [halo or 0] * n_dims
        if halo is None:
            self._norm, self._layers, self._halos = _split(module, n_dims)
        if size == "auto":
            self._tiles = list(_tiles(_automatic_starts(shape, self._halos), shape, self._halos))
        else:
            if (halo or 0) < 0 or min(size, default=0) < 0 or len(size) > n_dims:
                raise ValueError(
                    f"expected halo and up to {n_dims} sizes not to be negative, got {halo} and {tuple(size)}"
                )
            self._tiles = list(_tiles(_starts(shape, self._halos, size), shape, self._halos))
        self._normalization: _Normalization | None = None
        self._replays: list[Replay] = []

    def __len__(self) -> int:
        return len(self._tiles)

    def first(self, x: torch.Tensor) -> Iterator[tuple[Slices, torch.Tensor]]:
        """Compute the tiles one after another: yield each one's place in the output, and its output."""
        if self._norm is not None:
            self._normalization = _Normalization(self._norm, x)
        for outer, inner, place in self._tiles:
            replay = Replay(self._part(outer, inner))
            self._replays.append(replay)
            (part,) = replay.first(_cut(x, outer), *self._affine)
            yield inner, part[_crop(part, place)]

    def pull_back(
        self,
        x: torch.Tensor,
        gradient: torch.Tensor,
        x_gradient: torch.Tensor | None,
        receive: Callable[[Slices, torch.Tensor], None] | None = None,
    ) -> Gradients:
        """Repeat and differentiate tile after tile, in the order of :meth:`first`.

        Args:
            x: the input of the call.
            gradient: that of its output.
            x_gradient: a tensor to which the input's gradient is added; None if it is not wanted.
            receive: what is given each tile's place and output.

        Returns:
            The parameters' gradients.
        """
        found: Gradients = {}
        for replay, (outer, inner, place) in zip(self._replays, self._tiles, strict=True):
            (part,), pull_back = replay_with_grad([replay], [_cut(x, outer), *self._affine])
            crop = _crop(part, place)
            if receive is not None:
                receive(inner, part[crop])
            part_gradient = _cut(gradient, inner)
            if part_gradient.shape != part.shape:
                part_gradient = torch.zeros_like(part)
                part_gradient[crop] = gradient[inner]
            del part
            (tile_gradient, *affine_gradients), more = pull_back([part_gradient])
            del pull_back, part_gradient
            accumulate(found, more)
            if self._normalization is not None:
                self._normalization.accumulate(affine_gradients)
            if x_gradient is not None and tile_gradient is not None:
                x_gradient[outer].add_(tile_gradient)
            del tile_gradient
        if self._normalization is not None:
            self._normalization.pull_back(x, x_gradient, found)
        return found

    @property
    def _affine(self) -> tuple[torch.Tensor, ...]:
        return () if self._normalization is None else self._normalization.affine

    def _part(self, outer: Slices, inner: Slices) -> nn.Module:
        if self._layers is None:
            return self._module
        # Where the halo is whole, no convolution pads, and nothing is computed in vain.
        zeros = all(layer.padding_mode == "zeros" for layer in self._layers if isinstance(layer, _ConvNd))
        sides = zip(outer[1:], inner[1:], self._halos, strict=True)
        whole = [zeros and i.start - o.start == o.stop - i.stop == halo for o, i, halo in sides]
        return _Part(self._norm, self._layers, self._normalization, whole)


class _Tiled(torch.autograd.Function):
    """Keeps the input; the backward pass repeats and differentiates tile after tile."""

    @staticmethod
    def forward(ctx, call: TiledCall, parameters: list[nn.Parameter], x: torch.Tensor, *_: torch.Tensor):
        ctx.call, ctx.parameters = call, parameters
        ctx.save_for_backward(x)
        y: torch.Tensor | None = None
        for inner, part in call.first(x):
            if y is None:
                y = part.new_empty(x.shape[0], part.shape[1], *x.shape[2:])
            y[inner] = part
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        (x,) = ctx.saved_tensors
        x_gradient = torch.zeros_like(x) if ctx.needs_input_grad[2] else None
        found = ctx.call.pull_back(x, gradient, x_gradient)
        return None, None, x_gradient, *(found.get(p) for p in ctx.parameters)


class _Normalization:
    """The statistics of one input of a norm, and what of the gradient goes through them."""

    def __init__(self, norm: Any, x: torch.Tensor) -> None:
        n_channels = x.shape[1]
        self._groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else n_channels
        self._parameters, self.eps = (norm.weight, norm.bias), norm.eps
        if isinstance(norm, _InstanceNorm) and math.prod(x.shape[2:]) == 1:
            raise ValueError(f"instance norm needs more than one voxel, got an input of shape {tuple(x.shape)}")
        mean = self._over_groups(x.mean(_spatial(x)))
        variance = torch.zeros_like(mean)
        for part in slabs(x):
            variance += (part - wide(mean, x)).square_().sum(_spatial(x))
        self.mean, self.variance = mean, self._over_groups(variance / math.prod(x.shape[2:]))
        ones = torch.ones_like(mean[0])
        weight, bias = (ones, 0 * ones) if norm.weight is None else (p.detach() for p in self._parameters)
        self.affine = weight.repeat(len(x)), bias.repeat(len(x))
        self._sums = [torch.zeros_like(p) for p in self.affine]

    def accumulate(self, affine_gradients: Sequence[torch.Tensor | None]) -> None:
        """Add what a tile has to say about scale and shift, for each sample of the batch."""
        for total, gradient in zip(self._sums, affine_gradients, strict=True):
            if gradient is not None:
                total += gradient

    def pull_back(self, x: torch.Tensor, x_gradient: torch.Tensor | None, found: Gradients) -> None:
        """Add the statistics' share to the input's gradient, and the parameters' gradients to those found."""
        along, across = (total.view_as(self.mean) for total in self._sums)
        self._sums = [torch.zeros_like(p) for p in self.affine]
        for parameter, gradient in zip(self._parameters, (along, across), strict=True):
            if parameter is not None and parameter.requires_grad:
                accumulate(found, {parameter: gradient.sum(0)})
        if x_gradient is None:
            return
        scale = (self.variance + self.eps).rsqrt()
        weight, n = self.affine[0].view_as(self.mean), math.prod(x.shape[2:])
        offset = wide(scale * self._over_groups(weight * across / n), x)
        slope = wide(scale.square() * self._over_groups(weight * along / n), x)
        for part, gradient in zip(slabs(x), slabs(x_gradient), strict=True):
            gradient.sub_((part - wide(self.mean, x)).mul_(slope).add_(offset))

    def _over_groups(self, values: torch.Tensor) -> torch.Tensor:
        """Give each channel ``(B, C)`` the mean of its group."""
        grouped = values.view(len(values), self._groups, -1)
        return grouped.mean(2, keepdim=True).expand_as(grouped).reshape(values.shape)


class _Part(nn.Module):
    """What a module computes of a tile."""

    def __init__(
        self,
        norm: nn.Module | None,
        layers: Sequence[nn.Module],
        normalization: _Normalization | None,
        whole_halos: Sequence[bool],
    ) -> None:
        super().__init__()
        self.norm, self.layers = norm, nn.ModuleList(layers)
        self._normalization, self._whole_halos = normalization, whole_halos

    def forward(self, x: torch.Tensor, *affine: torch.Tensor) -> torch.Tensor:
        y = x if self._normalization is not None else x.clone()  # an activation may write over it
        if self._normalization is not None:
            # Group and instance norm are batch norm of one. A batch of one stays as it is: reshaped, channels last would get a
            # batch's stride for which PyTorch's backward pass of batch norm is wrong on a CPU.
            known, y = self._normalization, y.reshape(1, -1, *x.shape[2:]) if len(x) > 1 else y
            mean, variance, (weight, bias) = known.mean.flatten(), known.variance.flatten(), affine
            y = functional.batch_norm(y, mean, variance, weight, bias, eps=known.eps)
            y = y.reshape(x.shape) if len(x) > 1 else y
        for before, layer in itertools.pairwise([self.norm, *self.layers]):
            y = self._convolve(layer, y) if isinstance(layer, _ConvNd) else activate(layer, y, before)
        return y

    def _convolve(self, layer: _ConvNd, x: torch.Tensor) -> torch.Tensor:
        if any(self._whole_halos):
            # another thread may be in the layer: its twin has all that it has, hooks too, but for the padding
            twin = object.__new__(type(layer))
            padding = tuple(0 if w else r for w, r in zip(self._whole_halos, _radii(layer), strict=True))
            vars(twin).update(vars(layer), padding=padding)
            layer = twin
        return layer(x)


def _split(module: nn.Module, n_dims: int) -> tuple[nn.Module | None, list[nn.Module], list[int]]:
    """Take a sequence apart into its norm, the other layers, and how far these see along each spatial dimension, voxels."""
    layers = list(_layers(module))
    norm = layers.pop(0) if layers and isinstance(layers[0], nn.GroupNorm | _InstanceNorm) else None
    radii = [0] * n_dims
    for layer in layers:
        if isinstance(layer, _ConvNd) and _keeps_size(layer):
            radii = [a + b for a, b in itertools.zip_longest(radii, _radii(layer), fillvalue=0)]
        elif not isinstance(layer, _POINTWISE):
            raise ValueError(
                f"{type(layer).__name__} cannot be computed in tiles, in which a branch must be one instance or group norm, "
                "if any, then convolutions that keep the size, and activations: give tile=None"
            )
    if next(module.buffers(), None) is not None:
        raise ValueError(
            f"{type(module).__name__} has buffers, which a call may change, and cannot be computed in tiles: give tile=None"
        )
    return norm, layers, radii


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, NormLeakyReLU) or type(module).forward is nn.Sequential.forward:
        for child in module.children():
            yield from _layers(child)
    else:
        yield module


def _keeps_size(layer: _ConvNd) -> bool:
    same = layer.padding in ("same", tuple(_radii(layer))) and all(k % 2 == 1 for k in layer.kernel_size)
    return same and set(layer.stride) == {1} and not layer.transposed and layer.padding_mode != "circular"


def _radii(layer: _ConvNd) -> list[int]:
    return [d * (k // 2) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]


def _starts(shape: Sequence[int], halos: Sequence[int], size: Sequence[int]) -> list[list[int]]:
    """Return where the tiles of a given size begin along each spatial dimension."""
    n_dims = len(shape) - 2
    found = []
    for n, halo, extent in zip(shape[2:], halos, [0] * (n_dims - len(size)) + list(size), strict=True):
        starts = list(range(0, n, extent or n))
        if len(starts) > 1 and n - starts[-1] < halo:
            starts.pop()
        found.append(starts)
    return found


def _automatic_starts(shape: Sequence[int], halos: Sequence[int]) -> list[list[int]]:
    """Return where slabs of about one size begin along each spatial dimension, of which one is cut; see :data:`Tile`."""
    batch, channels, *extents = shape
    found = [[0] for _ in extents]
    least, halo, first = max(_LEAST_SLAB, *halos), halos[0], extents[0]
    if batch == 1 and len(extents) == 3:
        least = max(least, _SLOW_BELOW // (channels * extents[1]) + 1 - halo)  # the outermost have one halo
    n_slabs = next((n for n in _N_SLABS if first // n >= least), 1)
    dim = 0 if n_slabs > 1 else -1
    if dim == -1:
        n_slabs = min(_N_SLABS[0], max(1, extents[-1] // max(_LEAST_SLAB, *halos)))
    found[dim] = [i * extents[dim] // n_slabs for i in range(n_slabs)]
    return found


def _tiles(
    starts: Sequence[Sequence[int]], shape: Sequence[int], halos: Sequence[int]
) -> Iterator[tuple[Slices, Slices, Slices]]:
    """Yield each tile with its halo, the tile, and the tile's place in what the module makes of the first."""
    ranges = [
        [(a, b, n, halo) for a, b in zip(mine, [*mine[1:], n], strict=True)]
        for mine, n, halo in zip(starts, shape[2:], halos, strict=True)
    ]
    for tile in itertools.product(*ranges):
        outer = [slice(max(0, a - halo), min(n, b + halo)) for a, b, n, halo in tile]
        inner = [slice(a, b) for a, b, _, _ in tile]
        place = [slice(a - o.start, b - o.start) for (a, b, *_), o in zip(tile, outer, strict=True)]
        yield (..., *outer), (..., *inner), (..., *place)


def _cut(x: torch.Tensor, place: Slices) -> torch.Tensor:
    """Copy a tile in one piece, along the last dimension in a fraction of the time that a clone of the view takes."""
    if not x.is_contiguous():
        return x[place].clone()
    for dim, extent in enumerate(place[1:], x.dim() - len(place) + 1):
        if extent.stop - extent.start < x.shape[dim]:
            x = torch.narrow_copy(x, dim, extent.start, extent.stop - extent.start)
    return x


def _crop(part: torch.Tensor, place: Slices) -> Slices:
    """Return the tile's place in a part; one that was not padded is no larger than the tile."""
    extents = part.shape[part.dim() - len(place) + 1 :]
    whole = [n == p.stop - p.start for n, p in zip(extents, place[1:], strict=True)]
    return (..., *(slice(None) if w else p for w, p in zip(whole, place[1:], strict=True)))


def _spatial(x: torch.Tensor) -> list[int]:
    return list(range(2, x.dim()))
