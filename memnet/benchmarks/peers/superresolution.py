"""ESPCN-RN at its paper's size, its stacks of couplings in each implementation."""

from __future__ import annotations

import torch
from torch import nn

from memnet.benchmarks.measurement import Cost, measure_in_turn
from memnet.benchmarks.peers.implementations import IMPLEMENTATIONS
from memnet.benchmarks.superresolution import training_step
from memnet.benchmarks.tables import markdown_table, shown, shown_range
from memnet.chain import Chain
from memnet.couplings import AdditiveCoupling
from memnet.nets.espcn import ESPCNRevNet

__all__ = ["measure_superresolution", "superresolution_table"]

_LIBRARIES = ("checkpoint_block", "memcnn", "revtorch", "iunets", "revlib")


def measure_superresolution(
    n_blocks: int = 4, batch_size: int = 12, patch_size: int = 11, rounds: int = 5, device: str = "cpu"
) -> dict[str, Cost]:
    """Measure a training step of ESPCN-RN of six channels and an upsampling rate of 2, in turn.

    Args:
        n_blocks: blocks of each of the three stacks.
        batch_size: patches a step.
        patch_size: voxels a side of a patch.
        rounds: timed steps of each.
        device: ``cpu`` or ``cuda``.

    Returns:
        ``naive``, then the other implementations' words and memnet's strategies; what is not installed is left out.
    """
    networks: dict[str, nn.Module] = {"naive": _network(n_blocks, "plain")}
    networks |= {name: _network(n_blocks, name) for name in _LIBRARIES if IMPLEMENTATIONS[name].missing is None}
    networks |= {memory: ESPCNRevNet(n_blocks=n_blocks, memory=memory) for memory in ("checkpoint", "invert")}
    networks = {name: network.to(device) for name, network in networks.items()}
    return measure_in_turn(training_step(batch_size, patch_size, device), networks, rounds, device)


def superresolution_table(costs: dict[str, Cost]) -> str:
    """Return a markdown table; time is compared with plain autograd's."""
    naive = costs["naive"]
    rows = []
    for name in ("naive", *_LIBRARIES, "checkpoint", "invert"):
        title = "plain autograd" if name == "naive" else IMPLEMENTATIONS[name].title
        if name not in costs:
            rows.append([title, IMPLEMENTATIONS[name].missing, "-", "-", "-"])
            continue
        cost = costs[name]
        memory = [shown(cost.peak / 2**20, 1), shown(cost.peak / naive.peak, 2)]
        rows.append([title, *memory, shown_range(cost.ratios(naive)), shown(cost.flops / naive.flops, 3)])
    return markdown_table(["stacks", "peak, MiB", "to plain", "time to plain", "operations to plain"], rows)


def _network(n_blocks: int, name: str) -> nn.Module:
    """Build the network and put its stacks, from the same branches, into another implementation."""
    network = ESPCNRevNet(n_blocks=n_blocks, memory="store")
    for i, layer in enumerate(network.layers):
        assert isinstance(layer, Chain)
        branches = [(block.f, block.g) for block in layer if isinstance(block, AdditiveCoupling)]
        if branches:
            stack = IMPLEMENTATIONS[name].build(branches)
            # the activation before a stack needs its output for its own gradient
            network.layers[i] = nn.Sequential(_Copy(), stack) if IMPLEMENTATIONS[name].takes_input else stack
    return network


class _Copy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()
