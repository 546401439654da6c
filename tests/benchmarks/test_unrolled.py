"""The comparison of MoDL's memory strategies, at a size that takes no time."""

import json

import numpy as np
import pytest
from PIL import Image

from memnet.benchmarks.unrolled import STRATEGIES, compare_strategies, simulated_slab, table
from memnet.cli import main


@pytest.fixture(scope="module")
def costs():
    found = compare_strategies(2, (2, 8, 32), n_coils=2, channels=8, tile=(8,), cg_iterations=3, rounds=1)
    return {cost.strategy: cost for cost in found}


def test_exact_strategies_have_no_error_and_the_published_one_has(costs):
    assert costs["plain"].error == 0
    assert all(costs[name].error < 1e-5 for name in ("checkpoint", "tiles", "tiles, images on host"))
    assert costs["published"].error > 1e-4


def test_each_strategy_needs_less_than_the_one_before(costs):
    peaks = [costs[name].peak for name in ("plain", "checkpoint", "tiles", "tiles, images on host")]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)


def test_the_table_holds_ratios_to_plain_backpropagation(costs):
    lines = table(list(costs.values())).splitlines()
    assert len(lines) == 2 + len(STRATEGIES)
    ratio = costs["tiles"].peak / costs["plain"].peak
    assert f"| {ratio:.2f} |" in next(line for line in lines if line.startswith("| tiles |"))


def test_the_simulated_data_are_undersampled_and_the_same_each_time():
    kspace, csm, mask = simulated_slab((2, 16, 24), 3)
    assert kspace.shape == csm.shape == (1, 3, 2, 16, 24) and mask.shape == (1, 1, 1, 16, 24)
    assert 0.25 < float(mask.float().mean()) < 0.6
    assert (kspace[~mask.expand_as(kspace)] == 0).all()
    assert (simulated_slab((2, 16, 24), 3)[0] == kspace).all()


def test_the_command_prints_the_table_and_writes_numbers_and_picture(tmp_path, capsys):
    arguments = (
        "unrolled --unrolls 1 2 --shape 2 8 16 --coils 1 --channels 4 --tile 8 --rounds 1 --strategies tiles".split()
    )
    assert main([*arguments, "--device", "cpu", "--output_dir", str(tmp_path / "new")]) == 0
    assert "| tiles | 1 |" in capsys.readouterr().out
    written = json.loads((tmp_path / "new" / "unrolled.json").read_text())
    names = [(cost["strategy"], cost["n_unrolls"]) for cost in written["costs"]]
    assert names == [("plain", 1), ("tiles", 1), ("plain", 2), ("tiles", 2)]
    with Image.open(tmp_path / "new" / "unrolled.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="magic"):
        compare_strategies(1, strategies=["magic"])
