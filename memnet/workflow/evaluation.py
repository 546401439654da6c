"""Handlers of evaluations: when a training validates, what of an output can be scored, tables that are whole."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from ignite.engine import Engine, Events
from monai import handlers
from monai.engines.utils import IterationEvents

from memnet.whole_files import NotWrittenError

__all__ = ["MetricsSaver", "RequireFinite", "ValidationHandler"]


class ValidationHandler(handlers.ValidationHandler):
    """MONAI's handler, which validates after the last epoch, too, whatever the interval."""

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if not self.epoch_level:
            super().attach(engine)
            return
        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=self._is_due), self)
        if self.exec_at_start:
            engine.add_event_handler(Events.STARTED, self)

    def _is_due(self, engine: Engine, epoch: int) -> bool:
        return epoch % self.interval == 0 or epoch == engine.state.max_epochs


class RequireFinite:
    """Handler that ends an evaluation at an output that is not finite, which would pass for a class, or be left out of a mean.

    Raises:
        ValueError: in the run, naming the case.
    """

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI evaluator."""
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Look at the network's output, before it is processed."""
        output = cast(dict[str, Any], engine.state.output)
        found = output["pred"][0] if isinstance(output["pred"], (tuple, list)) else output["pred"]
        n_bad = int((~torch.isfinite(torch.as_tensor(found))).sum())
        if n_bad:
            files = getattr(output["image"], "meta", {}).get("filename_or_obj", "image")
            name = ", ".join(map(str, files)) if isinstance(files, (list, tuple)) else files
            raise ValueError(
                f"{name}: {n_bad} of {found.numel()} values of the output are NaN or infinite; there is no score"
            )


class MetricsSaver(handlers.MetricsSaver):
    """MONAI's handler, which writes all its tables or, where it cannot, none.

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
