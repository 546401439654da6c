"""An inference goes on past what cannot be read, and stops at everything else."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BUNDLES
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator

from memnet.transforms.volumes import read_volume
from memnet.whole_files import whole_file
from memnet.workflow.unreadable import PassOverUnreadable


def evaluator(cases: list[dict[str, Any]], load: Callable[[dict[str, Any]], Any]) -> SupervisedEvaluator:
    loader = DataLoader(Dataset(cases, load), batch_size=1, num_workers=0)
    engine = SupervisedEvaluator(torch.device("cpu"), loader, torch.nn.Identity(), val_handlers=[PassOverUnreadable()])
    engine.seen = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: e.seen.extend(case["number"] for case in e.state.batch)
    )
    return engine


def numbered(*bad: int, n: int = 5) -> list[dict[str, Any]]:
    return [
        {"image": [None, f"/scans/{k}.nii.gz" if k in bad else "x.nii"], "number": k, "bad": k in bad} for k in range(n)
    ]


def load(case: dict[str, Any]) -> dict[str, Any]:
    if case["bad"]:
        read_volume(case["image"][1])
    return {"image": torch.zeros(1, 2), "number": case["number"]}


@pytest.mark.parametrize("bad", [(0,), (2, 3), (4,), (0, 1, 2, 3)])
def test_each_of_the_others_is_seen_once(bad: tuple[int, ...]) -> None:
    engine = evaluator(numbered(*bad), load)
    with pytest.raises(ValueError, match=rf"^{len(bad)} of 5 .*/scans/{bad[0]}\.nii\.gz: no such file"):
        engine.run()
    assert engine.seen == [k for k in range(5) if k not in bad]
    assert [one.files for one in engine.state.passed_over] == [[Path(f"/scans/{k}.nii.gz")] for k in bad]


def test_nothing_is_told_where_all_are_read() -> None:
    engine = evaluator(numbered(), load)
    for _ in range(2):
        engine.run()
    assert engine.seen == [*range(5), *range(5)] and engine.state.passed_over == []


def test_an_only_input_is_told_as_it_is() -> None:
    with pytest.raises(RuntimeError) as raised:
        evaluator(numbered(0, n=1), load).run()
    assert str(raised.value.__cause__) == "/scans/0.nii.gz: no such file"


def _full(case: dict[str, Any]) -> None:
    with whole_file(case["image"][1]):
        raise OSError(errno.ENOSPC, "No space left on device")


def _mistaken(case: dict[str, Any]) -> None:
    torch.ones(2).reshape(3)


def _foreign(case: dict[str, Any]) -> None:
    int("a mistake of the program")


def _out_of_memory(case: dict[str, Any]) -> None:
    try:
        raise MemoryError
    except MemoryError:
        read_volume(case["image"][1])


@pytest.mark.parametrize("fails", [_full, _mistaken, _foreign, _out_of_memory])
def test_every_other_error_ends_the_run(fails: Callable[[dict[str, Any]], None]) -> None:
    def failing(case: dict[str, Any]) -> dict[str, Any]:
        if case["bad"]:
            fails(case)
        return load(case)

    engine = evaluator(numbered(2), failing)
    with pytest.raises(RuntimeError):
        engine.run()
    assert engine.seen == [0, 1] and engine.state.passed_over == []


@pytest.mark.parametrize("bundle", sorted(folder.name for folder in BUNDLES.iterdir() if folder.is_dir()))
def test_it_comes_last_in_every_bundle(bundle: str) -> None:
    parser = ConfigParser()
    parser.read_config(str(BUNDLES / bundle / "configs" / "inference.json"))
    targets = [handler["_target_"] for handler in parser.get("handlers")]
    assert targets[-1].endswith("PassOverUnreadable")
