"""Loads weights with a clear word if they do not fit, and keeps a training able to go on where it was."""

from __future__ import annotations

import copy
import logging
import math
import os
import pickle
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from torch import nn

from memnet.whole_files import remove_partial_files, whole_file
from memnet.workflow.processes import rank

__all__ = ["TrainingCheckpoint", "WeightsLoader", "fitting_weights", "load_weights", "resumable"]

logger = logging.getLogger("memnet")

_LAST, _BEST = "model_last.pt", "model_best.pt"
_LENGTHS = {"T_max", "total_steps", "t_total"}  # of schedulers, epochs or steps
_BEGUN = time.time()
_claimed: dict[Path, int] = {}
written: set[Path] = set()
"""Files from which a training of this process could go on."""


def load_weights(
    network: nn.Module, path: str | Path, key: str = "model", may_miss: Sequence[str] = (), spread: bool = False
) -> None:
    """Load weights into a network, completely or not at all; see :func:`fitting_weights`."""
    network.load_state_dict(fitting_weights(network, path, key, may_miss, spread))


def fitting_weights(
    network: nn.Module, path: str | Path, key: str = "model", may_miss: Sequence[str] = (), spread: bool = False
) -> dict[str, torch.Tensor]:
    """Read weights for a network, which may be on the meta device.

    Args:
        network: the network; one without the variational branch takes weights that have it, a :class:`memnet.MoDL` with several
            regularisers those of one.
        path: a ``state_dict`` saved by :func:`torch.save`, or a dictionary that has one under ``key``.
        key: see ``path``.
        may_miss: beginnings of the names that the file need not have and that stay as they are, as ``"vae."`` where a
            network with the variational branch goes on from weights without.
        spread: let a :class:`memnet.MoDL` take those of another number of unrolls, see :meth:`memnet.MoDL.spread_weights`.

    Returns:
        A whole ``state_dict``: what the file lacks and may miss is the network's own.

    Raises:
        ValueError: if the file is missing, is no weights file, holds values that are not finite, or does not fit the network,
            naming what differs.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such weights file; give one that a training has written")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a file of weights, or damaged ({type(error).__name__})") from error
    weights = weights.get(key, weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise ValueError(f"{path}: holds no dictionary of tensors")
    broken = _not_finite(weights)
    if broken:
        raise ValueError(f"{path}: holds weights that are NaN or infinite ({broken}), of a training that has diverged")
    if hasattr(network, "spread_weights") and (spread or not any(k.startswith("regularizers.1.") for k in weights)):
        weights = network.spread_weights(weights)
    wanted = network.state_dict()
    spare = {k for k in weights if k.startswith("vae.")} if not any(k.startswith("vae.") for k in wanted) else set()
    missing = sorted(k for k in set(wanted) - set(weights) if not k.startswith(tuple(may_miss)))
    unknown = sorted(set(weights) - set(wanted) - spare)
    reshaped = [k for k in wanted if k in weights and wanted[k].shape != weights[k].shape]
    if missing or unknown or reshaped:
        counts = f"{len(missing)} tensors missing, {len(unknown)} unknown, {len(reshaped)} of another shape"
        example = (missing + unknown)[:1] or [
            f"{k} is {tuple(weights[k].shape)}, expected {tuple(wanted[k].shape)}" for k in reshaped[:1]
        ]
        raise ValueError(
            f"{path}: these weights do not fit {type(network).__name__} ({counts}; e.g. {example[0]}); "
            "give the settings of the network that they were trained with, such as --n_blocks, --n_unrolls or "
            "--network_def#channels; the bundle's page names them, and for pack they stand in the bundle's configs"
        )
    return {**wanted, **{k: v for k, v in weights.items() if k not in spare}}


def resumable(save_dir: str | Path) -> Path:
    """Return the file that a training in this folder is resumed from.

    Raises:
        ValueError: if there is none.
    """
    last = Path(save_dir) / _LAST
    if not last.is_file():
        raise ValueError(f"{last}: no training to resume; leave --resume out, or give its --output_dir")
    return last


class WeightsLoader:
    """Handler that loads a network's weights when its engine starts, see :func:`load_weights`.

    Args:
        load_path: file of weights.
        network: the network to fill.
        may_miss: see :func:`load_weights`.
        spread: likewise.
    """

    def __init__(
        self, load_path: str | Path, network: nn.Module, may_miss: Sequence[str] = (), spread: bool = False
    ) -> None:
        self.load_path = load_path
        self.network = network
        self.may_miss = may_miss
        self.spread = spread

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Load."""
        load_weights(self.network, self.load_path, may_miss=self.may_miss, spread=self.spread)


class TrainingCheckpoint:
    """Handler that saves the last and the best state of a training, seeds each epoch, and resumes to the same result.

    Every epoch begins with seeds that depend on ``seed`` and the epoch's number alone, so that a training resumed after
    epoch k draws what an uninterrupted one would have drawn. Files are whole or absent, see
    :func:`memnet.whole_files.whole_file`, and one training at a time has the folder. MONAI's ``CheckpointSaver`` does none
    of this, and forgets the best metric on resuming.

    ``model_last.pt`` holds the network, optimizer, scheduler, counters and best metric; ``model_best.pt`` the network's
    ``state_dict`` alone, as bundles ship it.

    Args:
        save_dir: folder of the two files; made if missing.
        network: the network itself, not wrapped for several processes.
        optimizer: its optimizer.
        lr_scheduler: its scheduler, if any.
        evaluator: the validation engine, whose key metric decides what is best.
        random_transforms: transforms with ``set_random_state``.
        resume: go on from ``model_last.pt``; otherwise files of an earlier training are kept as ``*.previous.pt``, and its curves
            in ``tensorboard.previous``.
        seed: seed of the training.
        beside: names of further files in the folder that belong to weights, and go aside with them.

    Raises:
        ValueError: with ``resume``, if there is nothing to resume, or on starting if it was planned for another number of
            epochs, another learning rate or other cases to validate with; on starting, if another process trains in the
            folder; at an epoch's end, if weights are NaN or infinite, which are not saved.
    """

    def __init__(
        self,
        save_dir: str | Path,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any = None,
        evaluator: Evaluator | None = None,
        random_transforms: Any = None,
        resume: bool = False,
        seed: int = 0,
        beside: Sequence[str] = (),
    ) -> None:
        self.last, self.best = Path(save_dir) / _LAST, Path(save_dir) / _BEST
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.evaluator = evaluator
        self.random_transforms = random_transforms
        self.resume = resume
        self.seed = seed
        self.beside = [Path(save_dir) / name for name in beside]
        self._validated: list[str] = []
        if resume:
            resumable(save_dir)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, as its last handler but for those that only report."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._seed_epoch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # others may still read weights that are put aside below
        if rank() == 0:
            self.last.parent.mkdir(parents=True, exist_ok=True)
            _claim(self.last.parent)
            for file in (self.last, self.best):
                remove_partial_files(file)
        self._validated = _names_of_cases(self.evaluator)
        if self.resume:
            self._restore(engine)
        elif rank() == 0:
            weights = [file for file in (self.last, self.best) if file.exists()]
            for file in [*weights, *(file for file in self.beside if weights and file.exists())]:
                aside = file.with_name(f"{file.stem}.previous{file.suffix}")
                file.replace(aside)
                logger.warning("kept the earlier training's %s as %s", file, aside.name)
            _put_curves_aside(self.last.parent / "tensorboard")

    def _restore(self, engine: Engine) -> None:
        load_weights(self.network, self.last)
        state = torch.load(self.last, map_location="cpu", weights_only=True)
        self._require_same(state)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.lr_scheduler is not None:
            planned = self.lr_scheduler.state_dict()
            for name in _LENGTHS & planned.keys():
                before = state["lr_scheduler"].get(name)
                if before != planned[name]:
                    raise ValueError(
                        f"{self.last}: its learning rate ends at {before} ({name}), that of the training to go on with at "
                        f"{planned[name]}; resume it with the same --epochs and data, or begin anew with its weights: "
                        f"--pretrained {self.last}"
                    )
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        scaler = getattr(engine, "scaler", None)
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        # the engine ends after max_epochs epochs of steps, too, of which there may be others in an epoch now
        steps = state["epoch"] * (engine.state.epoch_length or 0)
        if state["iteration"] != steps:
            logger.warning(
                "%s: an epoch had %g steps and has %s now (another number of processes, batch size or data); what comes is not "
                "what an uninterrupted training would give",
                self.last,
                state["iteration"] / max(state["epoch"], 1),
                engine.state.epoch_length,
            )
        engine.state.epoch, engine.state.iteration = state["epoch"], steps
        if self.evaluator is not None:
            self.evaluator.state.best_metric = state["best_metric"]
            self.evaluator.state.best_metric_epoch = state["best_metric_epoch"]
        written.add(self.last.resolve())
        done = state["epoch"] >= (engine.state.max_epochs or math.inf)
        logger.info(
            "resumed %s after epoch %d%s", self.last, state["epoch"], ", its last: nothing is left to train" * done
        )

    def _require_same(self, state: dict[str, Any]) -> None:
        """Refuse to go on with another learning rate or other cases to validate with, which the file's would override."""
        groups = zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=False)
        for before, now in groups:
            name = "initial_lr"  # which a schedule notes
            if name in before and name in now and not math.isclose(before[name], now[name]):
                raise ValueError(
                    f"{self.last}: its learning rate began at {before[name]:g}, that of the training to go on with at "
                    f"{now[name]:g}; resume it with the same, or begin anew with its weights: --pretrained {self.last}"
                )
        changed = sorted(set(state.get("validated", self._validated)) ^ set(self._validated))
        if changed:
            raise ValueError(
                f"{self.last}: the training to resume was validated with other cases (of {len(changed)}, {changed[0]} is in one "
                "of both alone); give the data and the --fold that it began with"
            )

    def _seed_epoch(self, engine: Engine) -> None:
        # processes of one training draw differently, epochs never share a seed
        seed = (self.seed * 1_000_003 + engine.state.epoch * 1009 + rank()) % 2**32
        torch.manual_seed(seed)
        if self.random_transforms is not None:
            self.random_transforms.set_random_state(seed=seed)

    def _save(self, engine: Engine) -> None:
        broken = _not_finite(self.network.state_dict())
        if broken:
            raise ValueError(
                f"epoch {engine.state.epoch}: the training has diverged, its weights are NaN or infinite ({broken}); those "
                "of the epochs before are as they were saved. Give a smaller --learning_rate, or look at the data"
            )
        if rank() != 0:
            return
        evaluated = self.evaluator.state if self.evaluator is not None else None
        scaler = getattr(engine, "scaler", None)
        state = {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "epoch": engine.state.epoch,
            "iteration": engine.state.iteration,
            "validated": self._validated,
            "best_metric": None if evaluated is None else float(evaluated.best_metric),
            "best_metric_epoch": None if evaluated is None else int(evaluated.best_metric_epoch),
        }
        if evaluated is not None and evaluated.best_metric_epoch == engine.state.epoch:
            _save(self.network.state_dict(), self.best)
        _save(state, self.last)
        written.add(self.last.resolve())

    def _finish(self, engine: Engine) -> None:
        _release(self.last.parent)
        if rank() != 0:
            return
        if self.best.exists():
            logger.info("best weights: %s; to go on from: %s", self.best, self.last)
        elif self.evaluator is not None:
            logger.warning(
                "%s: not written, since no epoch was validated (--val_interval); the last: %s", self.best, self.last
            )


def _put_curves_aside(folder: Path) -> None:
    """Move files that are older than this process out of a folder in which it writes already."""
    aside = folder.with_name(f"{folder.name}.previous")
    old = [file for file in folder.glob("events.out.tfevents.*") if file.stat().st_mtime < _BEGUN]
    for file in old:
        aside.mkdir(exist_ok=True)
        file.replace(aside / file.name)


def _not_finite(weights: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of the first tensor that is not finite, or ``None``."""
    return next((name for name, value in weights.items() if not bool(torch.isfinite(value).all())), None)


def _names_of_cases(evaluator: Evaluator | None) -> list[str]:
    """Return the names of the files that an evaluator's cases are of, in their folder, and their slices.

    Cases in memory have none; where the folder is does not matter.
    """
    data = getattr(getattr(getattr(evaluator, "data_loader", None), "dataset", None), "data", None)
    files: list[tuple[Path, str]] = []
    for case in data if isinstance(data, Sequence) else []:
        file = case.get("image", case.get("label")) if isinstance(case, Mapping) else None
        file = next((f for f in file if f is not None), None) if isinstance(file, (list, tuple)) else file
        if isinstance(file, (str, Path)):
            files.append((Path(file).absolute(), f" {case.get('slice_index', '')}".rstrip()))
    folder = os.path.commonpath([file.parent for file, _ in files]) if files else ""
    return [f"{file.relative_to(folder)}{which}" for file, which in files]


def _save(content: Any, target: Path) -> None:
    # into Python's file, since torch's own forgets why it failed
    with whole_file(target) as partial, partial.open("wb") as file:
        torch.save(_on_cpu(content), file)


def _on_cpu(content: Any) -> Any:
    """Move the tensors of nested dictionaries and lists, so that whoever loads the file needs no GPU, or not as many."""
    if isinstance(content, torch.Tensor):
        return content.cpu()
    if isinstance(content, dict):
        moved = copy.copy(content)  # a state_dict's attributes, too
        moved.update((key, _on_cpu(value)) for key, value in content.items())
        return moved
    return type(content)(map(_on_cpu, content)) if type(content) in (list, tuple) else content


def _claim(folder: Path) -> None:
    """Keep other processes from training into a folder, until it is released or this process is gone.

    Raises:
        ValueError: another process does.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    _release(folder)  # what a training of this process that failed has left
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"{folder}: another training is writing here; give another --output_dir") from None
    except OSError:  # a network drive without locks
        os.close(handle)
        return
    _claimed[folder.resolve()] = handle


def _release(folder: Path) -> None:
    handle = _claimed.pop(folder.resolve(), None)
    if handle is not None:
        os.close(handle)


def _forget_claims() -> None:
    for folder in list(_claimed):
        _release(folder)


# processes that load data outlive one that is killed by some seconds, and would hold its lock
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_claims)
