"""Says beforehand what a training takes and what fits: ``python -m memnet plan``."""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from monai.bundle import ConfigParser
from torch import nn
from torch.nn import functional

from memnet.accounting.dry_run import Device, dry_run
from memnet.budget import parse_bytes
from memnet.chain import Chain, Memory
from memnet.diffusion.superresolution import TensorLoss
from memnet.nets.packed import PackedMoDL
from memnet.spelling import did_you_mean

__all__ = ["Plan", "TrainingStep", "fill_budget", "largest_patch", "parse_bytes", "read_override"]

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
# losses whose target looks like the prediction; others take a label map of one channel
_OF_ONE_SHAPE = (nn.L1Loss, nn.MSELoss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCEWithLogitsLoss)


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
        ValueError: a file is missing, or the config has no such network or setting.
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
        network = self._build_without_data(None)
        self._packed = isinstance(network, PackedMoDL)
        self.strategies: list[str | None] = [None]
        if self._packed or any(isinstance(module, Chain) for module in network.modules()):
            self.strategies = [memory for memory in get_args(Memory) if self._supports(memory)]
        self.state = 4 * 4 * sum(p.numel() for p in network.parameters())
        n_coils = self._number(parser, "n_coils", 8)  # of k-space, as many maps, and the mask
        self.in_channels = 2 * n_coils + 1 if self._packed else self._number(parser, f"{network_id}#in_channels", 1)
        self.batch = self._number(parser, "batch_size", 1) * self._number(parser, "patches_per_volume", 1)
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
        if precision not in _PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(_PRECISIONS)}, got {precision!r}")
        patch, batch, dtype = tuple(patch) or self.patch, batch or self.batch, _PRECISIONS[precision]
        if not patch:
            raise ValueError("a slab's sizes depend on the raw data: say them (--shape 16 320 256)")
        key = memory, precision, patch, batch, memory_budget
        if key in self._plans:
            return self._plans[key]

        def make() -> tuple[Callable[[], object], Iterable[torch.Tensor]]:
            parser = self._parser(memory)
            if memory_budget is not None:
                parser[f"{self._network_id}#memory_budget"] = memory_budget
            network = parser.get_parsed_content(self._network_id).train()
            loss = parser.get_parsed_content(self._loss_id) if self._loss_id in parser else None
            image = torch.rand(batch, self.in_channels, *patch, dtype=torch.complex64 if self._packed else None)
            label = torch.zeros(batch, 1, *patch)
            if isinstance(loss, TensorLoss):
                with torch.no_grad():
                    label = functional.pad(network(image), [0, 0] * len(patch) + [0, 1])  # and the regions

            def run() -> None:
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    prediction = network(image)
                if loss is None:
                    parts = prediction if isinstance(prediction, list | tuple) else [prediction]
                    sum(part.float().sum() for part in parts).backward()
                elif isinstance(loss, _OF_ONE_SHAPE):
                    loss(prediction, torch.zeros_like(prediction)).backward()
                else:
                    loss(prediction, label).backward()

            return run, list(network.parameters())

        found = dry_run(make, self.device)
        self._plans[key] = Plan(memory, precision, patch, batch, found.peak, self.state, found.flops)
        return self._plans[key]

    def overrides(self, plan: Plan) -> str:
        """Return the overrides that make the config's training this step, to paste."""
        known = self._content.get("patch_size")
        if self._packed:
            patch = f"--{'n_frames' if 'n_frames' in self._content else 'slab_size'} {plan.patch[0]}"
        elif known is None:
            patch = f"a patch of {' x '.join(map(str, plan.patch))}, with"
        elif isinstance(known, int):
            patch = f"--patch_size {plan.patch[0]}"
        else:
            patch = f'--patch_size "{list(plan.patch)}"'
        memory_id = f"{self._network_id}#memory"
        reference = self._content.get(self._network_id, {}).get("memory")
        if isinstance(reference, str) and reference.startswith("@"):
            memory_id = reference[1:]
        memory = "" if plan.memory is None else f" --{memory_id} {plan.memory}"
        return f"{patch}{memory} --amp {json.dumps(plan.precision == 'bfloat16')}"

    def _build_without_data(self, memory: str | None) -> nn.Module:
        with torch.device("meta"):
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


def largest_patch(
    step: TrainingStep,
    budget: int,
    memory: str | None,
    precision: str,
    batch: int = 0,
    multiple: int = 8,
    shape: Sequence[int] = (),
) -> Plan | None:
    """Find the largest cube (square, interval) that fits, or the thickest slab.

    Args:
        step: the training step.
        budget: bytes for activations, parameters, gradients and Adam's averages.
        memory: see :meth:`TrainingStep.plan`.
        precision: likewise.
        batch: likewise.
        multiple: sides that are tried are multiples of it.
        shape: sizes of the patch, 0 for the sides to be found; all where empty.

    Returns:
        The plan of that patch, or None if not even a side of twice ``multiple`` fits.
    """
    shape = shape or (0,) * len(step.patch)
    n_free, fixed = list(shape).count(0), prod(n or 1 for n in shape)

    def plan_side(side: int) -> Plan:
        return step.plan(memory, precision, [n or side for n in shape], batch)

    side, least = 8 * multiple, multiple  # the largest that fits so far, or is too small for the network
    most: int | None = None  # the smallest that does not
    best: Plan | None = None
    last: Plan | None = None
    plan = plan_side(side)
    if plan.total > budget:
        # Small patches may take a kernel that needs more than the one for larger ones: come from above.
        side *= 2
        plan = plan_side(side)
    while True:
        if plan.total <= budget:
            best, least = plan, side
        else:
            most = side
        if most is not None and most - least <= multiple:
            return best
        voxels, slope = prod(plan.patch), plan.peak / prod(plan.patch)
        if last is not None and last.patch != plan.patch:
            slope = (plan.total - last.total) / (voxels - prod(last.patch))
        fitting = voxels + (budget - plan.total) / slope if slope > 0 else 8 * voxels
        last, side = plan, int((max(fitting, 0) / fixed) ** (1 / n_free) + 1e-6) // multiple * multiple
        side = max(side, least + multiple) if most is None else min(max(side, least + multiple), most - multiple)
        while True:
            try:
                plan = plan_side(side)
                break
            except (ValueError, RuntimeError):  # the network's own: it cannot halve so small a patch so often
                if most is None:
                    raise
                least = side
                side = (least + most) // 2 // multiple * multiple
                if most - least <= multiple:
                    return best


def fill_budget(
    step: TrainingStep, budget: int, precision: str, patch: Sequence[int] = (), batch: int = 0
) -> tuple[Plan, int] | None:
    """Find the ``memory_budget`` with which ``memory="auto"`` stores what fits, the loss and Adam's averages considered.

    Args:
        step: the training step.
        budget: bytes in all.
        precision: see :meth:`TrainingStep.plan`.
        patch: likewise.
        batch: likewise.

    Returns:
        The plan and the ``memory_budget``, or None where the network does not know ``auto`` or nothing fits.
    """
    share = budget - step.state
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a share below the least
        for _ in range(3):
            if share <= 0:
                break
            try:
                plan = step.plan("auto", precision, patch, batch, share)
            except RuntimeError:  # MONAI's, around the network's own
                break
            if plan.total <= budget:
                return plan, share
            share -= plan.total - budget  # what the loss keeps
    return None


def add_parser(commands: Any) -> None:
    """Add the command ``plan`` to the subparsers of the command line."""
    parser = commands.add_parser(
        "plan",
        help="what a training would take, and the largest patch that fits, without running it",
        description="Simulates a training step of a config on tensors without data, for each memory strategy and precision.",
    )
    parser.add_argument("--config_file", nargs="+", required=True, help="a bundle's train.json, or any MONAI config")
    parser.add_argument("--budget", help="memory of the card, such as 12GiB: finds the largest patch that fits")
    parser.add_argument(
        "--patch", type=int, nargs="+", default=[], help="sides of cubic patches; the config's by default"
    )
    parser.add_argument(
        "--shape", type=int, nargs="+", default=[], help="sizes of one patch or slab; with --budget 0 for what to find"
    )
    parser.add_argument("--batch", type=int, default=0, help="patches a step; the config's by default")
    parser.add_argument("--memory", nargs="+", choices=get_args(Memory), help="strategies; all by default")
    parser.add_argument("--precision", nargs="+", choices=list(_PRECISIONS), default=list(_PRECISIONS))
    parser.add_argument(
        "--device",
        choices=get_args(Device),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to train; the GPU where there is one, by default",
    )
    parser.add_argument("--network_id", default="network_def", help="the config's id of the network")
    parser.add_argument("--loss_id", default="loss", help="the config's id of the loss")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="ID=VALUE", help="overrides: network_name=partially vae=false"
    )
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
    a = arguments
    for option, sizes, least in (("patch", a.patch, 1), ("shape", a.shape, 0), ("batch", [a.batch], 0)):
        if min(sizes, default=least) < least:
            raise ValueError(f"--{option} is {' '.join(map(str, sizes))}, expected at least {least}")
    budget = parse_bytes(a.budget) if a.budget else None
    step = TrainingStep(a.config_file, dict(read_override(text) for text in a.set), a.network_id, a.loss_id, a.device)
    strategies = step.strategies if step.strategies == [None] else a.memory or step.strategies
    if a.memory and step.strategies == [None]:
        raise ValueError("the network knows no memory strategy; leave --memory out")
    if a.shape and len(a.shape) != len(step.patch):
        raise ValueError(f"--shape has {len(a.shape)} sizes, the network's patches have {len(step.patch)}")
    patches = [(side,) * len(step.patch) for side in a.patch] or [step.patch]
    if a.shape:
        patches = [] if 0 in a.shape else [tuple(a.shape)]
        if not patches and budget is None:
            raise ValueError("a size of 0 in --shape is to be found, which takes a --budget")
    free = a.shape if 0 in a.shape else ()
    stored: dict[Any, float] = {}
    print("| `memory` | precision | patch | patches a step | activations, MiB | in all, MiB | operations |")
    print("|---|---|---|---|---|---|---|")
    best: Plan | None = None
    lines: list[str] = []
    for precision in a.precision:
        for memory in strategies:
            plans = [step.plan(memory, precision, patch, a.batch) for patch in patches]
            if budget is not None:
                largest = largest_patch(step, budget, memory, precision, a.batch, 4 if free else 8, free)
                plans += [largest] if largest else []
                if largest and (best is None or prod(largest.patch) > prod(best.patch)):
                    best = largest
            for plan in plans:
                print(_row(plan, stored, budget), flush=True)
        filled = None
        if budget and patches and "store" in strategies:
            filled = fill_budget(step, budget, precision, patches[0], a.batch)
        if filled:
            print(_row(filled[0], stored, budget), flush=True)
            lines.append(f"{step.overrides(filled[0])} --{a.network_id}#memory_budget {filled[1]}")
    print()
    print("In all: with parameters, gradients and Adam's averages. Operations: to those of `store` at the same patch.")
    if step.device == "cuda":
        print("The workspaces of a GPU's libraries and its context come on top.")
    else:
        print("With what a CPU's convolutions take while they run, which a GPU's do not (--device cuda).")
    if budget is not None:
        print()
        print(f"Fits in {a.budget}: {step.overrides(best)}" if best else f"Nothing fits in {a.budget}.")
        for line in lines:
            print(f"Recomputes no more than {a.budget} demands: {line}")


def _row(plan: Plan, stored: dict[Any, float], budget: int | None) -> str:
    key = plan.precision, plan.patch, plan.batch
    per_voxel = plan.flops / prod(plan.patch)
    if plan.memory == "store":
        stored[plan.precision] = stored.setdefault(key, per_voxel)
    reference = stored.get(key, stored.get(plan.precision))
    operations = "-" if not reference else f"{per_voxel / reference:.2f}"
    size = " x ".join(map(str, plan.patch))
    fits = "" if budget is None else " (fits)" if plan.total <= budget else " (too much)"
    return (
        f"| {plan.memory or '-'} | {plan.precision} | {size} | {plan.batch} | {plan.peak / 2**20:.0f} "
        f"| {plan.total / 2**20:.0f}{fits} | {operations} |"
    )


def read_override(text: str) -> tuple[str, Any]:
    """Take ``ID=VALUE`` apart; the value is JSON, or else the word that it is.

    Raises:
        ValueError: it has no ``=``.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is no override; write ID=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
