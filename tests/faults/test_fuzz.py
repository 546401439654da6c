"""Damaged files of every kind are refused in words or used: a few of the cases of ``python tests/faults/fuzz.py``."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from bundle_cases import WARNINGS
from fuzz import KINDS, Kind, fuzz, one_case

pytestmark = [*WARNINGS, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_end_in_a_word(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    assert one_case(KINDS[name], tmp_path, None) == ("used", ""), "the file is refused as it was made"
    ends = fuzz(name, 12, 20_000, tmp_path)
    assert ends["refused"] + ends["used"] == 12 and ends["refused"] >= 3, ends


def test_fuzzer_has_teeth(tmp_path: Path) -> None:
    def careless(file: Path, out: Path) -> None:
        out.mkdir()
        (out / "half.nii").touch()
        raise ValueError("of a module that is not this package's")

    def endless(file: Path, out: Path) -> None:
        while True:
            pass

    whole = KINDS["weights"].make
    assert one_case(Kind(whole, careless), tmp_path, 0)[0] == "traceback"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fuzz.LONGEST", 0.05)
        assert one_case(Kind(whole, endless), tmp_path, 0)[0] == "hang"
        patch.setattr("fuzz.input_error", lambda error: error)
        assert one_case(Kind(whole, careless), tmp_path, 0)[0] == "output"
