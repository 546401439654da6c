"""Chains of additive couplings as other libraries build them, and as memnet does, from the same branches."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

from memnet.chain import Chain, Memory
from memnet.couplings import AdditiveCoupling, ChannelMerge, ChannelSplit
from memnet.tiles import Tile

__all__ = ["IMPLEMENTATIONS", "Branches", "Implementation", "imported", "norm_act_conv_branches"]

Branches = Sequence[tuple[nn.Module, nn.Module]]
"""The branches f and g of each coupling."""


class Implementation(NamedTuple):
    """A way to build a chain.

    Attributes:
        title: what tables call it.
        build: from branches to a module of ``(B, C, D, H, W)`` to the same shape, whose couplings are
            ``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)`` of the two halves of the channels.
        packages: the distributions that it imports, module to ``name==version``.
        takes_input: whether it frees the memory of its input, which must then be nobody else's.
    """

    title: str
    build: Callable[[Branches], nn.Module]
    packages: dict[str, str] = {}
    takes_input: bool = False

    @property
    def missing(self) -> str | None:
        """What to install before :attr:`build` works, in words; None if everything is there."""
        wanted = [package for module, package in self.packages.items() if importlib.util.find_spec(module) is None]
        # without dependencies: MemCNN's would replace a PyTorch for CPUs
        return f"not installed (pip install --no-deps {' '.join(wanted)})" if wanted else None

    @property
    def versions(self) -> list[str]:
        """The distributions that it imports, with the versions that are installed."""
        names = [package.partition("==")[0] for package in self.packages.values()]
        return [f"{name} {importlib.metadata.version(name)}" for name in names]


def norm_act_conv_branches(n_couplings: int, channels: int) -> Branches:
    """Return branches of group norm (of one group), leaky ReLU (in place) and a 3^3 convolution.

    Args:
        n_couplings: pairs of them.
        channels: channels of each stream.
    """

    def branch() -> nn.Module:
        convolution = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        return nn.Sequential(nn.GroupNorm(1, channels), nn.LeakyReLU(inplace=True), convolution)

    return [(branch(), branch()) for _ in range(n_couplings)]


class _Coupling(nn.Module):
    """An additive coupling of two streams under plain autograd."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x1: torch.Tensor, x2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y1 = x1 + self.f(x2)
        return y1, x2 + self.g(y1)


class _Couplings(nn.Module):
    """Couplings under plain autograd, or checkpointed by PyTorch.

    Args:
        branches: see :data:`Branches`.
        segment: from the number of couplings to how many of them a checkpoint spans; None keeps every activation.
    """

    def __init__(self, segment: Callable[[int], int] | None, branches: Branches) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Coupling(f, g) for f, g in branches)
        self.segment = len(self.blocks) if segment is None else segment(len(self.blocks))
        self.checkpointed = segment is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x.chunk(2, 1)
        for start in range(0, len(self.blocks), self.segment):
            run = partial(self._run, start)
            state = checkpoint(run, *state, use_reentrant=False) if self.checkpointed else run(*state)
        return torch.cat(state, 1)

    def _run(self, start: int, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for i in range(start, min(start + self.segment, len(self.blocks))):
            state = self.blocks[i](*state)
        return state


def _memnet(memory: Memory, branches: Branches, tile: Tile | None = None) -> nn.Module:
    couplings = (AdditiveCoupling(f, g, tile=tile) for f, g in branches)
    return Chain([ChannelSplit(), *couplings, ChannelMerge()], memory)


def _memcnn(branches: Branches) -> nn.Module:
    memcnn = imported("memcnn")
    return nn.Sequential(*(memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(f, g)) for f, g in branches))


def _iunets(branches: Branches) -> nn.Module:
    # its coupling moves one stream and swaps them: two make one of the others
    wrapper, coupling = imported("memcnn").InvertibleModuleWrapper, imported("iunets.layers").StandardAdditiveCoupling
    halves = [branch for pair in branches for branch in pair]
    return nn.Sequential(*(wrapper(coupling(half, _out_channels(half))) for half in halves))


def _out_channels(branch: nn.Module) -> int:
    return [module.out_channels for module in branch.modules() if isinstance(module, _ConvNd)][-1]


def _revtorch(branches: Branches) -> nn.Module:
    revtorch = imported("revtorch.revtorch")
    return revtorch.ReversibleSequence(nn.ModuleList(revtorch.ReversibleBlock(f, g) for f, g in branches))


def _revlib(branches: Branches) -> nn.Module:
    return imported("revlib").ReversibleSequential(*(branch for pair in branches for branch in pair))


def imported(module: str) -> Any:
    """Import another library's module, without the warnings about what newer versions of Python deprecate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


_MEMCNN = {"memcnn": "memcnn==1.5.2"}

IMPLEMENTATIONS: dict[str, Implementation] = {
    "plain": Implementation("plain autograd", partial(_Couplings, None)),
    "checkpoint_block": Implementation("torch checkpoint, each block", partial(_Couplings, lambda n: 1)),
    "checkpoint_sqrt": Implementation(
        "torch checkpoint, sqrt(L) blocks", partial(_Couplings, lambda n: math.ceil(math.sqrt(n)))
    ),
    "memcnn": Implementation("MemCNN", _memcnn, _MEMCNN, takes_input=True),
    "revtorch": Implementation("RevTorch", _revtorch, {"revtorch": "revtorch==0.2.4"}),
    "iunets": Implementation("iUNets", _iunets, {"iunets": "iunets==0.1"} | _MEMCNN, takes_input=True),
    "revlib": Implementation("revlib", _revlib, {"revlib": "revlib==1.7.2"}),
    "store": Implementation("memnet `store`", partial(_memnet, "store")),
    "checkpoint": Implementation("memnet `checkpoint`", partial(_memnet, "checkpoint")),
    "invert": Implementation("memnet `invert`", partial(_memnet, "invert")),
    "tiles": Implementation("memnet `invert`, in tiles", partial(_memnet, "invert", tile="auto")),
}
"""Everything that is compared, by a word."""
