"""Says beforehand what the training step of a config takes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from monai.bundle import ConfigParser
from torch import nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from memnet.accounting.autocast_of_cuda import AutocastOfCuda
from memnet.accounting.dry_run import Device, building, dry_run
from memnet.chain import Chain, Memory
from memnet.diffusion.superresolution import TensorLoss
from memnet.nets.packed import PackedMoDL
from memnet.overrides import write_override
from memnet.spelling import did_you_mean

__all__ = ["PRECISIONS", "Plan", "TrainingStep"]

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
# losses of the number of the class at each place, and those whose target looks like the prediction; others take a label map of
# one channel
_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_OF_ONE_SHAPE = (nn.L1Loss, nn.MSELoss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCEWithLogitsLoss)
_BATCHES = ("batch_size", "patches_per_volume")  # ids whose product is the number of patches of a step


class Plan(NamedTuple):
    """What one training step would take.

    Attributes:
        memory: the memory strategy; None for a network without one.
        precision: ``float32``, or ``bfloat16`` for autocast.
        patch: spatial sizes, voxels.
        batch: patches a step.
        peak: bytes alive at once in the forward and backward pass, parameters and their gradients apart.
        state: bytes of the parameters, their gradients and the two averages of Adam.
        flops: floating-point operations of convolutions and matrix products.
    """

    memory: str | None
    precision: str
    patch: tuple[int, ...]
    batch: int
    peak: int
    state: int
    flops: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.peak + self.state


class TrainingStep:
    """The training step that a MONAI config describes, to be planned for.

    Args:
        config: its file, several that are merged as MONAI merges them, or the content of one.
        overrides: values by id, such as ``{"network_def#channels": 16}``.
        network_id: the config's id of the network, any ``torch.nn.Module``.
        loss_id: its id of the loss; where it has none, the sum of the outputs is differentiated.
        device: where it would be. A GPU's libraries take workspaces that are not known, and so not counted; what a CPU's
            take is.

    Raises:
        ValueError: a file is missing, the config has no such network or setting, or the network cannot be built without data.
    """

    def __init__(
        self,
        config: str | Path | Sequence[str] | Mapping[str, Any],
        overrides: dict[str, Any] | None = None,
        network_id: str = "network_def",
        loss_id: str = "loss",
        device: Device = "cpu",
    ) -> None:
        files: list[str | Path] = []
        if isinstance(config, Mapping):
            self._content = dict(config)
        else:
            files = [config] if isinstance(config, str | Path) else list(config)
            for file in files:
                if not Path(file).is_file():
                    raise ValueError(f"{file}: no such config")
            self._content = ConfigParser.load_config_files([str(file) for file in files])
        self._overrides = overrides or {}
        for key in self._overrides:
            if key.split("#")[0] not in self._content:
                raise ValueError(f"{key!r} is no setting of the config{did_you_mean(key, self._content)}")
        self._plans: dict[Any, Plan] = {}  # each simulation takes seconds
        self._network_id, self._loss_id = network_id, loss_id
        self.device = device
        parser = self._parser(None)
        if network_id not in parser:
            raise ValueError(
                f"{', '.join(map(str, files)) or 'the config'}: has no {network_id}; name the network's id (--network_id)"
            )
        try:
            network = self._build_without_data(None)
        except Exception as error:  # of any network, or MONAI's around it
            raise ValueError(f"{network_id} cannot be built without data ({_root(error)})") from error
        self._packed = isinstance(network, PackedMoDL)
        self.strategies: list[str | None] = [None]
        if self._packed or any(isinstance(module, Chain) for module in network.modules()):
            self.strategies = [memory for memory in get_args(Memory) if self._supports(memory)]
        self.state = 4 * 4 * sum(p.numel() for p in network.parameters())
        n_coils = self._number(parser, "n_coils", 8)  # of k-space, as many maps, and the mask
        first = next((m.in_channels for m in network.modules() if isinstance(m, _ConvNd)), 1)
        self.in_channels = 2 * n_coils + 1 if self._packed else self._number(parser, f"{network_id}#in_channels", first)
        self._batches = {key: self._number(parser, key, 1) for key in _BATCHES if key in parser}
        self.batch = prod(self._batches.values())
        n_dims = self._number(parser, f"{network_id}#spatial_dims", 3)
        patch = parser.get_parsed_content("patch_size") if "patch_size" in parser else () if self._packed else 64
        self.patch: tuple[int, ...] = (patch,) * n_dims if isinstance(patch, int) else tuple(patch)

    def plan(
        self,
        memory: str | None,
        precision: str = "float32",
        patch: Sequence[int] = (),
        batch: int = 0,
        memory_budget: int | None = None,
    ) -> Plan:
        """Simulate the step.

        Args:
            memory: a strategy of the network; None leaves the config's.
            precision: ``float32`` or ``bfloat16``.
            patch: spatial sizes, voxels; the config's where empty.
            batch: patches a step; the config's where 0.
            memory_budget: bytes of the network's two passes, for ``auto``.

        Raises:
            ValueError: ``precision`` is unknown, or neither ``patch`` nor the config says how large a slab of k-space is.
            RuntimeError: the network cannot be simulated.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        patch, batch, dtype = tuple(patch) or self.patch, batch or self.batch, PRECISIONS[precision]
        if not patch:
            raise ValueError("a slab's sizes depend on the raw data: say them (--shape 16 320 256)")
        key = memory, precision, patch, batch, memory_budget
        if key in self._plans:
            return self._plans[key]

        precisions = AutocastOfCuda() if self.device == "cuda" and dtype is not None else nullcontext()

        def make() -> tuple[Callable[[], object], Iterable[torch.Tensor]]:
            parser = self._parser(memory)
            if memory_budget is not None:
                parser[f"{self._network_id}#memory_budget"] = memory_budget
            network = parser.get_parsed_content(self._network_id).train()
            loss = parser.get_parsed_content(self._loss_id) if self._loss_id in parser else None
            image = torch.rand(batch, self.in_channels, *patch, dtype=torch.complex64 if self._packed else None)
            label = torch.zeros(batch, 1, *patch)
            if isinstance(loss, _OF_CLASSES):
                label = torch.zeros(batch, *patch, dtype=torch.long)
            if isinstance(loss, TensorLoss):
                with torch.no_grad():
                    label = functional.pad(network(image), [0, 0] * len(patch) + [0, 1])  # and the regions

            def run() -> None:
                with precisions, torch.autocast("cpu", dtype, enabled=dtype is not None):
                    prediction = network(image)
                # of several outputs the first is compared, where there is a loss: SegResNetVAE's others are losses of its own
                several = isinstance(prediction, tuple) or (loss is None and isinstance(prediction, list))
                parts = [part for part in prediction if part is not None] if several else [prediction]
                if loss is not None and isinstance(loss, _OF_ONE_SHAPE):
                    parts[0] = loss(parts[0], torch.zeros_like(parts[0]))
                elif loss is not None:
                    parts[0] = loss(parts[0], label)
                sum(part.float().sum() for part in parts).backward()

            return run, list(network.parameters())

        try:
            found = dry_run(make, self.device)
        except Exception as error:  # of any network or loss
            size = " x ".join(map(str, patch))
            raise RuntimeError(f"a step with patches of {size} cannot be simulated ({_root(error)})") from error
        self._plans[key] = Plan(memory, precision, patch, batch, found.peak, self.state, found.flops)
        return self._plans[key]

    def overrides(self, plan: Plan) -> str:
        """Return the overrides that make the config's training this step, to paste, those given to this object included."""
        settings: dict[str, Any] = {}
        words = []
        known = self._content.get("patch_size")
        if self._packed:
            settings["n_frames" if "n_frames" in self._content else "slab_size"] = plan.patch[0]
        elif known is None:
            words.append(f"a patch of {' x '.join(map(str, plan.patch))}")
        else:
            is_cube = isinstance(known, int) and len(set(plan.patch)) == 1
            settings["patch_size"] = plan.patch[0] if is_cube else list(plan.patch)
        if plan.batch != self.batch:
            settings |= dict.fromkeys(self._batches, 1) | ({[*self._batches][-1]: plan.batch} if self._batches else {})
            words += [] if self._batches else [f"{plan.batch} patches a step"]
        if plan.memory is not None:
            definition = self._content.get(self._network_id)
            reference = definition.get("memory") if isinstance(definition, Mapping) else None
            is_reference = isinstance(reference, str) and reference.startswith("@")
            settings[str(reference)[1:] if is_reference else f"{self._network_id}#memory"] = plan.memory
        if "amp" in self._content:
            settings["amp"] = plan.precision == "bfloat16"
        else:
            words.append(plan.precision)
        settings = {**self._overrides, **settings}
        pasted = " ".join(write_override(key, value) for key, value in settings.items())
        return f"{' in '.join(words)}{', with ' * bool(words and pasted)}{pasted}"

    def _build_without_data(self, memory: str | None) -> nn.Module:
        with building():
            return self._parser(memory).get_parsed_content(self._network_id)

    def _supports(self, memory: str) -> bool:
        try:
            self._build_without_data(memory)
        except RuntimeError:  # MONAI's, around the network's own
            return False
        return True

    def _parser(self, memory: str | None) -> ConfigParser:
        parser = ConfigParser(json.loads(json.dumps(self._content)))
        for key, value in self._overrides.items():
            parser[key] = copy.deepcopy(value)  # which is the caller's
        if "device" in parser:
            parser["device"] = "cpu"
        if memory is not None:
            parser[f"{self._network_id}#memory"] = memory
        return parser

    @staticmethod
    def _number(parser: ConfigParser, key: str, default: int) -> int:
        return int(parser.get_parsed_content(key)) if key in parser else default


def _root(error: BaseException) -> str:
    """Return the kind and the first line of the error that caused another."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
