"""Memory, time and computation of training steps, measured in turn so that all meet the same load of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from memnet.accounting.live_memory import peak_live_bytes
from memnet.accounting.operations import count_flops

__all__ = ["Cost", "measure_in_turn"]


@dataclass(frozen=True)
class Cost:
    """A training step of one network.

    Attributes:
        peak: bytes alive at once in the forward and backward pass, parameters and their gradients apart.
        seconds: time of the step in each round: of the processor on a CPU, of the clock on a GPU.
        flops: floating-point operations of its matrix products and convolutions; 0 where they were not counted.
    """

    peak: int
    seconds: tuple[float, ...] = ()
    flops: int = 0

    @property
    def median(self) -> float:
        """Median time, seconds; NaN where none was taken."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    def ratios(self, other: Cost) -> list[float]:
        """Return the time in relation to another's, round by round."""
        return [mine / its for mine, its in zip(self.seconds, other.seconds, strict=True)]

    def pace(self, other: Cost) -> float:
        """Return the median of :meth:`ratios`; NaN where no time was taken."""
        ratios = self.ratios(other)
        return statistics.median(ratios) if ratios else float("nan")


def measure_in_turn(
    step: Callable[[Any], object],
    networks: Mapping[str, nn.Module],
    rounds: int,
    device: str = "cpu",
    warm_up: bool = True,
) -> dict[str, Cost]:
    """Measure a training step of several networks in one process.

    Args:
        step: forward and backward pass of a network. The networks' gradients are gone before each call, and there after the
            last.
        networks: what to measure, by name.
        rounds: each times one step of every network in turn; 0 measures memory alone.
        device: ``cpu`` or ``cuda``.
        warm_up: begin with a step of each, in which libraries choose and load their kernels, and operations are counted. On a
            GPU the first takes one in any case: a workspace that its libraries keep would be counted as that one's.
    """
    if device == "cuda" and not warm_up and networks:
        step(next(iter(networks.values())))
    peaks, flops = {}, {}
    for name, network in networks.items():
        flops[name] = count_flops(partial(step, network)) if warm_up else 0
        network.zero_grad(set_to_none=True)
        peaks[name] = peak_live_bytes(partial(step, network), network.parameters(), device)
    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(rounds):
        for name, network in networks.items():
            network.zero_grad(set_to_none=True)
            _wait(device)
            begin = clock()
            step(network)
            _wait(device)
            seconds[name].append(clock() - begin)
    return {name: Cost(peaks[name], tuple(seconds[name]), flops[name]) for name in networks}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
