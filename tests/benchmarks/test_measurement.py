"""What all benchmarks share: steps measured in turn, operations counted, tables printed."""

import math

import pytest
import torch
from torch import nn

from memnet.accounting.operations import count_flops
from memnet.benchmarks.measurement import Cost, measure_in_turn
from memnet.benchmarks.tables import markdown_table, shown


def test_steps_are_measured_in_turn_and_leave_gradients():
    calls: list[str] = []

    class Layer(nn.Linear):
        def __init__(self, name: str, width: int) -> None:
            super().__init__(1, width)
            self.name = name

    def step(network: Layer) -> None:
        assert network.weight.grad is None
        calls.append(network.name)
        network(torch.ones(1000, 1)).sum().backward()

    networks = {"narrow": Layer("narrow", 1), "wide": Layer("wide", 4)}
    costs = measure_in_turn(step, networks, rounds=2)
    assert calls == ["narrow", "narrow", "wide", "wide", "narrow", "wide", "narrow", "wide"]
    assert [len(cost.seconds) for cost in costs.values()] == [2, 2]
    assert [cost.flops for cost in costs.values()] == [
        2 * 2 * 1000 * width for width in (1, 4)
    ]  # no gradient of the input
    assert costs["wide"].peak - costs["narrow"].peak == 3 * 1000 * 4
    assert networks["narrow"].weight.grad is not None


def test_times_are_compared_round_by_round():
    # a machine that is ten times slower in the second round slows both
    first, second = Cost(1, (1.0, 10.0, 1.0)), Cost(1, (2.0, 20.0, 3.0))
    assert second.ratios(first) == [2.0, 2.0, 3.0] and second.pace(first) == 2.0
    assert math.isnan(Cost(1).median) and math.isnan(Cost(1).pace(Cost(1)))


def test_operations_of_forward_and_backward_pass_are_counted():
    x, layer = torch.ones(5, 3, requires_grad=True), nn.Linear(3, 7, bias=False)
    assert count_flops(lambda: layer(x)) == 2 * 5 * 3 * 7
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 5 * 3 * 7


def test_tables_are_markdown():
    assert markdown_table(["a", "b"], [["x", shown(1.26, 1)], ["y", shown(None, 1)]]).splitlines() == [
        "| a | b |",
        "|---|---|",
        "| x | 1.3 |",
        "| y | - |",
    ]
    assert shown(math.nan, 2) == "-"
    with pytest.raises(ValueError, match="1 cells in a table of 2"):
        markdown_table(["a", "b"], [["x"]])
