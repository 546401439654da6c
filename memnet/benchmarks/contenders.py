"""The segmentation networks that are compared: the paper's, and those of MONAI that a user would take otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from monai.networks.nets import DynUNet, SegResNet
from torch import nn

from memnet.workflow.networks import segmentation_network

__all__ = ["CONTENDERS", "MULTIPLE", "Contender"]

N_LEVELS = 4
MULTIPLE = 2 ** (N_LEVELS - 1)  # MONAI's networks take sizes that are multiples of it


class Contender(NamedTuple):
    """A network of the comparison.

    Attributes:
        title: what tables call it.
        build: from the numbers of input channels and of classes to the network, a 3D U of 4 levels.
    """

    title: str
    build: Callable[[int, int], nn.Module]


def _of_the_paper(name: str, channels: int, in_channels: int, n_classes: int, vae: bool = False) -> nn.Module:
    return segmentation_network(
        name,
        match_baseline=True,
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=n_classes,
        channels=channels,
        n_levels=N_LEVELS,
        vae=vae,
    )


def _dynunet(channels: int, in_channels: int, n_classes: int) -> nn.Module:
    return DynUNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=n_classes,
        kernel_size=[3] * N_LEVELS,
        strides=[1] + [2] * (N_LEVELS - 1),
        upsample_kernel_size=[2] * (N_LEVELS - 1),
        filters=[channels * 2**level for level in range(N_LEVELS)],
    )


def _segresnet(channels: int, in_channels: int, n_classes: int) -> nn.Module:
    return SegResNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=n_classes,
        init_filters=channels,
        blocks_down=(1,)
        * N_LEVELS,  # one residual block a level as in the decoder: the fewest parameters at this width
        blocks_up=(1,) * (N_LEVELS - 1),
    )


CONTENDERS = {
    "baseline": Contender("UNet3D", partial(_of_the_paper, "baseline", 16)),
    "fully": Contender("FullyInvResUNet", partial(_of_the_paper, "fully", 16)),
    "partially": Contender("PartiallyInvResUNet", partial(_of_the_paper, "partially", 16)),
    "dynunet": Contender("DynUNet (MONAI)", partial(_dynunet, 16)),
    "segresnet": Contender("SegResNet (MONAI)", partial(_segresnet, 16)),
    "fully_vae": Contender("FullyInvResUNet + VAE", partial(_of_the_paper, "fully", 16, vae=True)),
}
