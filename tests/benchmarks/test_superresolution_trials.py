"""Trials of super-resolution networks, and their table."""

import json
from pathlib import Path

import pytest
from bundle_cases import WARNINGS
from conftest import BUNDLES
from diffusion_cases import write_hcp

from memnet.benchmarks.superresolution_trials import error_table, run_trial

pytestmark = WARNINGS

BUNDLE = BUNDLES / "brain_dti_superres_iqt"
TINY = {"network_def#channels": [12, 12], "patch_size": 7, "patches_per_epoch": 2, "batch_size": 2, "device": "cpu"}


def test_trial_is_recorded_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, out = write_hcp(tmp_path / "hcp", 3, shape=(16, 14, 17)), tmp_path / "out"
    record = run_trial(BUNDLE, 0, 1, data, out, n_training=1, epochs=1, **TINY)
    assert {len(values) for values in record["errors"].values()} == {1}  # one test subject
    assert record["errors"]["cubic_interior"][0] < 2 < record["errors"]["interior"][0]  # a smooth field; one step
    assert str(tmp_path) not in json.dumps(record)
    assert (out / "rn0_of1_seed1" / "model_best.pt").is_file()
    capfd.readouterr()
    assert run_trial(BUNDLE, 0, 1, data, out, n_training=1, epochs=1, **TINY) == record
    assert capfd.readouterr().out == ""  # nothing was run
    with pytest.raises(ValueError, match="give another --output_dir"):
        run_trial(BUNDLE, 0, 1, data, out, n_training=1, epochs=2, **TINY)
    with pytest.raises(ValueError, match="settings.json was made with"):  # records do not name the data set
        run_trial(BUNDLE, 0, 1, tmp_path / "another", out, n_training=1, epochs=1, **TINY)


def test_failure_leaves_no_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training of .* failed"):
        run_trial(BUNDLE, 0, 0, tmp_path / "absent", tmp_path / "out", epochs=1)
    assert not list((tmp_path / "out").glob("*.json"))


def test_table_has_standard_errors_and_ratios_to_espcn() -> None:
    def record(n_blocks: int, seed: int, totals: list[float], n_training: int | None = 8) -> dict:
        methods, quantities = ("", "trilinear_", "cubic_", "signals_"), ("interior", "edge", "total", "md", "fa")
        errors = {f"{method}{quantity}": [9.0, 11.0] for method in methods for quantity in quantities}
        return {"settings": {"n_blocks": n_blocks, "n_training": n_training}, "errors": errors | {"total": totals}}

    records = [
        record(0, 0, [20.0, 24.0]),
        record(0, 1, [20.0, 24.0]),
        record(4, 0, [20.0, 22.0]),
        record(2, 0, [9.0], 16),
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in error_table(records).splitlines()[2:]]
    assert [row[:3] for row in rows[3:]] == [["ESPCN", "8", "2"], ["ESPCN-RN4", "8", "1"], ["ESPCN-RN2", "16", "1"]]
    assert rows[1][5] == "10.00 ± 1.00"  # interpolation is the same in every record: counted once
    assert rows[3][5] == "22.00 ± 2.00"  # of two subjects; two seeds make no four of them
    assert [row[-1] for row in rows] == ["-", "-", "-", "1.000", "0.955", "-"]
    assert error_table([]) == "No trial is done."


def test_a_subject_without_interior_counts_elsewhere() -> None:
    errors = {
        f"{m}{q}": [9.0, 11.0]
        for m in ("", "trilinear_", "cubic_", "signals_")
        for q in ("interior", "edge", "total", "md", "fa")
    }
    record = {"settings": {"n_blocks": 0, "n_training": 1}, "errors": errors | {"interior": [float("nan"), 7.0]}}
    row = [cell.strip() for cell in error_table([record]).splitlines()[-1].split("|")[1:-1]]
    assert row[3:6] == ["7.00", "10.00 ± 1.00", "10.00 ± 1.00"]
