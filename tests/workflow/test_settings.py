"""What a run is told is checked before it reads data: kinds of values, device, network, weights, output folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_cases import SMALL, TISSUE, TUMOR, WARNINGS, BundleCase, run
from conftest import BUNDLES
from monai.bundle import ConfigWorkflow

from memnet.bundle import input_error
from memnet.workflow.settings import (
    build_without_memory,
    check_launcher,
    check_output_folder,
    check_overrides,
    check_values,
    check_weights,
    read_words,
    typed_settings,
)

pytestmark = WARNINGS

EXPECTED: list[tuple[str, Any, str]] = [
    ("amp", "maybe", "true or false"),
    ("resume", 1, "true or false"),
    ("epochs", "two", "a whole number"),
    ("epochs", 0, "a whole number of at least 1"),
    ("val_interval", 2.5, "a whole number"),
    ("network_def#channels", "many", "a whole number"),
    ("learning_rate", "fast", "a number"),
    ("learning_rate", -1e-4, "a number of at least 0"),
    ("cache_rate", True, "a number"),
    ("patch_size", [32, 32], "3 numbers"),
    ("patch_size", "large", "a list of numbers"),
    ("roi_size", [32, 32, "32"], "3 numbers"),
    ("device", "gpu", "cpu, cuda"),
]


def refused(bundle: Path, **overrides: Any) -> str:
    """Train where there is no data set and return the message of the ValueError behind what was raised."""
    with pytest.raises((RuntimeError, ValueError)) as raised:
        run(bundle, "training", "train.json", dataset_dir="no such folder", **overrides)
    return str(input_error(raised.value))


@pytest.mark.parametrize(("key", "value", "expected"), EXPECTED)
def test_a_value_of_another_kind_is_refused(key: str, value: Any, expected: str) -> None:
    told = f"{key} is {value!r}, expected {expected}"
    assert re.match(rf"{re.escape(told)}( \(| or|$)", refused(TISSUE.folder, **{key: value}))


@pytest.mark.parametrize(
    "overrides",
    [
        {"epochs": 1, "learning_rate": 1, "fold": -2, "cache_rate": 0, "num_workers": 0},
        {"amp": "True", "resume": "null", "patch_size": 32, "roi_size": (32, 32, 32)},
        {"epochs": "$2 * 3", "val_interval": "@epochs", "label_map": "freesurfer", "train#trainer#max_epochs": 1},
        {"label_map": {"0": 0, "5": 1}},
        {"label_map": {0: 0, 7: 2}},
    ],
    ids=["numbers", "words", "expressions", "map", "map of the command line"],
)
def test_what_a_person_may_give_is_taken(overrides: dict[str, Any]) -> None:
    assert refused(TISSUE.folder, **{**SMALL, **overrides}).startswith("no such folder: ")


@pytest.mark.parametrize("key", ["dataset_dir", "output_dir", "pretrained"])
def test_a_number_where_a_file_or_folder_is_meant_is_its_name(key: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    workflow = ConfigWorkflow(
        str(TISSUE.folder / "configs" / "train.json"), workflow_type="training", **{"pretrained": None, key: 100307}
    )
    read_words(workflow)
    assert workflow.parser[key] == "100307"


@pytest.mark.parametrize(("bundle", "key"), [("knee_mri_recon_mel", "tile"), ("brain_mri_tissue_invres", "patch_size")])
def test_a_number_stands_for_a_list_of_it(bundle: str, key: str) -> None:
    config = str(BUNDLES / bundle / "configs" / "train.json")
    workflow = ConfigWorkflow(config, workflow_type="training", **{key: 16})
    length = len(ConfigWorkflow(config, workflow_type="training").parser[key])
    read_words(workflow)
    check_values(workflow)
    assert workflow.parser[key] == [16] * length


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device is 'cuda:1', but PyTorch sees no GPU" in refused(TISSUE.folder, device="cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "device is 'cuda:1', but the last GPU that PyTorch sees here is cuda:0" in refused(
        TISSUE.folder, device="cuda:1"
    )


@pytest.mark.parametrize(
    "bundle", sorted(p.parent.parent for p in BUNDLES.glob("*/configs/train.json")), ids=lambda p: p.name
)
def test_a_network_that_cannot_be_is_refused_before_data_are_read(bundle: Path) -> None:
    assert "memory must be one of" in refused(bundle, memory="inverted", device="cpu")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"pretrained": "absent.pt"}, "absent.pt: no such weights file"),
        ({"pretrained": str(TISSUE.folder / "models" / "model.pt")}, "do not fit FullyInvResUNet"),
        ({"resume": True}, "model_last.pt: no training to resume"),
    ],
    ids=["absent", "of another network", "nothing to resume"],
)
def test_weights_are_refused_before_data_are_read(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    overrides = {**SMALL, "dataset_dir": "no such folder", "output_dir": str(tmp_path)}
    config = str(TISSUE.folder / "configs" / "train.json")
    workflow = ConfigWorkflow(config, run_id="training", logging_file=False, **overrides, **settings)
    network = build_without_memory(workflow)
    assert network is not None
    with pytest.raises(ValueError, match=re.escape(told)):
        check_weights(workflow, network)


@pytest.mark.parametrize(
    ("config", "key"), [("train.json", "overlay"), ("train_synthetic.json", "pretrained"), ("inference.json", "subset")]
)
def test_a_setting_that_the_run_does_not_read_is_refused(config: str, key: str) -> None:
    with pytest.raises((RuntimeError, ValueError)) as raised:
        run(TISSUE.folder, "run", config, **{key: True})
    assert f"{key!r} is a setting of another config" in str(input_error(raised.value))


@pytest.mark.parametrize(
    ("configs", "run_id", "overrides", "told"),
    [
        (
            "train.json evaluate.json",
            "evaluating",
            {"pretrained": "mine.pt"},
            "nothing that 'evaluating' reads; did you mean --ckpt_path?",
        ),
        (
            "train.json",
            "training",
            {"ckpt_path": "mine.pt"},
            "nothing that 'training' reads; did you mean --pretrained?",
        ),
        (
            "train.json evaluate.json",
            "evaluating",
            {"ckpt_path": "mine.pt", "fold": 2, "roi_size": [32] * 3, "vae": True},
            "",
        ),
        ("train.json", "training", {"pretrained": "mine.pt", "fold": 2, "modality_dropout": 0.1, "seed": 3}, ""),
        ("inference.json", "run", {"t1": "a", "t2": "b", "pattern": "x", "amp": False, "report": False}, ""),
    ],
)
@pytest.mark.parametrize("case", [TISSUE, TUMOR], ids=lambda case: case.name)
def test_a_command_refuses_what_is_of_no_use_to_what_it_runs(
    case: BundleCase, configs: str, run_id: str, overrides: dict[str, Any], told: str
) -> None:
    """An evaluation with --pretrained scored the shipped weights, a training with --ckpt_path began with random ones."""
    files = [str(case.folder / "configs" / name) for name in configs.split()]
    workflow = ConfigWorkflow(files, run_id=run_id, logging_file=False, **overrides)
    if not told:
        check_overrides(workflow, typed_settings([f"--{key}" for key in overrides]))
        return
    check_overrides(workflow)  # hosts may
    with pytest.raises(ValueError, match=re.escape(told)):
        check_overrides(workflow, typed_settings([f"--{key}" for key in overrides]))


def test_a_command_tells_of_what_is_of_no_use(caplog: pytest.LogCaptureFixture) -> None:
    files = [str(TISSUE.folder / "configs" / name) for name in ("train.json", "evaluate.json")]
    workflow = ConfigWorkflow(files, run_id="evaluating", logging_file=False, epochs=7, seed=0, fold=1)
    check_overrides(workflow, typed_settings(["--epochs", "7", "--seed", "0", "--fold=1"]))
    told = [message for message in caplog.messages if "is nothing that" in message]
    assert told == ["'epochs' is nothing that 'evaluating' reads"]


def test_a_file_of_ones_own_may_serve_several_runs(tmp_path: Path) -> None:
    (tmp_path / "site.json").write_text('{"epochs": 100, "batch_size": 2, "num_workers": 1}')
    files = [str(TISSUE.folder / "configs" / "train.json"), str(TISSUE.folder / "configs" / "evaluate.json")]
    workflow = ConfigWorkflow(
        [*files, str(tmp_path / "site.json")], run_id="evaluating", logging_file=False, subset="all"
    )
    check_overrides(workflow, typed_settings(["run", "evaluating", "--subset", "all"]))


def test_components_in_lists_have_their_settings_checked() -> None:
    """They ended in MONAI's traceback."""
    config = str(TISSUE.folder / "configs" / "train.json")
    for key, near in (("train#random_transforms#3#probe", "prob"), ("train#handlers#1#intervall", "interval")):
        workflow = ConfigWorkflow(config, run_id="training", logging_file=False, **{key: 1})
        with pytest.raises(ValueError, match=re.escape(f"{key!r} is no setting of this bundle")) as raised:
            check_overrides(workflow)
        assert near in str(raised.value).removeprefix(repr(key))
    check_overrides(
        ConfigWorkflow(config, run_id="training", logging_file=False, **{"train#random_transforms#3#prob": 1})
    )


def test_the_launcher_and_the_config_are_for_as_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    one = [str(TISSUE.folder / "configs" / "train.json")]
    several = [*one, str(TISSUE.folder / "configs" / "multi_gpu_train.json")]
    workflows = [ConfigWorkflow(files, run_id="training", logging_file=False) for files in (one, several)]
    check_launcher(workflows[0])
    with pytest.raises(ValueError, match="start it by torchrun"):
        check_launcher(workflows[1])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for workflow in workflows:  # as a cluster's own scripts may set it
        check_launcher(workflow)
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_launcher(workflows[1])
    inference = str(TISSUE.folder / "configs" / "inference.json")
    with pytest.raises(ValueError, match="has started 2 processes, .* run it without torchrun"):
        check_launcher(ConfigWorkflow(inference, run_id="run", logging_file=False))
    with pytest.raises(ValueError, match="has started 2 processes, and this config is for one"):
        check_launcher(workflows[0])


def test_building_the_network_ahead_draws_nothing() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    refused(TISSUE.folder, **{**SMALL, "initialize": ["$memnet.bundle.start()"]})
    assert torch.equal(torch.rand(3), expected)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(ValueError, match="file: is no folder; outputs go where --output_dir says"):
            check_output_folder(folder)
    with pytest.raises(ValueError, match="File name too long; outputs go where"):
        check_output_folder(tmp_path / ("n" * 480))
    check_output_folder(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("argument", "value"), [("20241129_153000", 20241129153000), ("1e5", 1e5), ("1.0", 1.0), ("007", 7)]
)
def test_a_folder_is_what_was_typed(argument: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(TISSUE.folder / "configs" / "train.json")
    for typed in (["--output_dir", argument], [f"--output_dir={argument}"]):
        monkeypatch.setattr("sys.argv", ["run", "training", *typed])
        workflow = ConfigWorkflow(config, workflow_type="training", output_dir=value)
        read_words(workflow)
        assert workflow.parser["output_dir"] == argument


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    workflow = ConfigWorkflow(
        str(TISSUE.folder / "configs" / "train.json"), workflow_type="training", output_dir="~/scores"
    )
    read_words(workflow)
    assert workflow.parser["output_dir"] == str(tmp_path / "scores")
