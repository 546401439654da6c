"""Lets an inference on many scans go on past those that cannot be read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ignite.engine import Engine, Events
from torch.utils.data import DataLoader

from memnet.bundle import refused_input
from memnet.datasets import as_list
from memnet.dicom import split_uid

__all__ = ["PassOverUnreadable", "PassedOver"]

logger = logging.getLogger("memnet")

_MOST_TOLD = 3


class PassedOver(NamedTuple):
    """An input that could not be read.

    Args:
        source: its first file, or the subject of a diffusion series.
        files: all its files, or folders of DICOM.
        why: one line.
    """

    source: str
    files: Sequence[Path]
    why: str


class PassOverUnreadable:
    """Handler with which an evaluator passes over inputs that cannot be read, goes on, and tells them in the end.

    An input is passed over where its transforms raise a ``ValueError`` of this package, which names the file. Every other error
    ends the run, and so does that of an only input. To be the last of the handlers: those before it have written their tables
    and pages when it raises. The evaluator's ``state.passed_over`` lists one :class:`PassedOver` each.

    Raises:
        ValueError: at the end of a run that has passed over some, naming them.
    """

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI evaluator whose loader gives one input at a time, in the order of its data set."""
        self.loader: DataLoader[Any] = engine.data_loader  # type: ignore[attr-defined]
        if len(self.loader) < 2:
            return
        engine.data_loader = _Readable(self)  # type: ignore[attr-defined]
        engine.state.epoch_length = None  # found by running: ignite begins again with a loader that ends before it
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.COMPLETED, self._tell)

    def _start(self, engine: Engine) -> None:
        self.passed_over: list[PassedOver] = []
        engine.state.passed_over = self.passed_over  # type: ignore[attr-defined]

    def _tell(self, engine: Engine) -> None:
        engine.state.epoch_length = None
        n = len(self.passed_over)
        if n:
            told = "; ".join(one.why for one in self.passed_over[:_MOST_TOLD])
            rest = f"; and {n - _MOST_TOLD} more" if n > _MOST_TOLD else ""
            raise ValueError(f"{n} of {len(self.loader)} inputs could not be read, the others are done: {told}{rest}")


class _Readable:
    """A loader's batches without those that cannot be read; how many these are shows in the end, so that it has no length."""

    def __init__(self, handler: PassOverUnreadable) -> None:
        self.handler = handler

    def __iter__(self) -> Iterator[Any]:
        loader = self.handler.loader
        batches = iter(loader)
        for index in range(len(loader)):
            try:
                batch = next(batches)
            except Exception as error:
                refused = refused_input(error)
                if refused is None:
                    raise
                logger.warning("passed over: %s", refused)
                case = loader.dataset.data[index]  # type: ignore[attr-defined]
                self.handler.passed_over.append(_passed_over(case, str(refused)))
                continue
            yield batch


def _passed_over(case: Mapping[str, Any], why: str) -> PassedOver:
    """Name a case as :mod:`memnet.datasets` lists it: an image, a file or one a modality, or a diffusion series."""
    named = case["image"] if "image" in case else case["series"]["data"]
    files = [split_uid(file)[0] for file in as_list(named) if file is not None]
    return PassedOver(str(files[0]) if "image" in case else case["series"]["subject"], files, why)
