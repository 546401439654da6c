"""What the planner foretells is what a step then takes, for any network that a config names."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import MEMORIES
from monai.bundle import ConfigParser
from monai.networks.nets import SwinUNETR

import memnet
from memnet.accounting.dry_run import building, dry_run
from memnet.accounting.fitting import fill_budget, largest_patch
from memnet.accounting.live_memory import peak_live_bytes
from memnet.accounting.planner import Plan, TrainingStep
from memnet.budget import parse_bytes
from memnet.cli import main
from memnet.diffusion.superresolution import TensorLoss
from memnet.nets.packed import PackedMoDL, pack
from memnet.overrides import read_override

CONTENT: dict[str, Any] = {
    "network_name": "fully",
    "batch_size": 1,
    "patches_per_volume": 2,
    "patch_size": [24, 24, 24],
    "network_def": {
        "_target_": "memnet.workflow.networks.segmentation_network",
        "name": "@network_name",
        "in_channels": 2,
        "out_channels": 3,
        "channels": 8,
        "n_levels": 2,
        "memory": None,
    },
    "loss": {"_target_": "memnet.InvResLoss"},
}
PEER = {"_target_": "BasicUNet", "in_channels": 2, "out_channels": 3, "features": [8, 8, 16, 16, 16, 8]}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "train.json"
    file.write_text(json.dumps(CONTENT))
    return file


def measured(memory: str | None, precision: str, patch: list[int], batch: int, **changes: Any) -> int:
    """Peak of the step that the config describes, on real tensors."""
    parser = ConfigParser(copy.deepcopy({**CONTENT, **changes}))
    if memory is not None:
        parser["network_def#memory"] = memory
    network, loss = parser.get_parsed_content("network_def"), parser.get_parsed_content("loss")
    image, label = torch.rand(batch, 2, *patch), torch.zeros(batch, 1, *patch)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            prediction = network(image)
        loss(prediction, label).backward()

    return peak_live_bytes(step, network.parameters())


@pytest.mark.parametrize(
    ("name", "memory", "precision", "patch", "batch"),
    [
        *[(name, memory, "float32", [24] * 3, 1) for name in ("partially", "fully") for memory in MEMORIES],
        ("baseline", "store", "float32", [24] * 3, 1),
        ("fully", "store", "float32", [24] * 3, 1),
        ("fully", "invert", "float32", [32, 24, 16], 1),
        ("fully", "invert", "bfloat16", [24] * 3, 1),  # 0.78 of it without what oneDNN copies and sums
        ("partially", "invert", "bfloat16", [24] * 3, 2),
    ],
)
def test_foretells_the_measured_peak(config, name, memory, precision, patch, batch):
    step = TrainingStep(config, {"network_name": name})
    plan = step.plan(memory, precision, patch, batch)
    assert plan.peak == pytest.approx(measured(memory, precision, patch, batch, network_name=name), rel=0.05)


def test_any_network_of_a_config_is_foretold(config):
    step = TrainingStep(config, {"network_def": PEER})
    assert step.strategies == [None]
    assert TrainingStep(config, {"network_name": "baseline"}).strategies == ["store", "checkpoint", "recursive"]
    assert step.plan(None, patch=[32] * 3, batch=1).peak == pytest.approx(
        measured(None, "float32", [32] * 3, 1, network_def=PEER), rel=0.05
    )


BUNDLES = Path(__file__).parents[2] / "bundles"


@pytest.mark.parametrize("memory", ["store", "invert"])
def test_super_resolution_is_foretold(memory):
    step = TrainingStep(
        BUNDLES / "brain_dti_superres_iqt" / "configs" / "train.json", {"n_blocks": 2, "batch_size": 3, "patch_size": 7}
    )
    network, loss = memnet.ESPCNRevNet(n_blocks=2, memory=memory), TensorLoss("squared")
    image, label = torch.rand(3, 6, 7, 7, 7), torch.rand(3, 7, 6, 6, 6)
    peak = peak_live_bytes(lambda: loss(network(image), label).backward(), network.parameters())
    assert step.plan(memory).peak == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize(
    ("bundle", "memory", "shape", "tile"),
    [
        ("knee_mri_recon_mel", "checkpoint", [6, 12, 24], [12]),
        ("knee_mri_recon_mel", "store", [6, 12, 24], None),
        ("cardiac_cine_recon_mel", "checkpoint", [5, 16, 16], [8]),
    ],
)
def test_reconstruction_is_foretold(bundle, memory, shape, tile):
    numbers = {"n_coils": 3, "n_unrolls": 1, "channels": 8, "tile": tile}
    step = TrainingStep(BUNDLES / bundle / "configs" / "train.json", numbers)
    consistency = memnet.DataConsistency(mu=0.25, max_iterations=10)
    arguments = {"n_unrolls": 1, "channels": 8, "tile": tile, "memory": memory}
    network = PackedMoDL(3, data_consistency=consistency, **arguments)
    image, target = (
        pack(*(torch.randn(n, *shape, dtype=torch.complex64) for n in (3, 3, 1)))[None],
        torch.rand(1, 2, *shape),
    )
    loss = torch.nn.L1Loss()
    peak = peak_live_bytes(lambda: loss(network(image), target).backward(), network.parameters())
    assert step.plan(memory, patch=shape).peak == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("contraction", [None, 0.9])
def test_approximate_inverses_can_be_planned(contraction):
    numbers = {"n_coils": 2, "n_unrolls": 2, "channels": 4, "tile": None, "network_def#contraction": contraction}
    step = TrainingStep(BUNDLES / "knee_mri_recon_mel" / "configs" / "train.json", numbers)
    plans = {memory: step.plan(memory, patch=[4, 12, 12]).peak for memory in ("store", "invert")}
    assert 0 < plans["invert"] < plans["store"]
    block = memnet.InvertibleResidual(torch.nn.Conv1d(2, 2, 3, padding=1))

    def make():
        chain, x = memnet.Chain([copy.deepcopy(block)], "invert"), torch.empty(1, 2, 64, requires_grad=True)
        return lambda: chain(x).sum().backward(), list(chain.parameters())

    assert dry_run(make).peak > 0


def test_overrides_are_those_of_the_bundle():
    knee = TrainingStep(BUNDLES / "knee_mri_recon_mel" / "configs" / "train.json")
    with pytest.raises(ValueError, match="--shape"):
        knee.plan("checkpoint")
    plan = Plan("checkpoint", "float32", (4, 8, 8), 1, 0, 0, 0)
    assert knee.overrides(plan) == "--slab_size 4 --memory checkpoint --amp false"
    superres = TrainingStep(BUNDLES / "brain_dti_superres_iqt" / "configs" / "train.json")
    assert superres.patch == (11, 11, 11) and superres.batch == 12
    plan = plan._replace(patch=(9, 9, 9), batch=12)
    assert superres.overrides(plan) == "--patch_size 9 --memory checkpoint --amp false"
    assert superres.overrides(plan._replace(patch=(9, 9, 7))).startswith('--patch_size "[9, 9, 7]" --memory')


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("False", False),
        ("true", True),
        ("None", None),
        ("null", None),
        ("3", 3),
        ("[1, 2]", [1, 2]),
        ("Fully", "Fully"),
    ],
)
def test_words_of_overrides_are_what_monais_command_line_takes_them_for(word, value):
    """``vae=False`` was a word, and true."""
    assert read_override(f"a#b={word}") == ("a#b", value)


def test_overrides_are_those_of_the_step_that_was_planned(config):
    """The batch and the values of ``--set`` were lost, and what was pasted took four times as much."""
    file = BUNDLES / "brain_mri_tissue_invres" / "configs" / "train.json"
    given = {"vae": False, "network_def#channels": 16, "memory": "store"}
    step = TrainingStep(file, given)
    plan = Plan("invert", "float32", (64, 64, 64), step.batch, 0, 0, 0)
    pasted = step.overrides(plan)
    assert pasted == '--vae false --network_def#channels 16 --memory invert --patch_size "[64, 64, 64]" --amp false'
    assert "--batch_size 1 --patches_per_volume 3 --amp" in step.overrides(plan._replace(batch=3))


def test_the_thickest_slab(config):
    step = TrainingStep(config)
    found = largest_patch(step, 60 * 2**20, "invert", "float32", 2, 4, (0, 24, 16))
    thicker = step.plan("invert", patch=(found.patch[0] + 4, 24, 16), batch=2)
    assert found.patch[1:] == (24, 16) and found.total <= 60 * 2**20 < thicker.total


def test_the_largest_cube_lies_beyond_the_slow_kernel():
    """Cubes of up to 64^3 of 4 channels are unfolded, 27 times as many bytes: what is too much there may fit at 96^3."""
    content = {"network_def": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 4, "kernel_size": 1}}
    step = TrainingStep(content | {"patch_size": [16] * 3, "batch_size": 1})
    tried: list[int] = []

    def plan(memory: Any, precision: str, patch: list[int], batch: int) -> Plan:
        tried.append(patch[0])
        peak = 8 * 4 * patch[0] ** 3 * (5 if patch[0] <= 64 else 1)
        return Plan(memory, precision, tuple(patch), batch, peak, 0, 0)

    step.plan = plan  # type: ignore[method-assign]
    for side in (16, 40, 88, 104, 232):
        budget = plan(None, "", [side], 1).peak + 1
        tried.clear()
        found = largest_patch(step, budget, None, "float32")
        assert plan(None, "", [found.patch[0] + 8], 1).peak > budget >= found.peak
        assert len(tried) <= 8 and (found.patch[0] == side or side <= 64)


def test_operations_of_a_step(config):
    step = TrainingStep(config)
    stored, inverted, checkpointed = (step.plan(memory).flops for memory in ("store", "invert", "checkpoint"))
    # every convolution of the chain once more; those of stem and heads, which are outside, not
    assert 1.25 * stored < inverted < 4 / 3 * stored
    assert inverted == pytest.approx(checkpointed, rel=0.02)
    network = torch.nn.Conv1d(2, 3, 1, bias=False)

    def make():
        x = torch.rand(1, 2, 10)
        return (lambda: network(x).sum().backward()), network.parameters()

    assert dry_run(make).flops == 2 * (2 * 2 * 3 * 10)  # the forward pass and the weights' gradient


def test_gradients_are_summed_in_the_memory_of_the_first():
    def make():
        x = torch.rand(100_000, requires_grad=True)

        def run():
            ((x * 2).sum() + (x * 3).sum() + (x * 4).sum()).backward()

        return run, []

    run, parameters = make()
    assert dry_run(make).peak == pytest.approx(peak_live_bytes(run, parameters), rel=0.01)


def test_gradients_of_parameters_are_apart():
    def make():
        network = torch.nn.Sequential(*(torch.nn.Linear(300, 300) for _ in range(10)))
        x = torch.rand(1, 300)
        return (lambda: network(x).sum().backward()), network.parameters()

    # those of ten layers would be ten times as much; one may be copied on its way to its parameter
    assert dry_run(make).peak < 2 * (4 * 300 * 300)


def test_the_config_sets_what_is_not_said(config):
    step = TrainingStep(config)
    plan = step.plan("invert")
    assert (plan.patch, plan.batch) == ((24, 24, 24), 2)
    n_parameters = sum(p.numel() for p in ConfigParser(CONTENT).get_parsed_content("network_def").parameters())
    assert plan.total == plan.peak + 16 * n_parameters


def test_a_budget_is_filled_by_storing_what_fits(config):
    step = TrainingStep(config)
    stored, inverted = step.plan("store"), step.plan("invert")
    budget = (stored.total + inverted.total) // 2
    plan, share = fill_budget(step, budget, "float32")
    assert plan.total <= budget and share <= budget - step.state
    assert inverted.peak < plan.peak and stored.flops < plan.flops < inverted.flops
    assert fill_budget(step, inverted.total - (stored.total - inverted.total), "float32") is None
    assert fill_budget(TrainingStep(config, {"network_def": PEER}), budget, "float32") is None


def test_nothing_fits(config):
    assert largest_patch(TrainingStep(config), 2**20, "invert", "float32") is None


def test_command_prints_the_strategies(config, capsys):
    assert main(["plan", "--config_file", str(config), "--precision", "float32", "--memory", "store", "invert"]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [(row[0], row[-1]) for row in rows if row[1:3] == ["float32", "24 x 24 x 24"]] == [
        ("store", "1.00"),
        ("invert", "1.32"),
    ]


def test_command_says_what_it_leaves_out(config, capsys):
    needs = []
    for device, said in (("cpu", "With what a CPU's convolutions take"), ("cuda", "workspaces of a GPU's libraries")):
        command = ["plan", "--config_file", str(config), "--memory", "invert", "--precision", "float32"]
        assert main([*command, "--patch", "48", "--device", device]) == 0
        printed = capsys.readouterr().out
        assert said in printed
        needs.append(float(printed.splitlines()[2].split("|")[5]))
    assert needs[1] < needs[0]


def test_command_prints_the_overrides_of_the_largest_patch(config, capsys):
    words = ["--budget", "60MiB", "--batch", "1", "--precision", "float32", "--memory", "invert"]
    assert main(["plan", "--config_file", str(config), *words]) == 0
    pasted = r'float32, with --patch_size "\[(\d+), \1, \1\]" --batch_size 1 --patches_per_volume 1 --network_def#memory invert'
    found = re.search(pasted, capsys.readouterr().out)
    side, step = int(found.group(1)), TrainingStep(config)
    smaller, larger = (step.plan("invert", patch=[n] * 3, batch=1).total for n in (side, side + 8))
    assert smaller <= 60 * 2**20 < larger


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config_file", "missing.json"], "missing.json: no such config"),
        (["--budget", "12 apples"], "'12 apples' is no amount of memory"),
        (["--network_id", "generator"], "has no generator"),
        (["--set", "network_name"], "'network_name' is no override"),
        (["--patch", "-4"], "--patch is -4, expected at least 1"),
        (["--batch", "-1"], "--batch is -1, expected at least 0"),
        (["--shape", "16", "16"], "--shape has 2 sizes, the network's patches have 3"),
        (["--set", "network_nam=partially"], "'network_nam' is no setting of the config; did you mean 'network_name'?"),
    ],
)
def test_bad_arguments_are_refused_in_a_line(config, words, said, capsys):
    assert main(["plan", "--config_file", str(config), *words]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "n"), [("12GiB", 12 * 2**30), ("800 MB", 8 * 10**8), ("1e9", 10**9), ("2g", 2 * 10**9)]
)
def test_amounts_of_memory(text, n):
    assert parse_bytes(text) == n


def test_a_budget_below_the_least_that_a_network_can_run(tmp_path, capsys):
    """Patches that are halved to a single voxel are refused by instance norm: nothing fits, then."""
    file = tmp_path / "peer.json"
    file.write_text(json.dumps({"network_def": {**PEER, "spatial_dims": 2}}))
    step = TrainingStep(file)
    assert largest_patch(step, 10**5, None, "float32") is None
    assert main(["plan", "--config_file", str(file), "--budget", "100KiB", "--precision", "float32"]) == 1
    assert "nothing fits in 100KiB" in capsys.readouterr().err
    assert main(["plan", "--config_file", str(file), "--budget", "64MiB", "--precision", "float32"]) == 0
    assert re.search(r"Fits in 64MiB: a patch of (\d+) x \1 in float32\n", capsys.readouterr().out)
    assert main(["plan", "--config_file", str(file), "--memory", "invert"]) == 1
    assert "knows no memory strategy" in capsys.readouterr().err


STRIDED = {
    "_target_": "UNet",
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [4] * 5,
    "strides": [2] * 4,
}


def test_a_network_that_takes_multiples_of_16_alone(tmp_path, capsys):
    """Others were taken for too small, or ended in a traceback, and the answer was less than what the table showed to fit."""
    file = tmp_path / "strided.json"
    file.write_text(json.dumps({"network_def": STRIDED, "patch_size": [96, 96]}))
    step = TrainingStep(file)
    for budget in (137 * 10**5, 200 * 10**5):
        found = largest_patch(step, budget, None, "float32")
        side = found.patch[0]
        assert side % 16 == 0 and side > 96 and found.total <= budget
        assert step.plan(None, "float32", [side + 16] * 2).total > budget
    just = str(step.plan(None, "float32").total + 1)
    assert main(["plan", "--config_file", str(file), "--budget", just, "--precision", "float32"]) == 0
    assert f'Fits in {just}: float32, with --patch_size "[96, 96]"' in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["torch.nn.CrossEntropyLoss", "monai.losses.DiceCELoss"])
def test_losses_of_class_numbers_and_networks_with_a_loss_of_their_own(loss):
    definition = {
        "_target_": "SegResNetVAE",
        "input_image_size": [32, 32],
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 3,
    }
    arguments = {} if loss.startswith("torch") else {"to_onehot_y": True, "softmax": True}
    content = {"loss": {"_target_": loss, **arguments}, "patch_size": [32, 32]}
    plain, vae = (TrainingStep({"network_def": d, **content}).plan(None) for d in (STRIDED, definition))
    assert plain.peak > 0 and vae.peak > 0


def test_networks_that_read_numbers_while_they_are_built():
    """MONAI's SwinUNETR spreads the rates of its stochastic depth so, and could not be planned for."""
    network = {
        "_target_": "SwinUNETR",
        "in_channels": 1,
        "out_channels": 2,
        "feature_size": 12,
        "dropout_path_rate": 0.3,
    }
    assert TrainingStep({"network_def": network}).in_channels == 1
    with building():
        swin = SwinUNETR(1, 2, feature_size=12, dropout_path_rate=0.3)
    (layer,) = swin.swinViT.layers1
    assert layer.blocks[1].drop_path.drop_prob == pytest.approx(0.3 / 7)


def test_channels_are_the_first_convolution_s_where_the_config_does_not_say():
    step = TrainingStep(
        {"network_def": "$monai.networks.nets.BasicUNet(2, 5, 3)", "patch_size": [32, 32], "imports": ["$import monai"]}
    )
    assert step.in_channels == 5 and step.overrides(step.plan(None)) == 'float32, with --patch_size "[32, 32]"'


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        ({"network_def": STRIDED}, ["--shape", "30", "30"], "patches of 30 x 30 cannot be simulated"),
        (
            {"network_def": STRIDED, "loss": {"_target_": "torch.nn.NoSuchLoss"}},
            ["--shape", "32", "32"],
            "cannot be simulated",
        ),
        ({"network_def": STRIDED}, ["--set", "network_def#channels=many"], "cannot be built without data"),
    ],
)
def test_what_cannot_be_simulated_is_told_in_a_line(content, words, said, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    assert main(["plan", "--config_file", str(file), "--precision", "float32", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
