"""Chooses one of the papers' segmentation networks by the word a config uses for it."""

from __future__ import annotations

from typing import Any

from torch import nn

import memnet

__all__ = ["NETWORKS", "segmentation_network"]

NETWORKS = {"baseline": "UNet3D", "partially": "PartiallyInvResUNet", "fully": "FullyInvResUNet"}


def segmentation_network(name: str, **arguments: Any) -> nn.Module:
    """Build the network that the paper calls the baseline, partially or fully invertible one.

    Args:
        name: ``"baseline"``, ``"partially"`` or ``"fully"``.
        arguments: the network's own arguments, see :class:`memnet.UNet3D`, :class:`memnet.PartiallyInvResUNet` and
            :class:`memnet.FullyInvResUNet`; one that is ``None`` keeps the network's own default.

    Returns:
        The network.

    Raises:
        ValueError: if the name is none of the three, or the network has no such argument.

    References:
        Invertible Residual Network with Regularization for Effective Volumetric Segmentation
        (Yamazaki, Rathour, Le, 2021), https://arxiv.org/abs/2103.09042
    """
    if name not in NETWORKS:
        raise ValueError(f"network_name is {name!r}, expected one of {', '.join(NETWORKS)}")
    network = getattr(memnet, NETWORKS[name])
    try:
        return network(**{k: v for k, v in arguments.items() if v is not None})
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"{NETWORKS[name]} (network_name {name!r}): {error}") from error
