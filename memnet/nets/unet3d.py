"""The 3D U-Net that the papers compare with."""

from typing import Literal

import torch
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Conv, Pool
from torch import nn
from torch.nn import functional

from memnet.chain import Chain, Memory, set_memory
from memnet.nets.segmentation import SegmentationNetwork, level_widths

__all__ = ["UNet3D"]


class UNet3D(SegmentationNetwork):
    """3D U-Net with instance norm and leaky ReLU: two convolutions a level, max pooling, interpolation, concatenation.

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels: channels of the input.
        out_channels: number of classes, background included.
        channels: channels at full resolution, doubled at each level.
        n_levels: resolutions.
        memory: ``store`` (the papers' baseline), ``checkpoint`` (each level's convolutions run again in the backward
            pass), ``recursive`` or ``auto``; it has nothing to invert.
        vae: add the variational branch in training.
        memory_budget: bytes for forward and backward pass under ``memory="auto"``, such as ``"12GiB"``.

    Raises:
        ValueError: an argument is out of range, or ``memory="invert"``.

    References:
        3D U-Net: learning dense volumetric segmentation from sparse annotation (Cicek et al., 2016),
        https://arxiv.org/abs/1606.06650
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 2,
        channels: int = 32,
        n_levels: int = 4,
        memory: Memory | Literal["auto"] = "store",
        vae: bool = False,
        memory_budget: int | str | None = None,
    ) -> None:
        widths = level_widths(channels, n_levels)
        super().__init__(spatial_dims, in_channels, out_channels, n_levels, vae, widths[-1])

        def level(n_in: int, n_out: int) -> Chain:
            return Chain([_ConvNormAct(spatial_dims, n_in, n_out), _ConvNormAct(spatial_dims, n_out, n_out)], segment=2)

        self.encoder = nn.ModuleList([level(a, b) for a, b in zip([in_channels, *widths], widths, strict=False)])
        self.pool = Pool[Pool.MAX, spatial_dims](2)
        self.decoder = nn.ModuleList([level(a + b, a) for a, b in zip(widths, widths[1:], strict=False)][::-1])
        self.head = Conv[Conv.CONV, spatial_dims](channels, out_channels, 1)
        if memory == "invert":
            raise ValueError('UNet3D has nothing to invert: memory must be "store", "checkpoint" or "recursive"')
        set_memory(self, memory, memory_budget)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Map a padded image to the logits and the deepest features."""
        mode = ("linear", "bilinear", "trilinear")[self.spatial_dims - 1]
        skips: list[torch.Tensor] = []
        for i, level in enumerate(self.encoder):
            if i > 0:
                x = self.pool(x)
            x = level.plain([x])[0] if torch.jit.is_scripting() else level(x)
            skips.append(x)
        deepest = x
        for i, level in enumerate(self.decoder):
            skip = skips[len(skips) - 2 - i]
            x = functional.interpolate(x, size=skip.shape[2:], mode=mode, align_corners=False)
            x = torch.cat([skip, x], 1)
            x = level.plain([x])[0] if torch.jit.is_scripting() else level(x)
        return [self.head(x), deepest]


class _ConvNormAct(Convolution):
    """MONAI's convolution, instance norm and leaky ReLU, callable on a chain's state."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            adn_ordering="NA",
            act=("leakyrelu", {"inplace": True}),
            norm=("instance", {"affine": True}),
            bias=False,
        )

    @torch.jit.export
    def plain(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Map ``[x]`` to ``[y]``."""
        x = state[0]
        for module in self:
            x = module(x)
        return [x]
