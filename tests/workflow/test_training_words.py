"""What a training tells: where its weights are, and lines that do not run into its progress bar."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from torch.utils.data import DataLoader

from memnet.workflow.checkpoints import TrainingCheckpoint
from memnet.workflow.reporting import TrainingProgress


@pytest.mark.parametrize("validated", [True, False])
def test_the_end_says_where_the_weights_are(validated: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = torch.nn.Linear(1, 1)
    evaluator = Evaluator("cpu", DataLoader([0]), 1)
    trainer = Engine(lambda engine, batch: None)
    if validated:
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: setattr(evaluator.state, "best_metric_epoch", 1))
    TrainingCheckpoint(tmp_path, network, torch.optim.Adam(network.parameters()), evaluator=evaluator).attach(trainer)
    with caplog.at_level(logging.INFO, "memnet"):
        trainer.run([0], max_epochs=1)
    said = caplog.messages[-1]
    assert str(tmp_path / "model_last.pt") in said and str(tmp_path / "model_best.pt") in said
    assert (tmp_path / "model_best.pt").exists() is validated is ("--val_interval" not in said)


def test_lines_at_an_epochs_end_do_not_run_into_the_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Engine(lambda engine, batch: batch)
    progress = TrainingProgress(lambda output: output)
    open_bars = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: open_bars.append(progress.pbar is not None))
    progress.attach(trainer)
    trainer.run([0.5, 0.25], max_epochs=2)
    assert open_bars == [False, False]
    assert "[2/2]" in capsys.readouterr().err
