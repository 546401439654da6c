"""Super-resolution by sub-pixel convolutions, and the same with stacks of reversible blocks between them."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from monai.networks.layers.factories import Conv, Norm
from monai.networks.utils import pixelshuffle
from torch import nn

from memnet.budget import fit_to_budget
from memnet.chain import Chain, Memory, set_memory
from memnet.couplings import AdditiveCoupling, ChannelMerge, ChannelSplit
from memnet.grid import FRACTION_BITS

__all__ = ["ESPCN", "ESPCNRevNet"]

Start = Literal["random", "identity", "interpolation"]

_KERNELS = (3, 1, 3)


class ESPCNRevNet(nn.Module):
    r"""Three valid convolutions and a shuffle of channels into voxels, with a stack of reversible blocks before each.

    .. math:: x \mapsto S\, W_3 R_3\, \sigma W_2 R_2\, \sigma W_1 R_1\, x

    :math:`W_1, W_2, W_3` are unpadded convolutions of width 3, 1 and 3, :math:`\sigma` is ReLU, :math:`S` arranges
    ``upsampling_rate ** spatial_dims`` channels as the voxels of a finer grid. :math:`R_i` is a stack of ``n_blocks`` additive
    couplings of the two halves of the channels, whose branches are bottlenecks: three times batch norm, ReLU and a
    convolution, of width 1, 3 (padded) and 1, at half of the channels. An input side of ``n`` voxels gives
    ``upsampling_rate * (n - 4)``.

    Under ``memory="invert"``, the paper's low-memory system, backpropagation keeps what enters the convolutions and no
    more: the convolutions run again from it, the stacks are inverted block by block, and batch statistics move once.

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels: channels of the input; 6 for a diffusion tensor. A single channel has no halves and gets no stack.
        out_channels: channels of the output; as many as the input's where None.
        upsampling_rate: refinement of the grid along each axis, an integer.
        n_blocks: blocks ``N`` of each stack; 0 is :class:`ESPCN`.
        channels: channels after the first and after the second convolution.
        memory: what backpropagation keeps, see :class:`memnet.Chain`.
        fraction_bits: see :class:`memnet.AdditiveCoupling`; inputs should be of magnitude 1, as diffusivities in um^2/ms are.
        start: how training begins: ``"random"``; ``"identity"``, with stacks that change nothing, that is as ESPCN: the last
            convolution of each branch is zero; ``"interpolation"``, as linear interpolation: as before, and some channels of
            the convolutions carry the input through, the others add nothing yet.
        memory_budget: bytes for forward and backward pass under ``memory="auto"``, such as ``"12GiB"``.

    Raises:
        ValueError: an argument is out of range.

    References:
        Deeper Image Quality Transfer: Training Low-Memory Neural Networks for 3D Images (Blumberg et al., 2018),
        https://arxiv.org/abs/1808.05577
        Real-time single image and video super-resolution using an efficient sub-pixel convolutional neural network
        (Shi et al., 2016), https://arxiv.org/abs/1609.05158
    """

    __jit_unused_properties__ = ["memory"]

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 6,
        out_channels: int | None = None,
        upsampling_rate: int = 2,
        n_blocks: int = 4,
        channels: Sequence[int] = (50, 100),
        memory: Memory | Literal["auto"] = "invert",
        fraction_bits: int | None = FRACTION_BITS,
        start: Start = "random",
        memory_budget: int | str | None = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims}")
        if min(in_channels, out_channels) < 1:
            raise ValueError(f"in_channels and out_channels must be at least 1, got {in_channels} and {out_channels}")
        if upsampling_rate != int(upsampling_rate) or upsampling_rate < 1:
            raise ValueError(f"upsampling_rate must be a whole number of at least 1, got {upsampling_rate}")
        if n_blocks < 0:
            raise ValueError(f"n_blocks must be at least 0, got {n_blocks}")
        if len(channels) != 2 or min(channels) < 1:
            raise ValueError(f"channels must be two numbers of at least 1, got {tuple(channels)}")
        if start not in get_args(Start):
            raise ValueError(f"start must be one of {', '.join(get_args(Start))}, got {start!r}")
        if start == "interpolation" and (out_channels != in_channels or min(channels) < 2 * in_channels):
            raise ValueError(
                f"an interpolation of {in_channels} channels needs as many of the output and {2 * in_channels} channels "
                f"between, got {out_channels} and {tuple(channels)}; start as 'identity' without"
            )
        self.spatial_dims, self.in_channels, self.upsampling_rate = spatial_dims, in_channels, int(upsampling_rate)
        widths = [in_channels, *channels, out_channels * self.upsampling_rate**spatial_dims]
        self.layers = nn.ModuleList()
        for i, kernel in enumerate(_KERNELS):
            n_in, n_out = widths[i : i + 2]
            if n_blocks > 0 and n_in > 1:
                stack = _stack(spatial_dims, n_in, n_blocks, fraction_bits)
                if start != "random":
                    _set_to_identity(stack)
                self.layers.append(stack)
            is_last = i == len(_KERNELS) - 1
            self.layers.append(Chain([_Convolution(spatial_dims, n_in, n_out, kernel, not is_last)], segment=1))
        if start == "interpolation":
            _set_to_interpolation(self)
        self.memory_budget: int | str | None = None
        set_memory(self, memory, memory_budget)

    @property
    def memory(self) -> Memory | Literal["auto"]:
        """The memory strategy of the stacks; convolutions with an activation run again under all but ``store``."""
        return self._memory

    @memory.setter
    def memory(self, memory: Memory | Literal["auto"]) -> None:
        for layer in self.layers:
            assert isinstance(layer, Chain)
            if isinstance(layer[0], ChannelSplit):
                layer.memory = memory
            elif len(layer[0]) > 1:  # a lone convolution keeps its input and no more as it is
                layer.memory = memory if memory in ("store", "auto") else "checkpoint"
        self._memory = memory

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Refine an image.

        Args:
            x: ``(B, in_channels, D, H, W)``, or fewer spatial axes, of at least 5 voxels a side.

        Returns:
            ``(B, out_channels, r (D - 4), r (H - 4), r (W - 4))`` for the rate ``r``: without the input's outer two voxels.

        Raises:
            ValueError: the shape does not fit.
        """
        sizes = x.shape[2:]
        if x.dim() != self.spatial_dims + 2 or x.shape[1] != self.in_channels or min(sizes) < 5:
            raise ValueError(
                f"expected an input of shape (B, {self.in_channels}) and {self.spatial_dims} spatial sizes of at least 5 "
                f"voxels, got {x.shape}"
            )
        if not torch.jit.is_scripting():
            fit_to_budget(self, self.memory_budget, [x])
        for layer in self.layers:
            x = layer.plain([x])[0] if torch.jit.is_scripting() else layer(x)
        return pixelshuffle(x, self.spatial_dims, self.upsampling_rate)


class ESPCN(ESPCNRevNet):
    """Three valid convolutions and a shuffle of channels into voxels: :class:`ESPCNRevNet` without stacks.

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels: channels of the input; 6 for a diffusion tensor.
        out_channels: channels of the output; as many as the input's where None.
        upsampling_rate: refinement of the grid along each axis, an integer.
        options: further arguments of :class:`ESPCNRevNet`; ``memory`` is ``store`` where it is not among them, others run the
            convolutions again in the backward pass.

    Raises:
        ValueError: an argument is out of range.

    References:
        Bayesian image quality transfer with CNNs: exploring uncertainty in dMRI super-resolution (Tanno et al., 2017),
        https://arxiv.org/abs/1705.00664
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 6,
        out_channels: int | None = None,
        upsampling_rate: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(spatial_dims, in_channels, out_channels, upsampling_rate, 0, **{"memory": "store"} | options)


def _stack(spatial_dims: int, channels: int, n_blocks: int, fraction_bits: int | None) -> Chain:
    first = channels // 2  # of an odd number the second half has one more
    second = channels - first
    blocks = [
        AdditiveCoupling(
            _Bottleneck(spatial_dims, second, first), _Bottleneck(spatial_dims, first, second), fraction_bits
        )
        for _ in range(n_blocks)
    ]
    return Chain([ChannelSplit(), *blocks, ChannelMerge()])


def _set_to_identity(stack: Chain) -> None:
    for branch in (module for module in stack.modules() if isinstance(module, _Bottleneck)):
        for parameter in branch[-1].parameters():
            nn.init.zeros_(parameter)


@torch.no_grad()
def _set_to_interpolation(network: ESPCNRevNet) -> None:
    """Let convolutions carry ``x`` as ``relu(x)`` and ``relu(-x)``, and the last one interpolate their difference."""
    n, rate, dims = network.in_channels, network.upsampling_rate, network.spatial_dims
    convolutions: list[Any] = [module[0] for module in network.modules() if isinstance(module, _Convolution)]
    first, second, last = convolutions
    halves = torch.cat([torch.eye(n), -torch.eye(n)])
    for convolution, weight in ((first, halves), (second, halves @ halves.T)):
        middle = [size // 2 for size in convolution.kernel_size]
        convolution.weight[: 2 * n] = 0
        convolution.weight[(slice(2 * n), slice(weight.shape[1]), *middle)] = weight
        convolution.bias[: 2 * n] = 0
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    offsets = (torch.arange(rate) + 0.5) / rate - 0.5  # of fine voxels from their coarse one's centre, in coarse voxels
    taps = (1 - (offsets[:, None] - torch.arange(-1, 2)).abs()).clamp(min=0)
    for number, place in enumerate(itertools.product(range(rate), repeat=dims)):
        kernel = functools.reduce(lambda product, tap: product[..., None] * tap, taps[list(place)])
        for channel in range(n):
            last.weight[channel * rate**dims + number, channel] = kernel
            last.weight[channel * rate**dims + number, n + channel] = -kernel


class _Bottleneck(nn.Sequential):
    """Three times batch norm, ReLU and convolution, of width 1, 3 and 1."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        layers: list[nn.Module] = []
        for kernel, n_in in zip((1, 3, 1), (in_channels, out_channels, out_channels), strict=True):
            norm = Norm[Norm.BATCH, spatial_dims](n_in)
            # In place: batch norm keeps its input, the convolution after it what is left of the output.
            convolution = Conv[Conv.CONV, spatial_dims](n_in, out_channels, kernel, padding=kernel // 2)
            layers += [norm, nn.ReLU(inplace=True), convolution]
        super().__init__(*layers)


class _Convolution(nn.Sequential):
    """A valid convolution, with or without ReLU, callable on a chain's state."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, kernel: int, activated: bool) -> None:
        convolution = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, kernel)
        super().__init__(*([convolution, nn.ReLU(inplace=True)] if activated else [convolution]))

    @torch.jit.export
    def plain(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Map ``[x]`` to ``[y]``."""
        x = state[0]
        for module in self:
            x = module(x)
        return [x]
