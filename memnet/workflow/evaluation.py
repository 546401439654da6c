"""Handlers of evaluations: when a training validates, what of an output can be scored, tables that are whole."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from ignite.engine import Engine, Events
from monai import handlers

from memnet.whole_files import NotWrittenError

__all__ = ["MetricsSaver", "RequireFinite", "ValidationHandler"]


class ValidationHandler(handlers.ValidationHandler):
    """MONAI's handler, which validates after the last epoch, too, whatever the interval."""

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=self._is_due), self)

    def _is_due(self, engine: Engine, epoch: int) -> bool:
        return epoch % self.interval == 0 or epoch == engine.state.max_epochs


class RequireFinite:
    """Handler that ends an evaluation at an output that is not finite, which MONAI's means leave out without a word.

    Args:
        keys: the entries to look at.

    Raises:
        ValueError: in the run, naming the case.
    """

    def __init__(self, keys: Sequence[str] = ("pred",)) -> None:
        self.keys = keys

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Look at the outputs of an iteration."""
        for case in cast(list[dict[str, Any]], engine.state.output):
            for key in self.keys:
                values = torch.as_tensor(case[key])
                n_bad = int((~torch.isfinite(values)).sum())
                if n_bad:
                    name = case["image"].meta.get("filename_or_obj", "image")
                    raise ValueError(
                        f"{name}: {n_bad} of {values.numel()} values of the output are NaN or infinite; there is no score"
                    )


class MetricsSaver(handlers.MetricsSaver):
    """MONAI's handler, whose tables are complete, all of one run, or those that were there before.

    Raises:
        NotWrittenError: they cannot be written, naming the folder.
    """

    def __call__(self, engine: Engine) -> None:
        """Write the tables."""
        folder = self.save_dir
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
                self.save_dir = partial
                super().__call__(engine)
                for file in Path(partial).iterdir():
                    file.replace(Path(folder) / file.name)
        except OSError as error:
            raise NotWrittenError(f"{folder}: its tables cannot be written ({error.strerror or error})") from error
        finally:
            self.save_dir = folder
