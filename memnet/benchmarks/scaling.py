"""How memory and operations grow with what is trained, and how much of it fits, foretold: ``python -m memnet scaling``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from memnet.accounting.dry_run import dry_run
from memnet.accounting.live_memory import peak_live_bytes
from memnet.accounting.planner import TrainingStep
from memnet.benchmarks.depth import GROWTH
from memnet.benchmarks.tables import markdown_table, shown
from memnet.benchmarks.unrolled import simulated_slab, unrolled_network
from memnet.budget import parse_bytes
from memnet.chain import Chain
from memnet.couplings import AdditiveCoupling
from memnet.nets.segmentation import norm_act_conv

__all__ = ["FACTORS", "Factor", "Growth", "foretell", "largest", "measure", "measure_growth"]

Sizes = Mapping[str, int]
Law = Callable[[np.ndarray], np.ndarray]

CHAIN: dict[str, int] = {"batch": 2, "depth": 8, "width": 16, "side": 32}
"""A chain of couplings of instance norm, leaky ReLU and 3^3 convolution: couplings, channels of each of the two streams, and the
side of the cube, voxels; float32."""

UNROLLED: dict[str, int] = {"unrolls": 4, "coils": 4, "filters": 16, "slices": 24, "side": 24}
"""MoDL of 8 iterations of conjugate gradients on ``(slices, side, side)`` voxels."""

DEEP_CHAIN = CHAIN | {"batch": 1, "side": 128}
SLAB = {"coils": 8, "filters": 64, "slices": 32, "side": 256}


class Factor(NamedTuple):
    """What is varied.

    Attributes:
        base: the sizes of what it is varied in, :data:`CHAIN` or :data:`UNROLLED`.
        key: its name among them.
        values: what it is, in turn.
        power: the exponent of what it stands for, 3 for a side's volume.
        theory: by strategy, the exponents of memory and of operations once this factor outweighs all else; those of a logarithm
            tend to 0, and to 1 for L log L.
    """

    base: dict[str, int]
    key: str
    values: tuple[int, ...]
    power: int
    theory: dict[str, tuple[float, float]]


FACTORS: dict[str, Factor] = {
    "depth": Factor(
        CHAIN,
        "depth",
        (4, 9, 16, 36),
        1,
        {"store": (1, 1), "checkpoint": (0.5, 1), "recursive": (0, 1), "invert": (0, 1)},
    ),
    "width": Factor(CHAIN, "width", (16, 32, 64), 1, {"store": (1, 2), "invert": (1, 2)}),
    "volume": Factor(CHAIN, "side", (32, 48, 64), 3, {"store": (1, 1), "invert": (1, 1)}),
    "unrolls": Factor(UNROLLED, "unrolls", (2, 4, 8), 1, {"plain": (1, 1), "checkpoint": (0, 1)}),
    "coils": Factor(UNROLLED, "coils", (4, 8, 16), 1, {"plain": (1, 0), "checkpoint": (1, 0)}),
}
"""By what people call them, in words of :class:`memnet.Chain` and of :data:`memnet.benchmarks.unrolled.STRATEGIES`. Fourier
transforms are no operations here, and a coil adds nothing to the convolutions."""


class Foretold(NamedTuple):
    """A training step.

    Attributes:
        peak: bytes alive at once, parameters and their gradients apart.
        flops: floating-point operations of convolutions and matrix products.
        state: bytes of the parameters, their gradients and the two averages of Adam.
    """

    peak: int
    flops: int
    state: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.peak + self.state


class Growth(NamedTuple):
    """How a step grows with a factor under a strategy.

    Attributes:
        factor: a word of :data:`FACTORS`.
        memory: the strategy.
        steps: the step for each value.
        exponents: of memory and operations: p of the least-squares lines of log(peak) and log(flops) against log(factor).
    """

    factor: str
    memory: str
    steps: tuple[Foretold, ...]
    exponents: tuple[float, float]


def foretell(sizes: Sizes, memory: str) -> Foretold:
    """Simulate a step of a chain or, where ``sizes`` has ``unrolls``, of MoDL; see :func:`memnet.accounting.dry_run.dry_run`."""
    n_parameters = 0

    def make() -> tuple[Callable[[], object], Iterable[torch.Tensor]]:
        nonlocal n_parameters
        run, parameters = _step(sizes, memory)
        n_parameters = sum(p.numel() for p in parameters)
        return run, parameters

    found = dry_run(make)
    return Foretold(found.peak, found.flops, 4 * 4 * n_parameters)


def measure(sizes: Sizes, memory: str) -> int:
    """Run the same step on a CPU and return its peak, bytes."""
    torch.manual_seed(0)
    return peak_live_bytes(*_step(sizes, memory))


def measure_growth(factor: str, memory: str) -> Growth:
    """Foretell a step for each value of a factor, and fit the exponents."""
    base, key, values, power, _ = FACTORS[factor]
    steps = tuple(foretell({**base, key: value}, memory) for value in values)
    amounts = power * np.log(values)

    def exponent(of: Sequence[int]) -> float:
        return float(np.polyfit(amounts, np.log(of), 1)[0])

    fitted = exponent([step.peak for step in steps]), exponent([step.flops for step in steps])
    return Growth(factor, memory, steps, fitted)


def largest(known: Mapping[int, Foretold], budget: int, law: Law) -> int:
    """Return the largest n that fits, where memory is a + b law(n) and the parameters' grow in proportion; 0 if none does.

    Args:
        known: two steps that were foretold, by their n.
        budget: bytes in all.
        law: how the activations grow.
    """
    (n, m), (first, second) = known, known.values()
    at_n, at_m = (float(law(np.array([float(i)]))[0]) for i in (n, m))
    slope = (second.peak - first.peak) / (at_m - at_n) if at_m != at_n else 0.0
    each = (second.state - first.state) / (m - n)

    def fits(i: int) -> bool:
        activations = second.peak + slope * (float(law(np.array([float(i)]))[0]) - at_m)
        return activations + second.state + each * (i - m) <= budget

    least, most = 0, 1
    while fits(most) and most < 2**40:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def _step(sizes: Sizes, memory: str) -> tuple[Callable[[], object], list[torch.Tensor]]:
    n = sizes["side"]
    if "unrolls" in sizes:
        network = unrolled_network(memory, sizes["unrolls"], 3, sizes["filters"])
        data = simulated_slab((sizes["slices"], n, n), sizes["coils"])
        return (lambda: network(*data).abs().square().mean().backward()), list(network.parameters())
    width = sizes["width"]
    branches = [[norm_act_conv(3, width, width) for _ in range(2)] for _ in range(sizes["depth"])]
    chain = Chain([AdditiveCoupling(f, g) for f, g in branches], memory)  # type: ignore[arg-type]
    state = [torch.rand(sizes["batch"], width, n, n, n, requires_grad=True) for _ in range(2)]
    upstream = [torch.ones_like(x) for x in state]
    return (lambda: torch.autograd.backward(chain(*state), upstream)), list(chain.parameters())


def _growth_table(found: Sequence[Growth], measured: bool) -> str:
    columns = ["factor", "`memory`", "foretold, MiB", *(["first, measured"] if measured else [])]
    rows = []
    for growth in found:
        base, key, values, power, theory = FACTORS[growth.factor]
        row = [f"{growth.factor} ({', '.join(f'{v}^{power}' if power > 1 else str(v) for v in values)})", growth.memory]
        row.append(", ".join(shown(step.peak / 2**20, 1) for step in growth.steps))
        if measured:
            row.append(shown(measure({**base, key: values[0]}, growth.memory) / 2**20, 1))
        for fitted, expected in zip(growth.exponents, theory[growth.memory], strict=True):
            row.append(f"{shown(round(fitted, 2) + 0.0, 2)} ({expected:g})")
        rows.append(row)
    return markdown_table([*columns, "memory, exponent (theory)", "operations, exponent (theory)"], rows)


def _largest_table(budgets: Sequence[str], parts: Sequence[str]) -> str:
    rows: list[list[object]] = []
    limits = [parse_bytes(budget) for budget in budgets]
    if "side" in parts:
        network = {"_target_": "memnet.FullyInvResUNet", "in_channels": 4, "out_channels": 3, "memory": "invert"}
        step = TrainingStep({"network_def": network, "loss": {"_target_": "memnet.InvResLoss"}})
        for memory in ("store", "checkpoint", "invert"):
            plans = [step.plan(memory, patch=[side] * 3, batch=1) for side in (64, 96)]
            cubes = {plan.patch[0]: Foretold(plan.peak, plan.flops, plan.state) for plan in plans}
            sides = [largest(cubes, limit, lambda n: n**3) // 16 * 16 for limit in limits]
            rows.append(["cube of Fully-InvRes-32", memory, *(f"{side}^3" if side else "-" for side in sides)])
    cases: list[tuple[str, str, dict[str, int], str, tuple[int, int], Law]] = []
    if "depth" in parts:
        name = f"couplings of {2 * DEEP_CHAIN['width']} channels, {DEEP_CHAIN['side']}^3"
        # 4 and 16 are squares and powers of two, where the laws of checkpoints and of recursion have no corners
        cases += [(name, memory, DEEP_CHAIN, "depth", (4, 16), law) for memory, (_, law) in GROWTH.items()]
    if "unrolls" in parts:
        slab = "{slices} x {side} x {side}, {coils} coils".format(**SLAB)
        cases += [
            (f"unrolls of MoDL-{SLAB['filters']}, {slab}", memory, SLAB, "unrolls", (2, 4), GROWTH["store"][1])
            for memory in ("plain", "checkpoint", "tiles")
        ]
    for name, memory, sizes, key, values, law in cases:
        known = {value: foretell({**sizes, key: value}, memory) for value in values}
        rows.append([name, memory, *(largest(known, limit, law) or "-" for limit in limits)])
    return markdown_table(["largest", "`memory`", *budgets], rows)


def add_parser(commands: Any) -> None:
    """Add the command ``scaling`` to the subparsers of the command line."""
    parser = commands.add_parser(
        "scaling", help="how memory and operations grow with depth, width, volume, unrolls and coils, and what fits"
    )
    parser.add_argument("--factors", nargs="*", choices=list(FACTORS), default=list(FACTORS))
    parser.add_argument(
        "--largest", nargs="*", choices=["side", "depth", "unrolls"], default=["side", "depth", "unrolls"]
    )
    parser.add_argument("--budgets", nargs="+", default=["8GiB", "12GiB", "24GiB", "80GiB"], help="of one card")
    parser.add_argument("--measure", action="store_true", help="also run the first step of each row on the CPU")
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.factors:
        pairs = [(factor, memory) for factor in arguments.factors for memory in FACTORS[factor].theory]
        print(_growth_table([measure_growth(*pair) for pair in pairs], arguments.measure), flush=True)
    if arguments.largest:
        print(f"\n{_largest_table(arguments.budgets, arguments.largest)}")
