"""The comparison of networks on labelled volumes: its split, its trials, its tables."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from memnet.benchmarks import comparison
from memnet.benchmarks.comparison import cost_table, find_labelled_volumes, measure_costs, score_table
from memnet.benchmarks.contenders import CONTENDERS, Contender
from memnet.benchmarks.records import read_record, record_file
from memnet.benchmarks.trial import Settings, run_trial
from memnet.cli import main

SETTINGS = Settings(epochs=3, patch_size=(8, 8, 8), amp=False)


class Oracle(nn.Module):
    """Knows the label: volumes of the fixture are brighter where their label is higher. Moves what it knows by some voxels."""

    def __init__(self, voxels: int = 0, highest: int = 2):
        super().__init__()
        self.voxels, self.highest, self.scale = voxels, highest, nn.Parameter(torch.ones(()))

    def forward(self, x):
        label = torch.unique(x, return_inverse=True)[1].roll(self.voxels, 2).clamp(max=self.highest)
        return self.scale * nn.functional.one_hot(label[:, 0], 3).movedim(-1, 1).float()


class Tiny(nn.Module):
    """One convolution, which stops the process, so to say, after a number of training steps."""

    def __init__(self, steps: float = float("inf")):
        super().__init__()
        self.steps, self.convolution = steps, nn.Conv3d(1, 3, 3, padding=1)

    def forward(self, x):
        self.steps -= 1
        if self.steps < 0:
            raise KeyboardInterrupt
        return self.convolution(x)


@pytest.fixture
def folder(tmp_path, write_nifti):
    """Ten volumes of 9 x 12 x 10 voxels of 2 mm, their image the label with a background of 0, as the Decathlon stores them."""
    for number in range(10):
        label = np.zeros((9, 12, 10), np.uint8)
        label[3:6, 3:6, 2:7], label[3:6, 6 : 8 + number % 2, 2:7] = 1, 2
        write_nifti(f"imagesTr/case_{number}.nii.gz", label.astype(np.float32), np.diag([2, 2, 2, 1]))
        write_nifti(f"labelsTr/case_{number}.nii.gz", label, np.diag([2, 2, 2, 1]))
    return tmp_path


@pytest.fixture
def contend(monkeypatch):
    """Enter a network into the comparison under the name ``tried``."""
    return lambda build: monkeypatch.setitem(CONTENDERS, "tried", Contender("Tried", lambda n_in, n_classes: build()))


def test_every_fifth_volume_is_kept_apart(folder):
    cases = find_labelled_volumes(folder)
    assert [case["label"][-8:] for case in cases["test"]] == ["4.nii.gz", "9.nii.gz"]
    assert len(cases["training"]) == 8
    assert not {case["image"] for case in cases["training"]} & {case["image"] for case in cases["test"]}


def test_missing_files_are_named(folder):
    (folder / "labelsTr" / "case_3.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"labelsTr/case_3\.nii\.gz"):
        find_labelled_volumes(folder)
    with pytest.raises(ValueError, match="imagesTr and labelsTr"):
        find_labelled_volumes(folder / "imagesTr")


def test_scores_are_of_the_whole_volume_in_mm(folder, tmp_path, contend):
    cases = find_labelled_volumes(folder)
    wanted = {"dice": [1.0, 1.0], "hausdorff": [0.0, 0.0], "hausdorff95": [0.0, 0.0]}
    contend(Oracle)
    scores = run_trial("tried", 0, SETTINGS, cases, tmp_path / "right")["scores"]
    assert scores == {metric: {"anterior": values, "posterior": values} for metric, values in wanted.items()}
    contend(lambda: Oracle(voxels=1))
    scores = run_trial("tried", 0, SETTINGS, cases, tmp_path / "moved")["scores"]
    assert scores["hausdorff"]["anterior"] == [2.0, 2.0]
    assert scores["dice"]["anterior"] == pytest.approx([2 / 3, 2 / 3], abs=1e-5)
    contend(lambda: Oracle(highest=1))
    scores = run_trial("tried", 0, SETTINGS, cases, tmp_path / "blind")["scores"]
    assert scores["dice"]["posterior"] == [0.0, 0.0]
    assert scores["hausdorff"]["posterior"] == [None, None]


def test_an_interrupted_trial_ends_as_an_uninterrupted_one(folder, tmp_path, contend):
    cases = find_labelled_volumes(folder)
    contend(Tiny)
    whole = run_trial("tried", 1, SETTINGS, cases, tmp_path / "whole")
    other = run_trial("tried", 2, SETTINGS, cases, tmp_path / "whole")
    contend(lambda: Tiny(steps=2 * 4 + 1))
    with pytest.raises(KeyboardInterrupt):
        run_trial("tried", 1, SETTINGS, cases, tmp_path / "parts")
    assert read_record(record_file(tmp_path / "parts", "tried", 1)) is None
    with pytest.raises(ValueError, match="settings.json was made with settings.*'epochs': 3.*'epochs': 4"):
        run_trial("tried", 1, replace(SETTINGS, epochs=4), cases, tmp_path / "parts")
    contend(Tiny)
    parts = run_trial("tried", 1, SETTINGS, cases, tmp_path / "parts")
    assert parts["scores"] == whole["scores"]
    assert parts["scores"] != other["scores"]
    assert [file.name for file in (tmp_path / "parts").iterdir()] == ["tried_seed1.json"]


def test_what_is_recorded_is_not_run_again(folder, tmp_path, contend):
    cases = find_labelled_volumes(folder)
    contend(Tiny)
    record = run_trial("tried", 0, SETTINGS, cases, tmp_path)
    contend(lambda: Tiny(steps=0))
    assert run_trial("tried", 0, SETTINGS, cases, tmp_path) == record
    with pytest.raises(ValueError, match="'epochs': 3.*'epochs': 4.*--output_dir"):
        run_trial("tried", 0, replace(SETTINGS, epochs=4), cases, tmp_path)
    record_file(tmp_path, "tried", 0).write_text("{")
    with pytest.raises(ValueError, match="tried_seed0.json: not a record"):
        run_trial("tried", 0, SETTINGS, cases, tmp_path)


def test_a_label_that_is_no_class_is_refused(folder, tmp_path, contend, write_nifti):
    label = np.zeros((9, 12, 10), np.uint8)
    label[4] = 7
    write_nifti("labelsTr/case_0.nii.gz", label, np.diag([2, 2, 2, 1]))
    contend(Tiny)
    with pytest.raises(RuntimeError) as raised:
        run_trial("tried", 0, SETTINGS, find_labelled_volumes(folder), tmp_path)
    assert "case_0.nii.gz: holds label values that the map does not know: 7" in str(raised.value.__cause__)


def record(network: str, seed: int, dice: list[float | None]) -> dict:
    scores = {"anterior": dice, "posterior": [1.0, 1.0]}
    settings = {"classes": ["anterior", "posterior"]}
    return {"network": network, "seed": seed, "settings": settings, "scores": dict.fromkeys(METRICS, scores)}


METRICS = ("dice", "hausdorff", "hausdorff95")


def test_table_has_mean_and_spread_over_the_seeds():
    done = [record("fully", 0, [0.5, 0.7]), record("fully", 1, [0.8, 0.8]), record("baseline", 0, [0.4, None])]
    header, _, baseline, fully, *note = score_table(done).splitlines()
    assert header.startswith(
        "| network | seeds | Dice, anterior | Dice, posterior | Dice, mean | Hausdorff, mm, anterior |"
    )
    assert fully.startswith("| FullyInvResUNet | 2 | 0.700 ± 0.141 | 1.000 ± 0.000 | 0.850 ± 0.071 | 0.70 ± 0.14 |")
    assert baseline.startswith("| UNet3D | 1 | 0.400 | 1.000 | 0.800 |")
    assert note[-1].startswith("3 scores are undefined")


def test_costs_are_relative_to_the_first():
    costs = measure_costs(["baseline", "fully"], 16, rounds=1)
    assert costs["baseline"]["time_ratio"] == 1
    assert costs["fully"]["peak"] < 0.5 * costs["baseline"]["peak"]
    assert 0.9 < costs["fully"]["parameters"] / costs["baseline"]["parameters"] < 1.1
    rows = cost_table({"baseline": costs["baseline"], "fully": costs["baseline"] | {"time_ratio": 1.5}}).splitlines()
    assert rows[-1].startswith("| FullyInvResUNet | 1.46 |") and rows[-1].endswith("| 1.00 | 1.50 |")
    assert cost_table({"baseline": costs["baseline"] | {"time_ratio": None}}).endswith("| 1.00 | - |")


def test_contenders_have_parameters_like_the_baseline():
    with torch.device("meta"):
        sizes = {n: sum(p.numel() for p in c.build(1, 3).parameters()) for n, c in CONTENDERS.items() if "vae" not in n}
    ratios = {name: size / sizes["baseline"] for name, size in sizes.items()}
    assert all(0.9 < ratios[name] < 1.1 for name in ("partially", "fully", "dynunet")), ratios
    assert 0.8 < ratios["segresnet"] < 1.25, ratios


def test_command_trains_then_writes_the_tables_from_the_records(folder, tmp_path, contend, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "Settings", lambda **given: Settings(patch_size=(8, 8, 8), **given))
    contend(Tiny)
    out = tmp_path / "out"
    arguments = ["compare", "--output_dir", str(out), "--networks", "tried", "--seeds", "0", "1", "--epochs", "1"]
    assert main([*arguments, "--dataset_dir", str(folder)]) == 0
    assert json.loads((out / "tried_seed1.json").read_text())["seed"] == 1
    table = (out / "tables.md").read_text()
    assert table.startswith("8 training and 2 test volumes") and "| Tried | 2 |" in table
    (out / "tables.md").unlink()
    assert main(["compare", "--output_dir", str(out)]) == 0
    assert (out / "tables.md").read_text() == table
    assert table in capsys.readouterr().out
