"""Partially and fully invertible residual U-Nets for volumetric segmentation."""

from collections.abc import Sequence
from typing import Literal

import torch
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Conv, Pool
from torch import nn
from torch.nn import functional

from memnet.chain import Chain, Memory, set_memory
from memnet.couplings import AdditiveCoupling, ChannelMerge, ChannelSplit
from memnet.invertible import Invertible
from memnet.nets.segmentation import SegmentationNetwork, level_widths, norm_act_conv
from memnet.resampling import InvertibleDownsample, InvertibleUpsample, Tap
from memnet.tiles import Tile

__all__ = ["FullyInvResUNet", "PartiallyInvResUNet"]


class FullyInvResUNet(SegmentationNetwork):
    """U-Net whose body is one invertible chain, skip connections and resampling included (Fully-InvRes).

    A convolution lifts the input to two streams. At each encoder level, after additive couplings, a share of
    the channels goes down through a learned orthogonal pixel shuffle and the rest becomes the skip; the decoder mirrors
    it. With ``memory="invert"`` the activations kept for backpropagation do not grow with the number of couplings or levels.

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels: channels of the input, e.g. MRI contrasts.
        out_channels: number of classes, background included.
        channels: channels at full resolution, both streams together; even.
        n_levels: resolutions; the input is padded inside to a multiple of ``2^(n_levels - 1)``.
        n_couplings: couplings at each level, in the encoder and again in the decoder; one number for all levels, or one
            for each, the finest first.
        share_down: share of the channels that goes down; with 1/4 in 3D (1/2 in 2D) the channels double a level.
        downsampling: ``learned`` (orthogonal, Haar at first) or ``shuffle``.
        memory: see :class:`memnet.Chain`; may be set on the network at any time.
        vae: add the variational branch in training.
        memory_budget: bytes for forward and backward pass under ``memory="auto"``, such as ``"12GiB"``.
        tile: tiles in which the couplings run, see :data:`memnet.tiles.Tile`, such as ``"auto"``; None for none.

    Raises:
        ValueError: an argument is out of range.

    References:
        Invertible residual network with regularization for effective volumetric segmentation (Yamazaki et al., 2021)
        iUNets: learnable invertible up- and downsampling (Etmann et al., 2020), https://arxiv.org/abs/2005.05220
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 2,
        channels: int = 32,
        n_levels: int = 4,
        n_couplings: int | Sequence[int] = 2,
        share_down: float = 0.25,
        downsampling: str = "learned",
        memory: Memory | Literal["auto"] = "invert",
        vae: bool = False,
        memory_budget: int | str | None = None,
        tile: Tile | None = None,
    ) -> None:
        if channels < 4 or channels % 2 != 0:
            raise ValueError(f"channels must be even and at least 4, got {channels}")
        if not 0 < share_down <= 1:
            raise ValueError(f"share_down must be in (0, 1], got {share_down}")
        if downsampling not in ("learned", "shuffle"):
            raise ValueError(f"downsampling must be learned or shuffle, got {downsampling!r}")
        counts = _couplings_per_level(n_couplings, n_levels)
        streams = [channels // 2]
        downs = []
        for _ in range(n_levels - 1):
            downs.append(max(1, round(streams[-1] * share_down)))
            streams.append(downs[-1] * 2**spatial_dims)
        super().__init__(spatial_dims, in_channels, out_channels, n_levels, vae, 2 * streams[-1])

        def couplings(width: int, count: int) -> list[Invertible]:
            def branch() -> nn.Module:
                return norm_act_conv(spatial_dims, width, width)

            return [AdditiveCoupling(branch(), branch(), tile=tile) for _ in range(count)]

        learned = downsampling == "learned"
        levels = list(zip(streams, downs, counts, strict=False))
        blocks: list[Invertible] = []
        for width, down, count in levels:
            blocks += [*couplings(width, count), InvertibleDownsample(spatial_dims, width, down, learned, n_streams=2)]
        blocks += [*couplings(streams[-1], counts[-1]), Tap(n_streams=2)]
        for width, down, count in reversed(levels):
            blocks += [InvertibleUpsample(spatial_dims, width, down, learned, n_streams=2), *couplings(width, count)]
        conv = Conv[Conv.CONV, spatial_dims]
        self.stem = conv(in_channels, channels, 3, padding=1)
        self.split = ChannelSplit()
        self.body = Chain(blocks)
        self.heads = nn.ModuleList([conv(channels // 2, out_channels, 1, bias=i == 0) for i in range(2)])
        set_memory(self, memory, memory_budget)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Map a padded image to the logits and the two deepest streams."""
        state = self.split.plain([self.stem(x)])
        state = self.body.plain(state) if torch.jit.is_scripting() else list(self.body(*state))
        logits = state[0]
        for i, head in enumerate(self.heads):
            # A head for each stream: no concatenated copy of the full-resolution features.
            logits = head(state[i]) if i == 0 else logits + head(state[i])
        return [logits] + state[-2:]


class PartiallyInvResUNet(SegmentationNetwork):
    """U-Net with invertible couplings inside every level, max pooling and interpolation between (Partially-InvRes).

    Each level keeps what its pooling, interpolation and change of width need; the couplings add nothing to it.

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels: channels of the input.
        out_channels: number of classes, background included.
        channels: channels at full resolution, doubled at each level; even.
        n_levels: resolutions.
        n_couplings: couplings at each level, in the encoder and again in the decoder; one number for all levels, or one
            for each, the finest first.
        memory: see :class:`memnet.Chain`.
        vae: add the variational branch in training.
        memory_budget: bytes for forward and backward pass under ``memory="auto"``, such as ``"12GiB"``.
        tile: tiles in which the couplings run, see :data:`memnet.tiles.Tile`, such as ``"auto"``; None for none.

    Raises:
        ValueError: an argument is out of range.

    References:
        Invertible residual network with regularization for effective volumetric segmentation (Yamazaki et al., 2021)
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 2,
        channels: int = 32,
        n_levels: int = 4,
        n_couplings: int | Sequence[int] = 2,
        memory: Memory | Literal["auto"] = "invert",
        vae: bool = False,
        memory_budget: int | str | None = None,
        tile: Tile | None = None,
    ) -> None:
        if channels < 4 or channels % 2 != 0:
            raise ValueError(f"channels must be even and at least 4, got {channels}")
        counts = _couplings_per_level(n_couplings, n_levels)
        widths = level_widths(channels, n_levels)
        super().__init__(spatial_dims, in_channels, out_channels, n_levels, vae, widths[-1])

        def level(width: int, count: int) -> Chain:
            def branch() -> nn.Module:
                return norm_act_conv(spatial_dims, width // 2, width // 2)

            couplings = [AdditiveCoupling(branch(), branch(), tile=tile) for _ in range(count)]
            return Chain([ChannelSplit(), *couplings, ChannelMerge()])

        conv = Conv[Conv.CONV, spatial_dims]
        self.stem = conv(in_channels, channels, 3, padding=1)
        self.pool = Pool[Pool.MAX, spatial_dims](2)
        levels = list(zip(widths, counts, strict=True))
        self.encoder = nn.ModuleList([level(width, count) for width, count in levels])
        self.widen = nn.ModuleList(
            [
                Convolution(spatial_dims, a, b, norm=("instance", {"affine": True}))
                for a, b in zip(widths, widths[1:], strict=False)
            ]
        )
        self.narrow = nn.ModuleList([conv(b, a, 1) for a, b in zip(widths, widths[1:], strict=False)][::-1])
        self.decoder = nn.ModuleList([level(width, count) for width, count in levels[-2::-1]] if n_levels > 1 else [])
        self.head = conv(channels, out_channels, 1)
        set_memory(self, memory, memory_budget)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Map a padded image to the logits and the deepest features."""
        mode = ("linear", "bilinear", "trilinear")[self.spatial_dims - 1]
        x = self.stem(x)
        skips: list[torch.Tensor] = []
        for i, level in enumerate(self.encoder):
            x = level.plain([x])[0] if torch.jit.is_scripting() else level(x)
            skips.append(x)
            for j, widen in enumerate(self.widen):
                if j == i:
                    x = widen(self.pool(x))
        deepest = x
        for i, (narrow, level) in enumerate(zip(self.narrow, self.decoder)):  # noqa: B905 (TorchScript)
            skip = skips[len(skips) - 2 - i]
            x = skip + functional.interpolate(narrow(x), size=skip.shape[2:], mode=mode, align_corners=False)
            x = level.plain([x])[0] if torch.jit.is_scripting() else level(x)
        return [self.head(x), deepest]


def _couplings_per_level(n_couplings: int | Sequence[int], n_levels: int) -> list[int]:
    counts = [n_couplings] * n_levels if isinstance(n_couplings, int) else list(n_couplings)
    if len(counts) != n_levels or min(counts, default=1) < 1:
        raise ValueError(
            f"n_couplings must be at least 1, one number or one for each of {n_levels} levels, got {n_couplings}"
        )
    return counts
