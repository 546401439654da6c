"""Whether a memory format or compilation pays."""

import pytest
import torch

from memnet.benchmarks.layouts import LAYOUTS, _LaidOut, measure, table
from memnet.benchmarks.measurement import Cost


def test_measures_each_layout_of_the_same_step():
    costs = measure("fully", 16, layouts=["contiguous", "channels last"], rounds=1)
    assert list(costs) == ["contiguous", "channels last"]
    assert all(cost.peak > 0 and len(cost.seconds) == 1 for cost in costs.values())
    assert costs["contiguous"].flops == costs["channels last"].flops > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_what_it_says(layout, monkeypatch):
    compiled, seen = [], []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    network = torch.nn.Conv3d(2, 4, 3)
    laid_out = _LaidOut(network, layout)
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    laid_out(torch.rand(1, 2, 4, 4, 4))
    expected = torch.channels_last_3d if "channels last" in layout else torch.contiguous_format
    assert seen[0].is_contiguous(memory_format=expected)
    assert network.weight.is_contiguous(memory_format=expected)
    assert compiled == [network] * ("compiled" in layout)


def test_ratios_are_to_the_first_layout():
    costs = {"contiguous": Cost(200 * 2**20, (2.0, 4.0)), "compiled": Cost(100 * 2**20, (1.0, 5.0))}
    lines = table({("UNet3D", 64, "float32"): costs}).splitlines()[2:]
    assert lines[1] == "| UNet3D | 64^3 | float32 | compiled | 100 | 0.50 | 0.88 (0.50-1.25) |"


def test_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="got folded"):
        measure("fully", 16, layouts=["folded"])
