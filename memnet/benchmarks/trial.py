"""One trial of a comparison: train a network with a seed, score it on the cases kept apart, keep the record."""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import monai
import torch
from ignite.engine import Events
from monai.data import CacheDataset, DataLoader
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from monai.metrics import DiceMetric, HausdorffDistanceMetric
from monai.networks.utils import one_hot
from monai.transforms import (
    Compose,
    EnsureTyped,
    NormalizeIntensityd,
    Orientationd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandSpatialCropd,
    SpatialPadd,
)
from torch import nn
from torch.nn import functional

from memnet.benchmarks.contenders import CONTENDERS, MULTIPLE
from memnet.benchmarks.records import Record, read_record, record_file, write_whole
from memnet.losses import InvResLoss
from memnet.transforms.labels import MapLabelsd
from memnet.transforms.volumes import LoadVolumed
from memnet.workflow.checkpoints import TrainingCheckpoint
from memnet.workflow.inferers import PrecisionInferer

__all__ = ["Settings", "run_trial"]

Case = dict[str, str]


@dataclass(frozen=True)
class Settings:
    """What all trials of a comparison share.

    Attributes:
        classes: names of the labels 1, 2, ...
        epochs: passes over the training cases.
        batch_size: patches a step.
        patch_size: voxels; smaller volumes are padded, larger ones cut at random.
        learning_rate: the highest of Adam's one-cycle schedule, reached after a tenth of the steps.
        amp: train and predict under bfloat16 autocast.
    """

    classes: tuple[str, ...] = ("anterior", "posterior")
    epochs: int = 25
    batch_size: int = 2
    patch_size: tuple[int, int, int] = (32, 48, 32)
    learning_rate: float = 2e-3
    amp: bool = True


def run_trial(
    contender: str,
    seed: int,
    settings: Settings,
    cases: Mapping[str, Sequence[Case]],
    output_dir: str | Path,
    device: str = "cpu",
) -> Record:
    """Train a network and score it, unless the record of that is there already.

    An interrupted trial goes on after its last whole epoch, with the result that it would have had without. The weights
    of the last epoch are scored: none are chosen by their score.

    Args:
        contender: a word of :data:`memnet.benchmarks.contenders.CONTENDERS`.
        seed: of the initial weights and of all that is drawn in the training.
        settings: the schedule and the classes.
        cases: ``training`` and ``test``, each ``{"image": file, "label": file}``.
        output_dir: folder of the records; the training's state is in a folder beside the record, until it is done.
        device: ``cpu`` or ``cuda``.

    Returns:
        The record: the settings, the number of trainable parameters (the variational branch apart, which exists in training
        alone), and for each class and test case the Dice coefficient, the Hausdorff distance and its 95th percentile in
        mm, None where the prediction or the reference has no voxel of the class.

    Raises:
        ValueError: a trial of other settings or cases was begun there, or a label map holds a value that is no class.
    """
    file = record_file(output_dir, contender, seed)
    state = file.with_suffix("")  # the folder of a training that is not done
    names = {part: [Path(case["image"]).name.split(".")[0] for case in found] for part, found in cases.items()}
    wanted = {"settings": asdict(settings), "n_training": len(names["training"]), "test_cases": names["test"]}
    wanted = json.loads(json.dumps(wanted))  # as it is read again
    for begun in (file, state / "settings.json"):
        found = read_record(begun)
        if found is None:
            continue
        for key, value in wanted.items():
            if found[key] != value:
                raise ValueError(f"{begun} was made with {key} {found[key]}, now {value}; give another --output_dir")
        if begun == file:
            return found
    write_whole(state / "settings.json", json.dumps(wanted) + "\n")
    torch.manual_seed(seed)
    network = CONTENDERS[contender].build(1, 1 + len(settings.classes)).to(device)
    seconds = _train(network, contender, seed, settings, cases["training"], state, device)
    record = {
        "network": contender,
        "seed": seed,
        **wanted,
        "parameters": sum(p.numel() for name, p in network.named_parameters() if not name.startswith("vae.")),
        "scores": _score(network, settings, cases["test"], device),
        "seconds_of_last_run": round(seconds, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "monai": monai.__version__},
    }
    write_whole(file, json.dumps(record, indent=1) + "\n")
    shutil.rmtree(state, ignore_errors=True)
    return record


def _read(n_classes: int) -> list[Any]:
    keys = ["image", "label"]
    return [
        LoadVolumed("image"),
        LoadVolumed("label", grid_key="image"),
        MapLabelsd("label", {value: value for value in range(n_classes)}),
        Orientationd(keys, axcodes="RAS", labels=None),
        NormalizeIntensityd("image"),
    ]


def _train(
    network: nn.Module, name: str, seed: int, settings: Settings, cases: Sequence[Case], state: Path, device: str
) -> float:
    keys, patch = ["image", "label"], settings.patch_size
    transforms = Compose(
        [
            *_read(1 + len(settings.classes)),
            SpatialPadd(keys, patch, mode=["edge", "constant"]),
            RandSpatialCropd(keys, patch, random_size=False),
            RandFlipd(keys, prob=0.5, spatial_axis=0),  # left and right hippocampi are mirror images
            RandAffined(
                keys,
                prob=0.5,
                rotate_range=(0.2,) * 3,
                scale_range=(0.15,) * 3,
                mode=["bilinear", "nearest"],
                padding_mode="border",
            ),
            RandScaleIntensityd("image", factors=0.2, prob=0.5, channel_wise=True),
            RandGaussianNoised("image", prob=0.2, std=0.1),
            EnsureTyped(keys, track_meta=False),
        ]
    )
    dataset = CacheDataset(list(cases), transforms, num_workers=None, progress=False)
    loader = DataLoader(dataset, batch_size=settings.batch_size, shuffle=True, drop_last=True, num_workers=0)
    optimizer = torch.optim.Adam(network.parameters(), settings.learning_rate)
    schedule: Any = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, settings.epochs * len(loader), pct_start=0.1, cycle_momentum=False
    )
    resume = (state / "model_last.pt").is_file()
    trainer = SupervisedTrainer(
        device=device,
        max_epochs=settings.epochs,
        train_data_loader=loader,
        network=network,
        optimizer=optimizer,
        loss_function=InvResLoss(),
        inferer=PrecisionInferer(amp=settings.amp),
        decollate=False,
        train_handlers=[
            LrScheduleHandler(schedule, print_lr=False, epoch_level=False),
            TrainingCheckpoint(
                state, network, optimizer, schedule, random_transforms=transforms, resume=resume, seed=seed
            ),
        ],
    )
    trainer.logger.setLevel("WARNING")
    start = time.perf_counter()

    @trainer.on(Events.EPOCH_COMPLETED)
    def _(engine: SupervisedTrainer) -> None:
        loss, epoch = engine.state.output["loss"].item(), engine.state.epoch
        seconds = time.perf_counter() - start
        print(f"{name} seed {seed}: epoch {epoch}/{settings.epochs}, loss {loss:.3f}, {seconds:.0f} s", flush=True)

    trainer.run()
    return time.perf_counter() - start


@torch.no_grad()
def _score(
    network: nn.Module, settings: Settings, cases: Sequence[Case], device: str
) -> dict[str, dict[str, list[float | None]]]:
    n_classes = 1 + len(settings.classes)
    read, inferer = Compose(_read(n_classes)), PrecisionInferer(amp=settings.amp)
    metrics = {
        "dice": DiceMetric(include_background=False, reduction="none"),
        "hausdorff": HausdorffDistanceMetric(include_background=False, reduction="none"),
        "hausdorff95": HausdorffDistanceMetric(include_background=False, percentile=95, reduction="none"),
    }
    scores: dict[str, dict[str, list[float | None]]] = {m: {c: [] for c in settings.classes} for m in metrics}
    network.eval()
    for case in cases:
        volume = read(case)
        image, label = volume["image"].as_tensor()[None].to(device), volume["label"].as_tensor()[None].to(device)
        sizes = image.shape[2:]
        padding = [p for size in reversed(sizes) for p in (0, -size % MULTIPLE)]
        logits = inferer(functional.pad(image, padding, mode="replicate"), network)
        prediction = logits[..., : sizes[0], : sizes[1], : sizes[2]].argmax(1, keepdim=True)
        spacing = volume["label"].pixdim.tolist()
        pair = one_hot(prediction, n_classes), one_hot(label, n_classes)
        for name, metric in metrics.items():
            arguments = {} if name == "dice" else {"spacing": spacing}
            with warnings.catch_warnings(
                action="ignore"
            ):  # of a class that was not predicted: it is None in the record
                values = torch.as_tensor(metric(*pair, **arguments))
            for label_name, value in zip(settings.classes, values[0].tolist(), strict=True):
                scores[name][label_name].append(round(value, 5) if math.isfinite(value) else None)
    return scores
