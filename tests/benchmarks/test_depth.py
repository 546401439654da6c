"""Memory and computation against depth: what is measured, and how its growth is fitted."""

import json

import numpy as np
import pytest

from memnet.benchmarks.depth import GROWTH, DepthCost, fit_depths, measure_depths
from memnet.cli import main


def law(memory: str, depth: int) -> float:
    return float(1000 + 500 * GROWTH[memory][1](np.array([float(depth)]))[0])


@pytest.fixture(scope="module")
def costs():
    found = measure_depths([1, 4, 16], channels=4, size=4, rounds=1)
    return {(cost.memory, cost.depth): cost for cost in found}


def test_convolutions_run_as_often_as_the_strategies_say(costs):
    # a backward pass counts as two forward passes; recursion runs half of the chain again at each halving
    runs = {"store": 1, "checkpoint": 2, "invert": 2}
    for (memory, depth), cost in costs.items():
        forward = runs.get(memory, 2 + np.log2(depth) / 2)
        assert cost.flops / costs["store", depth].flops == pytest.approx((forward + 2) / 3), (memory, depth)


def test_memory_grows_as_the_strategies_say(costs):
    state = 2 * 2 * 4 * 4**3 * 4  # two streams of batch 2, float32
    grown = {memory: costs[memory, 16].peak - costs[memory, 4].peak for memory in GROWTH}
    assert grown["store"] > 12 * state
    assert grown["checkpoint"] < 0.5 * grown["store"]
    assert 1.5 * state < grown["recursive"] < 3 * state
    assert grown["invert"] < 0.1 * state


def test_fits_find_the_law_that_made_the_values():
    made = [DepthCost(memory, depth, round(law(memory, depth)), 1, 1.0) for memory in GROWTH for depth in (2, 8, 64)]
    for fit in fit_depths(made):
        assert fit.offset == pytest.approx(1500 if fit.memory == "invert" else 1000, abs=2)
        if fit.memory == "invert":
            assert fit.exponent == pytest.approx(0, abs=1e-6) and fit.r_squared is None
        else:
            assert fit.slope == pytest.approx(500, rel=0.01) and fit.r_squared > 0.999
    squares = [DepthCost(memory, depth, depth**2, 1, 1.0) for memory in GROWTH for depth in (2, 8, 64)]
    assert [fit.exponent for fit in fit_depths(squares)] == pytest.approx([2.0] * 4)
    assert next(fit.r_squared for fit in fit_depths(squares) if fit.memory == "recursive") < 0.9
    with pytest.raises(ValueError, match="at least 3"):
        fit_depths(made[:2])


def test_command_writes_table_numbers_and_picture(tmp_path, capsys):
    arguments = ["depth", "--depths", "1", "2", "3", "--channels", "4", "--size", "4", "--rounds", "1"]
    assert main([*arguments, "--output_dir", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "depth.json").read_text())
    assert len(written["costs"]) == 12 and [fit["memory"] for fit in written["fits"]] == list(GROWTH)
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith("| L | store, MiB | checkpoint, MiB |")


def test_depths_too_few_for_a_fit_are_refused_before_any_is_measured(capsys, monkeypatch):
    monkeypatch.setattr("memnet.benchmarks.depth.measure_depths", lambda *_: pytest.fail("measured"))
    assert main(["depth", "--depths", "2", "4", "4"]) == 1
    assert "at least 3 depths, got 2 4 4" in capsys.readouterr().err
