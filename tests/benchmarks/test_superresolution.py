"""The cost of a step: what is small where, and that the command prints it."""

from __future__ import annotations

import pytest

from memnet.benchmarks.superresolution import measure_steps, table
from memnet.cli import main


def test_peaks_are_those_of_the_strategies():
    cases = [(0, "store"), (2, "store"), (2, "invert"), (8, "invert")]
    espcn, stored, inverted, deeper = measure_steps(cases, 2, 9, (8, 16), steps=0)
    assert espcn.peak < inverted.peak < 0.6 * stored.peak
    assert deeper.peak <= 1.02 * inverted.peak
    lines = table([espcn, stored, inverted]).splitlines()
    assert lines[2].startswith("| ESPCN | store |") and lines[4].startswith("| ESPCN-RN2 | invert |")
    assert lines[2].endswith("| - | - |")


def test_command(capsys: pytest.CaptureFixture[str]):
    words = "superresolution --blocks 1 --memory store invert --batch_size 1 --patch_size 5 --channels 4 4 --steps 1"
    assert main([*words.split(), "--device", "cpu"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[1] for row in rows if "RN1" in row] == ["store", "invert"]
    assert next(row for row in rows if "RN1 | store" in row).endswith("| 1.00 |")
