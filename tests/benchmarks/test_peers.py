"""memnet beside other libraries: what is compared is the same, what is missing is said, what breaks is seen."""

import json
import os
import sys
import time
import types
from dataclasses import replace

import pytest
import torch
from torch import nn

from memnet.benchmarks.measurement import Cost
from memnet.benchmarks.peers.chains import ChainCost, chain_table, draw_chains, measure_chains
from memnet.benchmarks.peers.gradients import measure_drift, measure_gradients
from memnet.benchmarks.peers.implementations import IMPLEMENTATIONS, norm_act_conv_branches
from memnet.benchmarks.peers.pitfalls import PROBES, ask, pitfall_table, probe_all
from memnet.benchmarks.peers.superresolution import measure_superresolution, superresolution_table
from memnet.benchmarks.peers.unets import U_NETS, NetworkCost, measure_unets, plan_unets, unet_table
from memnet.benchmarks.unrolled import STRATEGIES
from memnet.cli import main

OWN = ("plain", "checkpoint_block", "checkpoint_sqrt", "store", "checkpoint", "invert", "tiles")


class FakeSequence(nn.Module):
    """RevTorch's sequence as it should be."""

    def __init__(self, blocks):
        super().__init__()
        self.chain = IMPLEMENTATIONS["plain"].build([(block.f, block.g) for block in blocks])

    def forward(self, x):
        return self.chain(x)


class FakeBlock(nn.Module):
    def __init__(self, f, g):
        super().__init__()
        self.f, self.g = f, g


@pytest.fixture(autouse=True)
def absent(monkeypatch):
    """No other library, whatever the machine has."""
    for name, implementation in IMPLEMENTATIONS.items():
        if implementation.packages:
            packages = {f"absent_{module}": package for module, package in implementation.packages.items()}
            monkeypatch.setitem(IMPLEMENTATIONS, name, implementation._replace(packages=packages))


@pytest.fixture
def revtorch(monkeypatch):
    """A library that takes RevTorch's place."""
    module = types.ModuleType("revtorch.revtorch")
    module.ReversibleSequence, module.ReversibleBlock = FakeSequence, FakeBlock
    monkeypatch.setitem(sys.modules, "revtorch.revtorch", module)
    monkeypatch.setitem(IMPLEMENTATIONS, "revtorch", IMPLEMENTATIONS["revtorch"]._replace(packages={"json": "json==1"}))
    return module


def test_all_implementations_compute_the_same_function():
    torch.manual_seed(0)
    branches, x = norm_act_conv_branches(3, 2), torch.randn(1, 4, 5, 6, 7)
    expected = IMPLEMENTATIONS["plain"].build(branches)(x)
    for name in OWN:
        torch.testing.assert_close(IMPLEMENTATIONS[name].build(branches)(x), expected, rtol=0, atol=1e-3)
    reversed_order = IMPLEMENTATIONS["plain"].build([(g, f) for f, g in branches])(x)
    assert not torch.allclose(reversed_order, expected, atol=1e-2), "the check has no teeth"


def test_chains_grow_as_their_strategies_say():
    costs = {(c.name, c.depth): c for c in measure_chains([2, 16], 16, channels=4, size=16, rounds=1)}
    assert {name for name, _ in costs} == {*OWN} - {"store"}
    growth = {name: costs[name, 16].activations - costs[name, 2].activations for name in OWN if name != "store"}
    assert growth["plain"] > 14 * 1.9 and 14 < growth["checkpoint_block"] < 14 * 1.2
    assert growth["checkpoint_sqrt"] < 14 and abs(growth["invert"]) < 0.5 and abs(growth["tiles"]) < 0.5
    assert costs["tiles", 16].activations < costs["invert", 16].activations
    operations = {name: costs[name, 16].cost.flops / costs["plain", 16].cost.flops for name in ("checkpoint", "invert")}
    assert operations == pytest.approx({"checkpoint": 4 / 3, "invert": 4 / 3})


def test_chain_table_says_what_is_missing_and_compares_with_plain(tmp_path):
    def cost(name, depth, peak, *seconds):
        return ChainCost(name, depth, peak / 2**20, Cost(peak * 2**20, seconds, 3 * len(seconds)))

    costs = [cost("plain", 2, 10), cost("plain", 8, 40, 1.0, 2.0, 1.0), cost("invert", 2, 10)]
    costs.append(cost("invert", 8, 11, 1.5, 2.4, 1.4))
    lines = chain_table(costs, ("plain", "revlib", "invert")).splitlines()[2:]
    assert lines[0].split(" | ")[1:3] == ["10.0", "40.0"] and lines[0].endswith(
        "| +300.0 % | 1.00 (1.00-1.00) | 1.000 |"
    )
    assert "not installed (pip install --no-deps revlib==1.7.2)" in lines[1]
    assert lines[2].endswith("| +10.0 % | 1.40 (1.20-1.50) | 1.000 |")
    draw_chains(costs, tmp_path / "chains.png")
    assert (tmp_path / "chains.png").read_bytes().startswith(b"\x89PNG")


def test_gradients_on_the_grid_are_those_of_store_and_finer_grids_are_nearer():
    errors = {found.title: found for found in measure_gradients(4, 4, 4)}
    assert errors["memnet `invert`, fraction_bits=14"].equals_store is True
    assert errors["plain autograd"].equals_store is None and 0 < errors["plain autograd"].error < 1e-5
    coarse, fine = (errors[f"memnet `store`, fraction_bits={bits}"].error for bits in (14, 18))
    assert 2 * fine < coarse < 1e-3


def test_inversion_drifts_without_the_grid_alone():
    drifts = {drift.title: drift.error for drift in measure_drift(8, 4, 4)}
    assert 0 < drifts["floating point, streams in float32"] < 1e-4 < drifts["floating point, streams in bfloat16"]
    assert [error for title, error in drifts.items() if "grid" in title] == [0.0, 0.0]


def test_a_library_that_is_there_takes_part(revtorch):
    titles = [found.title for found in measure_gradients(2, 4, 4)]
    assert "RevTorch" in titles and "MemCNN" not in titles
    costs = measure_superresolution(1, 1, 5, rounds=0)
    assert list(costs) == ["naive", "checkpoint_block", "revtorch", "checkpoint", "invert"]
    assert costs["invert"].flops > costs["naive"].flops == costs["revtorch"].flops
    table = superresolution_table(costs)
    assert "| RevTorch | " in table and "| MemCNN | not installed" in table


def test_every_probe_holds_for_plain_autograd_and_all_but_one_for_memnet():
    for what, probe in PROBES.items():
        assert ask(probe, IMPLEMENTATIONS["plain"].build) == "yes", what
        expected = "RuntimeError" if what == "second derivative" else "yes"
        assert ask(probe, IMPLEMENTATIONS["invert"].build) == expected, what


class Careless(torch.autograd.Function):
    """What reversible libraries get wrong: draws twice, moves statistics twice, writes ``.grad``."""

    @staticmethod
    def forward(ctx, chain, x):
        ctx.chain, ctx.x = chain, x.detach()
        with torch.no_grad():
            return chain(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            ctx.chain(x).backward(gradient)
        return None, x.grad


class CarelessChain(FakeSequence):
    def forward(self, x):
        return Careless.apply(self.chain, x)


def test_probes_see_what_is_wrong():
    def build(branches):
        return CarelessChain([FakeBlock(f, g) for f, g in branches])

    wrong = {
        "an input that needs no gradient",
        "`torch.autograd.grad`, nothing written to `.grad`",
        "dropout: gradient of the same masks",
        "dropout: random state afterwards",
        "batch norm: statistics move once",
        "`DistributedDataParallel(find_unused_parameters=True)`",
    }
    answers = {what: ask(probe, build) for what, probe in PROBES.items()}
    assert all(answers[what] != "yes" for what in wrong), answers
    assert answers["gradient of every parameter"] == answers["hooks see each gradient once and whole"] == "yes"


def works(build) -> bool:
    # a GPU's runtime that this process has started must not be inherited, and what is set here is not either
    return "NOTED_BY_THE_PARENT" not in vars(torch)


def ends(build) -> bool:
    os._exit(11)


def waits(build) -> bool:
    time.sleep(60)
    return True


def test_a_library_that_crashes_or_hangs_is_an_answer(monkeypatch):
    monkeypatch.setattr(torch, "NOTED_BY_THE_PARENT", True, raising=False)
    monkeypatch.setattr("memnet.benchmarks.peers.pitfalls.PROBES", {"works": works, "ends": ends, "waits": waits})
    answers = probe_all(("plain",), patience=12.0)
    assert answers == {"plain": {"works": "yes", "ends": "crash", "waits": "hang"}}
    assert "| works | yes | - |" in pitfall_table(answers, ("plain", "memcnn"))


def test_foretold_unets_are_those_measured():
    names = ("segresnet_vae_checkpoint",)
    measured, foretold = measure_unets(16, 0, names), plan_unets(16, names)
    for one, other in zip(measured, foretold, strict=True):
        assert (one.name, one.parameters, one.measured, other.measured) == (other.name, other.parameters, True, False)
        assert other.cost.peak == pytest.approx(one.cost.peak, rel=0.05)
    assert [cost.name for cost in measured] == list(names)


def test_checkpointed_blocks_need_less():
    names = ("segresnet", "segresnet_checkpoint", "dynunet", "dynunet_checkpoint")
    peaks = [cost.cost.peak for cost in plan_unets(32, names)]
    assert peaks[1] < 0.9 * peaks[0] and peaks[3] < 0.9 * peaks[2]


def test_unet_table_has_memory_at_all_sizes_and_time_at_the_smallest(monkeypatch):
    monkeypatch.setitem(U_NETS, "iunet", U_NETS["iunet"]._replace(missing="not installed"))
    first = NetworkCost("unet", 64, 2_500_000, Cost(100 * 2**20, (1.0, 1.0)))
    costs = [first, replace(first, name="fully", cost=Cost(50 * 2**20, (1.5, 1.7)))]
    costs.append(replace(first, name="fully", patch=128, measured=False, cost=Cost(400 * 2**20)))
    header, _, unet, fully, iunet = unet_table(costs, ("unet", "fully", "iunet")).splitlines()
    assert "| 64^3, MiB | 128^3, foretold, MiB | time at 64^3, s |" in header
    assert unet == "| MONAI UNet | 2.50 | 100 | - | 1.00 | 1.00 (1.00-1.00) |"
    assert fully.endswith("| 2.50 | 50 | 400 | 1.60 | 1.60 (1.50-1.70) |")
    assert iunet.startswith("| iUNet-32 | not installed | - |")


def test_command_writes_tables_and_raw_numbers(tmp_path, capsys):
    words = [
        "bench",
        "--quick",
        "--device",
        "cpu",
        "--output_dir",
        str(tmp_path),
        "--only",
        "chains",
        "espcn",
        "gradients",
        "unrolled",
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert (
        "no other library" in printed and "| MemCNN | not installed (pip install --no-deps memcnn==1.5.2) |" in printed
    )
    content = json.loads((tmp_path / "chains.json").read_text())
    assert {(r["name"], r["depth"]) for r in content["records"]} >= {("plain", 2), ("invert", 4)}
    assert (tmp_path / "chains.md").read_text() in printed + "\n"
    strategies = {r["strategy"]: r["peak"] for r in json.loads((tmp_path / "unrolled.json").read_text())["records"]}
    assert set(strategies) == set(STRATEGIES) and strategies["tiles"] < strategies["plain"]
    assert {file.name for file in tmp_path.iterdir()} == {
        *(f"{part}.{kind}" for part in ("chains", "espcn", "gradients", "unrolled") for kind in ("json", "md")),
        "chains.png",
    }


def test_implementations_are_chosen(tmp_path, capsys):
    words = ["bench", "--only", "chains", "--depths", "1", "3", "--timed_depth", "1", "--channels", "4", "--size", "6"]
    words += ["--rounds", "0", "--device", "cpu", "--output_dir", str(tmp_path), "--implementations", "plain", "tiles"]
    assert main(words) == 0
    assert {r["name"] for r in json.loads((tmp_path / "chains.json").read_text())["records"]} == {"plain", "tiles"}
    assert "| memnet `invert`, in tiles | " in capsys.readouterr().out


def test_what_is_not_there_alone_is_a_row_that_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(U_NETS, "iunet", U_NETS["iunet"]._replace(missing="pip install iunets==0.1"))
    assert "pip install iunets==0.1" in unet_table([], ["iunet"])
    words = ["bench", "--quick", "--only", "chains", "--implementations", "memcnn", "--output_dir", str(tmp_path)]
    assert main(words) == 0
    assert "pip install" in capsys.readouterr().out and not (tmp_path / "chains.png").exists()


def test_of_a_patch_foretold_and_measured_the_measured_counts():
    cost = Cost(2**20, (1.0,), 1)
    measured = NetworkCost("fully", 64, 1, cost, measured=True)
    table = unet_table(
        [measured, replace(measured, cost=replace(cost, peak=2**22, seconds=()), measured=False)], ["fully"]
    )
    assert "foretold" not in table and "| 1.00 |" in table
