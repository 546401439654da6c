"""Chooses one of the papers' segmentation networks by the word a config uses for it."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch import nn

import memnet

__all__ = ["NETWORKS", "segmentation_network"]

NETWORKS = {"baseline": "UNet3D", "partially": "PartiallyInvResUNet", "fully": "FullyInvResUNet"}
_MOST_COUPLINGS = 16  # a level, where a network is made to match the baseline


def segmentation_network(name: str, match_baseline: bool = False, **arguments: Any) -> nn.Module:
    """Build the network that the paper calls the baseline, partially or fully invertible one.

    Args:
        name: ``"baseline"``, ``"partially"`` or ``"fully"``.
        match_baseline: give an invertible network the ``n_couplings`` with which its number of parameters comes nearest to
            the baseline's of the same width and levels (within 10 %), for a fair comparison: two at full resolution, and
            more below, where they take little time.
        arguments: the network's own arguments, see :class:`memnet.UNet3D`, :class:`memnet.PartiallyInvResUNet` and
            :class:`memnet.FullyInvResUNet`; one that is ``None`` keeps the network's own default.

    Returns:
        The network.

    Raises:
        ValueError: if the name is none of the three, the network has no such argument, or ``match_baseline`` and
            ``n_couplings`` are both given.

    References:
        Invertible Residual Network with Regularization for Effective Volumetric Segmentation
        (Yamazaki, Rathour, Le, 2021), https://arxiv.org/abs/2103.09042
    """
    if name not in NETWORKS:
        raise ValueError(f"network_name is {name!r}, expected one of {', '.join(NETWORKS)}")
    arguments = {k: v for k, v in arguments.items() if v is not None}
    if match_baseline and name != "baseline":
        if "n_couplings" in arguments:
            raise ValueError("match_baseline chooses n_couplings: give one of the two")
        arguments["n_couplings"] = _matching_couplings(name, arguments)
    return _build(name, arguments)


def _build(name: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        return getattr(memnet, NETWORKS[name])(**arguments)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"{NETWORKS[name]} (network_name {name!r}): {error}") from error


def _matching_couplings(name: str, arguments: dict[str, Any]) -> list[int]:
    """Add couplings one by one, from the deepest level up to the second and again, while that leads nearer."""
    baseline = inspect.signature(getattr(memnet, NETWORKS["baseline"])).parameters
    shared = {k: v for k, v in arguments.items() if k in baseline and k not in ("memory", "vae")}
    target = _n_parameters("baseline", shared)
    n_levels = arguments.get("n_levels", baseline["n_levels"].default)

    def excess(counts: list[int]) -> float:
        return _n_parameters(name, arguments | {"n_couplings": counts, "vae": False}) / target - 1

    counts = [2] * n_levels
    nearest = excess(counts)
    for level in itertools.cycle(range(n_levels - 1, 0, -1) if n_levels > 1 else [0]):
        more = [*counts]
        more[level] += 1
        if more[level] > _MOST_COUPLINGS or abs(excess(more)) >= abs(nearest):
            break
        counts, nearest = more, excess(more)
    if abs(nearest) > 0.1:
        raise ValueError(
            f"{NETWORKS[name]} cannot match the baseline: {100 * nearest:+.0f} % parameters with n_couplings={counts}, "
            f"arguments {arguments}"
        )
    return counts


def _n_parameters(name: str, arguments: dict[str, Any]) -> int:
    with torch.device("meta"):  # shapes alone
        return sum(p.numel() for p in _build(name, arguments).parameters())
