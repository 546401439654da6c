"""A training keeps to its folder and runs no code of its files."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_cases import SMALL, SMALL_TRAINING, TISSUE, WARNINGS, run

from memnet.bundle import input_error
from memnet.workflow.checkpoints import load_weights

pytestmark = WARNINGS


def train(data: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    options = {**SMALL_TRAINING, "dataset_dir": str(data), "epochs": 4, **overrides}
    run(TISSUE.folder, "training", "train.json", **options, output_dir=str(output))
    return torch.load(output / "model_last.pt", weights_only=True)


def test_folder_of_another_training_is_refused(iseg_folder: Path, tmp_path: Path) -> None:
    first = train(iseg_folder, tmp_path, epochs=1)
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(RuntimeError) as raised:
        train(iseg_folder, tmp_path, epochs=1)
    assert f"{tmp_path}: another training is writing here" in str(input_error(raised.value))
    os.close(other)
    left = torch.load(tmp_path / "model_last.pt", weights_only=True)
    assert all(torch.equal(left["model"][key], value) for key, value in first["model"].items())
    assert not (tmp_path / "model_last.previous.pt").exists()
    train(iseg_folder, tmp_path, epochs=1)
    assert (tmp_path / "model_last.previous.pt").exists()


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_code_in_weights_is_not_run(iseg_folder: Path, tmp_path: Path) -> None:
    planted, last = tmp_path / "planted", tmp_path / "out" / "model_last.pt"
    last.parent.mkdir()
    torch.save({"model": Planted(planted), "weight": Planted(planted)}, last)
    with pytest.raises(ValueError, match="not a file of weights"):
        load_weights(torch.nn.Linear(2, 2), last)
    scan = str(iseg_folder / "subject-1-T1.hdr")
    options = {**SMALL, "image": scan, "ckpt_path": str(last), "output_dir": str(tmp_path / "inferred")}
    for refused in (
        lambda: run(TISSUE.folder, "run", "inference.json", **options),
        lambda: train(iseg_folder, last.parent, resume=True),
    ):
        with pytest.raises(RuntimeError) as raised:
            refused()
        assert f"{last}: not a file of weights" in str(input_error(raised.value))
    assert not planted.exists()
    torch.load(last, weights_only=False)
    assert planted.exists()  # what the file would have done
