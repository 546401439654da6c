"""How memory grows, as it is foretold: the laws of the strategies, and what fits a budget."""

import numpy as np
import pytest

from memnet.benchmarks import scaling
from memnet.benchmarks.depth import GROWTH
from memnet.benchmarks.scaling import FACTORS, Foretold, foretell, largest, measure, measure_growth
from memnet.cli import main

CHAIN = {"batch": 2, "depth": 2, "width": 4, "side": 8}
UNROLLED = {"unrolls": 2, "coils": 2, "filters": 8, "slices": 8, "side": 12}


@pytest.mark.parametrize(
    ("memory", "least", "most"), [("store", 0.6, 1.01), ("checkpoint", 0.2, 0.6), ("invert", 0, 0.05)]
)
def test_depth_costs_what_the_strategy_says(monkeypatch, memory, least, most):
    monkeypatch.setitem(FACTORS, "depth", FACTORS["depth"]._replace(base=CHAIN, values=(4, 16)))
    growth = measure_growth("depth", memory)
    assert least <= growth.exponents[0] <= most and growth.exponents[1] == pytest.approx(1, abs=1e-6)
    assert growth.steps[1].state == 4 * growth.steps[0].state


@pytest.mark.parametrize(("factor", "key", "values"), [("volume", "side", (16, 32)), ("width", "width", (16, 32))])
def test_volume_and_width_have_their_exponents(monkeypatch, factor, key, values):
    # a side beside which copies of the weights, which grow with the square of the width, are little
    base = {**CHAIN, "side": 16}
    monkeypatch.setitem(FACTORS, factor, FACTORS[factor]._replace(base=base, values=values))
    growth = measure_growth(factor, "invert")
    assert growth.exponents == pytest.approx(FACTORS[factor].theory["invert"], abs=0.1)


def test_unrolls_cost_activations_where_they_are_stored():
    grown = {
        m: foretell({**UNROLLED, "unrolls": 6}, m).peak / foretell(UNROLLED, m).peak for m in ("plain", "checkpoint")
    }
    assert grown["plain"] > 2 and grown["checkpoint"] < 1.3


@pytest.mark.parametrize(
    ("sizes", "memory"), [(CHAIN, "store"), (CHAIN, "invert"), (UNROLLED, "plain"), (UNROLLED, "checkpoint")]
)
def test_what_is_foretold_is_what_a_run_takes(sizes, memory):
    assert foretell(sizes, memory).peak == pytest.approx(measure(sizes, memory), rel=0.05)


@pytest.mark.parametrize(("memory", "expected"), [("store", 50), ("checkpoint", 2500)])
def test_what_fits_lies_on_the_curve(memory, expected):
    def foretold(n: int, each: int = 0) -> Foretold:
        return Foretold(round(100 + 10 * float(GROWTH[memory][1](np.array([float(n)]))[0])), 0, each * n)

    known = {n: foretold(n) for n in (16, 64)}
    assert largest(known, 600, GROWTH[memory][1]) == expected
    known = {n: foretold(n, 5) for n in (16, 64)}
    found = largest(known, 1000, GROWTH[memory][1])
    assert foretold(found, 5).total <= 1001 and foretold(found + 1, 5).total >= 1000
    assert largest(known, 50, GROWTH[memory][1]) == 0


def test_what_does_not_grow_is_limited_by_its_parameters():
    known = {n: Foretold(100, 0, 5 * n) for n in (2, 4)}
    assert largest(known, 600, GROWTH["invert"][1]) == 100


def test_command_prints_exponents_and_what_fits(monkeypatch, capsys):
    volume = FACTORS["volume"]._replace(base=CHAIN, values=(16, 32), theory={"store": (1, 1)})
    monkeypatch.setitem(FACTORS, "volume", volume)
    monkeypatch.setattr(scaling, "DEEP_CHAIN", CHAIN)
    assert main(["scaling", "--factors", "volume", "--largest", "depth", "--budgets", "4MiB", "--measure"]) == 0
    printed = capsys.readouterr().out
    growth = measure_growth("volume", "store")
    assert f"| {growth.exponents[0]:.2f} (1) | {growth.exponents[1]:.2f} (1) |" in printed
    known = {n: foretell({**CHAIN, "depth": n}, "store") for n in (4, 16)}
    assert f"| store | {largest(known, 2**22, GROWTH['store'][1])} |" in printed
