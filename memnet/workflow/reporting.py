"""Tells the person at the terminal how a run goes: files and volumes, progress, image panels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar

from memnet.whole_files import write_table
from memnet.workflow.legends import LEGENDS
from memnet.workflow.metrics import label_volumes
from memnet.workflow.overlay import draw_overlay

__all__ = [
    "ImageReport",
    "LabelReport",
    "TrainingProgress",
    "class_map",
    "first_filled",
    "image_meta",
    "middle_planes",
    "shown_plane",
]

logger = logging.getLogger("memnet")


class LabelReport:
    """Handler that reports each label map's file and volumes, and draws its overlay if asked.

    After the run ``<legend>_volumes.csv`` in the output folder holds the volumes of all scans in ml.

    Args:
        output_dir: where the label maps are written.
        legend: name of one of :data:`memnet.workflow.legends.LEGENDS`.
        overlay: write ``<label map>.png`` beside each label map.
    """

    def __init__(self, output_dir: str | Path, legend: str, overlay: bool = False) -> None:
        self.output_dir = Path(output_dir)
        self.legend = LEGENDS[legend]
        self.overlay = overlay
        self.rows: list[dict[str, str | float]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to the evaluator whose postprocessing has saved ``pred`` with ``savepath_in_metadict``."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._report)
        engine.add_event_handler(Events.STARTED, self.rows.clear)
        engine.add_event_handler(Events.COMPLETED, self._write_table)

    def _report(self, engine: Engine) -> None:
        for case in cast(list[dict[str, Any]], engine.state.output):
            meta = case["pred"].meta
            labels, scan = Path(str(meta["saved_to"])), Path(meta["filename_or_obj"])
            image = nib.load(labels)
            volumes = label_volumes(np.asarray(image.dataobj), image.affine, self.legend.volumes)
            logger.info("%s", scan)
            if meta.get("beside"):
                logger.info("  and        %s", meta["beside"])
            logger.info("  label map  %s", labels)
            if "segmentation" in meta:
                logger.info("  DICOM SEG  %s", meta["segmentation"])
            if self.overlay:
                picture = labels.with_name(labels.name.removesuffix(".gz").removesuffix(".nii") + ".png")
                draw_overlay(meta.get("shown", scan), labels, picture, self.legend)
                logger.info("  overlay    %s", picture)
            logger.info("  volumes    %s", ", ".join(f"{name} {volume:.1f} ml" for name, volume in volumes.items()))
            if not any(volumes.values()):
                logger.warning("  %s", self.legend.nothing)
            self.rows.append({"file": str(scan), **{f"{name} [ml]": round(v, 3) for name, v in volumes.items()}})

    def _write_table(self, engine: Engine) -> None:
        if not self.rows:
            return
        target = self.output_dir / f"{self.legend.name}_volumes.csv"
        write_table(target, self.rows)
        logger.info("volumes of all scans: %s", target)


class ImageReport:
    """Handler that reports where each image was written.

    Args:
        keys: the entries whose transforms have saved them with ``savepath_in_metadict``; one that a case lacks is passed over.
    """

    def __init__(self, keys: Sequence[str] = ("pred",)) -> None:
        self.keys = keys

    def attach(self, engine: Engine) -> None:
        """Attach to the evaluator whose postprocessing saves the images."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._report)

    def _report(self, engine: Engine) -> None:
        for case in cast(list[dict[str, Any]], engine.state.output):
            saved = [case[key].meta for key in self.keys if key in case]
            logger.info("%s", saved[0]["filename_or_obj"])
            for meta in saved:
                logger.info("  %s", meta["saved_to"])


class TrainingProgress(ProgressBar):
    """Progress bar of a training's epochs with the loss.

    Args:
        output_transform: the loss of an engine's output.
    """

    def __init__(self, output_transform: Callable[[Any], Any]) -> None:
        super().__init__(persist=False, ncols=100)
        self.loss = output_transform

    def attach(self, engine: Engine, *args: Any, **kwargs: Any) -> None:
        """Attach to a trainer."""
        super().attach(engine, output_transform=lambda output: {"loss": float(self.loss(output))})
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._close_after_the_last)

    def _close_after_the_last(self, engine: Engine) -> None:
        # before the handlers that log at an epoch's end, whose lines would go on behind the bar
        if engine.state.iteration % engine.state.epoch_length == 0:
            self._close(engine)


def class_map(channels: torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """Tell the class at each place of one-hot ``(C, ...)`` masks, or how many of nested regions are there.

    Returns:
        The classes and the largest there could be; None and 0 for an image or a single mask.
    """
    if len(channels) < 2 or not bool(((channels == 0) | (channels == 1)).all()):
        return None, 0
    is_one_hot = bool((channels.sum(0) == 1).all())
    return (channels.argmax(0), len(channels) - 1) if is_one_hot else (channels.sum(0), len(channels))


def first_filled(channels: torch.Tensor) -> torch.Tensor:
    """Return the first of ``(C, ...)`` channels that is not all zero, the first of all where none is."""
    return next((channel for channel in channels if bool((channel != 0).any())), channels[0])


def image_meta(data: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the metadata of a decollated batch's images, from which MONAI's ``MetricsSaver`` takes the file names.

    Args:
        data: decollated batch whose ``image`` is a ``MetaTensor``.

    Returns:
        The images' metadata.
    """
    return [case["image"].meta for case in data]


def shown_plane(volumes: Iterable[Any], axis: int = -1) -> int:
    """Return the plane to show of volumes on one grid: where half of what the first of them labels lies on either side.

    Args:
        volumes: ``(C, D, H, W)`` each; those that are no one-hot masks or nested regions, or empty ones, label nothing.
        axis: the dimension across which the planes lie.

    Returns:
        The plane's place, the middle one where nothing is labelled.
    """
    size = 1
    for volume in volumes:
        channels = torch.as_tensor(volume).detach()
        size = channels.shape[axis]
        classes = class_map(channels)[0]
        if classes is not None and bool(classes.any()):
            profile = (classes > 0).movedim(axis if axis < 0 else axis - 1, 0).flatten(1).sum(1).cumsum(0)
            return int((2 * profile >= profile[-1]).nonzero()[0])
    return size // 2


def middle_planes(*keys: str) -> Callable[[Sequence[dict[str, Any]]], Any]:
    """Return a transform that takes an axial plane of volumes, for TensorBoard: through ``label``, see :func:`shown_plane`.

    Args:
        keys: entries ``(C, D, H, W)``; of an image the first channel that is not empty is shown, of one-hot classes the
            index of the class, of regions one within the other how many there are, both as shares of the largest.

    Returns:
        A function of decollated data to a list of ``(1, H, D)`` planes, or a tuple of such lists for several keys.
    """

    def plane(volume: torch.Tensor, place: int) -> torch.Tensor:
        middle = torch.as_tensor(volume).detach()[..., place].float()
        classes, largest = class_map(middle)
        shown = first_filled(middle) if classes is None else classes / largest
        # x to the right, anterior up
        return shown.T.flip(0)[None].cpu()

    def planes(data: Sequence[dict[str, Any]]) -> Any:
        places = [shown_plane([case.get("label", case[keys[0]])]) for case in data]
        shown = tuple([plane(case[key], place) for case, place in zip(data, places, strict=True)] for key in keys)
        return shown if len(keys) > 1 else shown[0]

    return planes
