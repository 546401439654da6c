"""Writes down which subjects a training has, once the folder is its own."""

from __future__ import annotations

from pathlib import Path

from ignite.engine import Engine, Events

from memnet.datasets.diffusion_split import Split, write_split
from memnet.workflow.processes import rank

__all__ = ["SplitKeeper"]


class SplitKeeper:
    """Handler that writes the split of diffusion subjects, see :func:`memnet.datasets.diffusion_split.write_split`.

    To be attached after the one that claims the folder, :class:`memnet.workflow.checkpoints.TrainingCheckpoint`, which puts an
    earlier training's aside with its weights.

    Args:
        cases: see :func:`memnet.datasets.diffusion.find_tensor_cases`.
        file: JSON, beside the weights.
    """

    def __init__(self, cases: Split, file: str | Path) -> None:
        self.cases, self.file = cases, Path(file)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Write."""
        if rank() == 0:
            write_split(self.cases, self.file)
