"""Memory and time of a training step of U-Nets: memnet's, MONAI's with and without checkpointed blocks, and iUNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from monai.networks.blocks import ResBlock, UnetBasicBlock
from monai.networks.blocks.activation_checkpointing import ActivationCheckpointWrapper
from monai.networks.nets import BasicUNet, DynUNet, SegResNet, SegResNetVAE
from monai.networks.nets.unet import CheckpointUNet, UNet
from torch import nn

from memnet.accounting.dry_run import dry_run
from memnet.benchmarks.measurement import Cost, measure_in_turn
from memnet.benchmarks.peers.implementations import IMPLEMENTATIONS, imported
from memnet.benchmarks.tables import markdown_table, shown, shown_range
from memnet.chain import Memory
from memnet.losses import InvResLoss
from memnet.nets.invres import FullyInvResUNet, PartiallyInvResUNet

__all__ = ["U_NETS", "NetworkCost", "UNetContender", "measure_unets", "plan_unets", "unet_table"]

_IN, _OUT = 4, 3


class UNetContender(NamedTuple):
    """A network of four channels in and three classes out.

    Attributes:
        title: what tables call it.
        build: from the side of the cubic patch to the network.
        missing: what to install first, in words; None if everything is there.
    """

    title: str
    build: Callable[[int], nn.Module]
    missing: str | None = None


@dataclass(frozen=True)
class NetworkCost:
    """A training step of one network.

    Attributes:
        name: a word of :data:`U_NETS`.
        patch: side of the cubic patch, voxels.
        parameters: their number.
        cost: memory, time and operations.
        measured: whether the step was run, or foretold from shapes.
    """

    name: str
    patch: int
    parameters: int
    cost: Cost
    measured: bool = True


def measure_unets(
    patch: int, rounds: int = 3, names: Sequence[str] | None = None, device: str = "cpu"
) -> list[NetworkCost]:
    """Measure a training step (forward pass, cross entropy and Dice, backward pass) at batch size 1, float32, in turn.

    Args:
        patch: side of the cube, voxels; a multiple of 16.
        rounds: timed steps of each network; 0 measures memory alone.
        names: words of :data:`U_NETS`, all by default; what is not installed is left out.
        device: ``cpu`` or ``cuda``.
    """
    step = _step(patch, device)

    def build(name: str) -> nn.Module:
        torch.manual_seed(0)
        return U_NETS[name].build(patch).to(device)

    networks = {name: build(name) for name in _there(names)}
    costs = measure_in_turn(step, networks, rounds, device, warm_up=rounds > 0)
    return [NetworkCost(name, patch, _size(networks[name]), cost) for name, cost in costs.items()]


def plan_unets(patch: int, names: Sequence[str] | None = None) -> list[NetworkCost]:
    """Foretell the memory and operations of the same steps without running them, see :mod:`memnet.accounting.dry_run`.

    Args:
        patch: side of the cube, voxels; a multiple of 16.
        names: words of :data:`U_NETS`; what is not installed is left out, and iUNet, which resizes storages.
    """
    found = []
    for name in _there(names):
        if name != "iunet":
            networks: list[nn.Module] = []

            def make(name: str = name, networks: list[nn.Module] = networks) -> tuple[Callable[[], object], Any]:
                networks.append(U_NETS[name].build(patch))
                return partial(_step(patch, "cpu"), networks[0]), list(networks[0].parameters())

            foretold = dry_run(make)
            cost = Cost(foretold.peak, (), foretold.flops)
            found.append(NetworkCost(name, patch, _size(networks[0]), cost, measured=False))
    return found


def _there(names: Sequence[str] | None) -> list[str]:
    return [name for name in names or U_NETS if U_NETS[name].missing is None]


def _size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _step(patch: int, device: str) -> Callable[[nn.Module], None]:
    image = torch.rand(1, _IN, patch, patch, patch, device=device)
    label = torch.zeros(1, 1, patch, patch, patch, device=device)
    loss = InvResLoss()

    def step(network: nn.Module) -> None:
        prediction = network(image)
        if isinstance(network, SegResNetVAE):
            logits, regularisation = prediction
            (loss(logits, label) + regularisation).backward()
        else:
            loss(prediction, label).backward()

    return step


def unet_table(costs: Sequence[NetworkCost], names: Sequence[str] | None = None) -> str:
    """Return a markdown table: memory at each patch size, time at the smallest, compared with the first network's."""
    if not costs:
        rows = [[U_NETS[name].title, U_NETS[name].missing or "-"] for name in names or U_NETS]
        return markdown_table(["network", "why not"], rows)
    patches = sorted({cost.patch for cost in costs})
    # of a size both foretold and measured, what was measured
    by_case = {(cost.name, cost.patch): cost for cost in sorted(costs, key=lambda cost: cost.measured)}
    first = by_case.get((costs[0].name, patches[0]))
    foretold = {cost.patch for cost in by_case.values() if not cost.measured}
    columns = ["network", "parameters, M"]
    columns += [f"{patch}^3{', foretold' if patch in foretold else ''}, MiB" for patch in patches]
    columns += [f"time at {patches[0]}^3, s", "time to the first"]
    rows = []
    for name in names or U_NETS:
        contender = U_NETS[name]
        if contender.missing is not None:
            rows.append([contender.title, contender.missing, *["-"] * (len(columns) - 2)])
            continue
        mine = [by_case.get((name, patch)) for patch in patches]
        some = next(cost for cost in mine if cost is not None)
        row = [contender.title, shown(some.parameters / 1e6, 2)]
        row += [shown(None if cost is None else cost.cost.peak / 2**20, 0) for cost in mine]
        pace = shown_range(mine[0].cost.ratios(first.cost)) if mine[0] and first else "-"
        rows.append([*row, shown(mine[0].cost.median if mine[0] else None, 2), pace])
    return markdown_table(columns, rows)


def _checkpointed(kind: type[nn.Module], build: Callable[[int], nn.Module], patch: int) -> nn.Module:
    """Build a network and let PyTorch checkpoint all its blocks of a kind."""
    network = build(patch)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, ActivationCheckpointWrapper(child))
    return network


def _unet(kind: type[UNet], patch: int) -> nn.Module:
    return kind(3, _IN, _OUT, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2)


def _basic_unet(patch: int) -> nn.Module:
    return BasicUNet(3, _IN, _OUT)


def _dynunet(patch: int) -> nn.Module:
    n_levels = 5
    strides = [1, *[2] * (n_levels - 1)]
    return DynUNet(3, _IN, _OUT, kernel_size=[3] * n_levels, strides=strides, upsample_kernel_size=strides[1:])


def _segresnet(patch: int) -> nn.Module:
    return SegResNet(3, init_filters=16, in_channels=_IN, out_channels=_OUT)


def _segresnet_vae(patch: int) -> nn.Module:
    return SegResNetVAE([patch] * 3, spatial_dims=3, init_filters=16, in_channels=_IN, out_channels=_OUT)


class _IUNet(nn.Module):
    """iUNet between a convolution to its channels and one to the classes, as its authors segment."""

    def __init__(self, stored: bool, patch: int) -> None:
        super().__init__()
        self.stem = nn.Conv3d(_IN, 32, 3, padding=1)
        self.body = imported("iunets").iUNet(32, (2, 2, 2, 2), dim=3, disable_custom_gradient=stored)
        self.head = nn.Conv3d(32, _OUT, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)))


def _memnet(kind: Any, memory: Memory, patch: int, **options: Any) -> nn.Module:
    return kind(3, _IN, _OUT, channels=32, memory=memory, **options)


_NO_IUNETS = IMPLEMENTATIONS["iunets"].missing

U_NETS: dict[str, UNetContender] = {
    "basic_unet": UNetContender("MONAI BasicUNet", _basic_unet),
    "unet": UNetContender("MONAI UNet", partial(_unet, UNet)),
    "checkpoint_unet": UNetContender("MONAI CheckpointUNet", partial(_unet, CheckpointUNet)),
    "dynunet": UNetContender("MONAI DynUNet", _dynunet),
    "dynunet_checkpoint": UNetContender(
        "MONAI DynUNet, blocks checkpointed", partial(_checkpointed, UnetBasicBlock, _dynunet)
    ),
    "segresnet": UNetContender("MONAI SegResNet-16", _segresnet),
    "segresnet_checkpoint": UNetContender(
        "MONAI SegResNet-16, blocks checkpointed", partial(_checkpointed, ResBlock, _segresnet)
    ),
    "segresnet_vae": UNetContender("MONAI SegResNetVAE-16", _segresnet_vae),
    "segresnet_vae_checkpoint": UNetContender(
        "MONAI SegResNetVAE-16, blocks checkpointed", partial(_checkpointed, ResBlock, _segresnet_vae)
    ),
    "iunet_store": UNetContender("iUNet-32, plain autograd", partial(_IUNet, True), _NO_IUNETS),
    "iunet": UNetContender("iUNet-32", partial(_IUNet, False), _NO_IUNETS),
    "partially": UNetContender("memnet Partially-InvRes-32 `invert`", partial(_memnet, PartiallyInvResUNet, "invert")),
    "fully_store": UNetContender("memnet Fully-InvRes-32 `store`", partial(_memnet, FullyInvResUNet, "store")),
    "fully": UNetContender("memnet Fully-InvRes-32 `invert`", partial(_memnet, FullyInvResUNet, "invert")),
    "fully_vae": UNetContender(
        "memnet Fully-InvRes-32 + VAE `invert`", partial(_memnet, FullyInvResUNet, "invert", vae=True)
    ),
    "fully_tiles": UNetContender(
        "memnet Fully-InvRes-32 `invert`, in tiles", partial(_memnet, FullyInvResUNet, "invert", tile="auto")
    ),
    "fully_vae_tiles": UNetContender(
        "memnet Fully-InvRes-32 + VAE `invert`, in tiles",
        partial(_memnet, FullyInvResUNet, "invert", vae=True, tile="auto"),
    ),
}
"""The networks, by a word; memnet's are as wide as BasicUNet at full resolution."""
