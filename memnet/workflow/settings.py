"""Checks what a run is told before it reads data: names, kinds of values, device, network, weights, output folder."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.config_item import ConfigComponent
from torch import distributed, nn

from memnet.spelling import did_you_mean
from memnet.workflow.checkpoints import TrainingCheckpoint, WeightsLoader, fitting_weights, resumable

__all__ = [
    "build_without_memory",
    "check_launcher",
    "check_output_folder",
    "check_overrides",
    "check_values",
    "check_weights",
    "read_words",
    "typed_settings",
]

logger = logging.getLogger("memnet")

# ids that MONAI itself adds to a config
_OF_MONAI = {"_meta_", "tracking_uri", "experiment_name", "run_name", "save_execute_config", "is_not_rank0", "tracking"}
_OF_COMPONENTS = {"_target_", "_disabled_", "_requires_", "_desc_", "_mode_", "_args_"}
_COUNTERPARTS = {"ckpt_path": "pretrained", "pretrained": "ckpt_path"}  # weights to begin a training with, and to run
_AT_LEAST_ONE = {"batch_size", "epochs", "patches_per_map", "patches_per_volume", "sw_batch_size", "val_interval"}
_LOADERS = {f"{handler.__module__}.{handler.__name__}" for handler in (TrainingCheckpoint, WeightsLoader)}
# settings that name files or folders
_PLACES = re.compile(r".*_(dir|path)|image|datalist|pretrained|dwi|t1|t1c|t2|flair")
# the narrowest that all configs of a bundle have for a setting is what a person may give
_KINDS: tuple[tuple[tuple[type, ...], str], ...] = (
    ((bool,), "true or false"),
    ((int,), "a whole number"),
    ((int, float), "a number"),
)


def check_launcher(workflow: ConfigWorkflow) -> None:
    """Refuse several processes with a config for one, which would train apart from each other, and the other way round.

    Raises:
        ValueError: saying what is missing, the overlay or ``torchrun``.
    """
    n_processes = int(os.environ.get("WORLD_SIZE", "0") or 0)
    joins = "init_process_group" in json.dumps(workflow.parser.get().get(workflow.init_id), default=str)
    if joins and not n_processes and not distributed.is_initialized():
        raise ValueError(
            "multi_gpu_train.json is for several processes: start it by torchrun --standalone --nproc_per_node N -m monai.bundle "
            "run ..., or leave it out"
        )
    if n_processes > 1 and "LOCAL_RANK" in os.environ and not joins:
        several = "; for several give \"['configs/train.json','configs/multi_gpu_train.json']\" as --config_file"
        raise ValueError(
            f"torchrun has started {n_processes} processes, and this config is for one"
            + (several if workflow.run_id == "training" else ": run it without torchrun")
        )


def check_overrides(workflow: ConfigWorkflow, typed: Collection[str] = ()) -> None:
    """Refuse an override whose key exists nowhere or is not read, which MONAI would take without a word.

    A key is known if one of the bundle's configs in use has it, which are those with nothing that is missing here, or if the
    config refers to it. The arguments of a component (``network_def#channels``) are compared with its signature.

    Args:
        workflow: the workflow with its overrides applied.
        typed: settings that the command line has, see :func:`typed_settings`; one that is of no use to what is to be run, such as
            ``epochs`` to an evaluation, is a warning, and weights are refused. Hosts set some whether they are of use or not.

    Raises:
        ValueError: naming the key and the nearest known one; or what is to be run is not in the config.
    """
    shipped = _shipped_configs(workflow.config_root_path)
    if not shipped:
        return
    config = workflow.parser.get()
    if workflow.run_id not in config:
        to_run = ", ".join(key for key in ("training", "evaluating", "run") if key in config)
        told = f"{workflow.run_id!r} is nothing that this config runs ({to_run})"
        if Path(str(workflow.run_id)).suffix:  # the second file of a pattern
            told += "; of several files give their folder or a list, \"['a.nii.gz', 'b.nii.gz']\", rather than a pattern that "
            told += "the shell resolves"
        raise ValueError(told)
    referred = set(re.findall(r"@(\w+)", json.dumps(config, default=str)))
    in_use = {key for content in shipped if content.keys() <= config.keys() for key in content} | referred
    known = in_use | _OF_MONAI | {workflow.run_id, workflow.init_id, workflow.final_id}
    for key in config:
        if key in known:
            continue
        if any(key in content for content in shipped):
            raise ValueError(f"{key!r} is a setting of another config of this bundle, and nothing that this run reads")
        raise _unknown(key, in_use)
    if typed:
        _require_in_use(config, shipped, typed, [str(workflow.run_id), workflow.init_id, workflow.final_id])
    for path, component in _listed(config):
        names = _parameters(component["_target_"]) | _OF_COMPONENTS
        for key in component.keys() - names if "**" not in names else ():
            raise _unknown("#".join([*path, key]), ("#".join([*path, k]) for k in names - _OF_COMPONENTS))
    for path, section in _sections(config):
        originals = _at(shipped, path)
        if not originals:
            continue
        target = section.get("_target_")
        names = {k for c in originals for k in c} | (_parameters(target) if target else set())
        if _is_table(section) and all(_is_table(original) for original in originals):
            continue
        for key in section:
            # a dictionary is a component that someone adds, such as a metric of their own
            added = not target and isinstance(section[key], dict)
            if key not in names and not added and not (target and "**" in names):
                raise _unknown("#".join([*path, key]), ("#".join([*path, k]) for k in names))


def typed_settings(arguments: Sequence[str]) -> set[str]:
    """Return the settings that a command line has overrides of."""
    words = {re.split("=|#|::", argument[2:])[0] for argument in arguments if argument.startswith("--")}
    return words - {"config_file", "meta_file", "logging_file", "args_file", "run_id", "workflow_type"}


def _require_in_use(
    config: dict[str, Any], shipped: list[dict[str, Any]], typed: Collection[str], run: list[str]
) -> None:
    """Tell of a value that was given for a setting to which nothing leads from what is run; refuse weights."""
    used: set[str] = set()
    to_see = {*run, "imports"}
    while to_see:
        key = to_see.pop()
        used.add(key)
        to_see |= set(re.findall(r"@(\w+)", json.dumps(config.get(key), default=str))) - used
    for key in (config.keys() & set(typed)) - used - _OF_MONAI:
        known = [_text(content[key]) for content in shipped if key in content]
        if known and not isinstance(config[key], dict) and _text(config[key]) not in known:
            told, other = f"{key!r} is nothing that {run[0]!r} reads", _COUNTERPARTS.get(key)
            if other in used:
                raise ValueError(f"{told}; did you mean --{other}?")
            logger.warning("%s", told)


def _text(value: Any) -> str:
    if str(value).lower() == "none":
        return "null"
    return json.dumps(value, default=str).replace("::", "#")  # as MONAI writes references once it has parsed them


def read_words(workflow: ConfigWorkflow) -> None:
    """Take ``--resume true`` for what it says, ``--dataset_dir 100307`` for a folder's name, ``--tile 16`` for a list of it.

    The command line knows ``True`` alone and would pass the word on, and makes a number of what looks like one: 20241129153000 of
    a folder called 20241129_153000. Of files and folders ``~`` is the home folder.
    """
    words = {"true": True, "false": False, "null": None, "none": None}
    config, shipped = workflow.parser.get(), _shipped_configs(workflow.config_root_path)
    for path, section in [((), config), *_sections(config)]:
        originals = _at(shipped, path)
        for key, value in section.items():
            known = [original[key] for original in originals if original.get(key) is not None]
            if _are_numbers(known) and _all_are((int, float), [value]):
                workflow.parser["#".join([*path, key])] = [value] * len(known[0])
            elif isinstance(value, str) and value.lower() in words:
                workflow.parser["#".join([*path, key])] = words[value.lower()]
            elif not path and _PLACES.fullmatch(key):
                if _all_are((int, float), [value]):
                    value = _as_typed(key, sys.argv) or str(value)
                if isinstance(value, str):
                    workflow.parser[key] = os.path.expanduser(value)


def check_values(workflow: ConfigWorkflow) -> None:
    """Refuse values of another kind than the bundle's own configs have, and devices that are not there.

    ``true`` and ``false``, whole numbers, numbers and lists of numbers are kinds. What is above zero in every config of the
    bundle may not be below, counts such as ``epochs`` are at least 1, lists of several numbers keep their length. ``null``,
    MONAI's expressions and what is text in the bundle are taken as they are.

    Args:
        workflow: the workflow with its overrides applied and its words read.

    Raises:
        ValueError: naming the setting, its value and what is expected.
    """
    config, shipped = workflow.parser.get(), _shipped_configs(workflow.config_root_path)
    for path, section in [((), config), *_sections(config)]:
        originals = _at(shipped, path)
        for key, value in section.items():
            known = [original[key] for original in originals if original.get(key) is not None]
            if value is None or (isinstance(value, str) and value.startswith(("$", "@"))):
                continue
            expected = _expected(key, value, known)
            if expected:
                raise ValueError(
                    f"{'#'.join([*path, key])} is {value!r}, expected {expected} ({json.dumps(known[0])} in the bundle)"
                )
    device = config.get("device")
    if isinstance(device, str) and not device.startswith(("$", "@")):
        _check_device(device)


def check_output_folder(folder: str | Path) -> None:
    """Refuse a folder in which nothing can be written, before a run has taken its hours.

    Args:
        folder: there already or to be made.

    Raises:
        ValueError: naming what is in the way.
    """
    try:
        nearest = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    except OSError as error:  # a name too long
        raise ValueError(f"{folder}: {error.strerror}; outputs go where --output_dir says") from error
    if not nearest.is_dir():
        raise ValueError(f"{nearest}: is no folder; outputs go where --output_dir says")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{nearest}: Permission denied; outputs go where --output_dir says")


def build_without_memory(workflow: ConfigWorkflow) -> nn.Module | None:
    """Build a run's network on the meta device, where it takes no memory, so that one that cannot be is refused at once.

    Args:
        workflow: the workflow with its overrides applied.

    Returns:
        The network, or ``None`` if the config has no ``network_def``.

    Raises:
        RuntimeError: MONAI's, around the network's own error.
    """
    config = workflow.parser.get()
    if "network_def" not in config:
        return None
    parser = ConfigParser(json.loads(json.dumps(config, default=str)))
    with torch.device("meta"):
        return cast(nn.Module, parser.get_parsed_content("network_def"))


def check_weights(workflow: ConfigWorkflow, network: nn.Module) -> None:
    """Refuse weights to load that are not there or do not fit, before a run prepares its data for them.

    Args:
        workflow: the workflow with its overrides applied and its words read.
        network: what :func:`build_without_memory` returns.

    Raises:
        ValueError: see :func:`memnet.workflow.checkpoints.fitting_weights`; there is no training to resume.
    """
    for path, handler in _handlers(workflow.parser.get()):
        if handler.get("_target_") not in _LOADERS:
            continue
        given = {
            key: workflow.parser.get_parsed_content("#".join([*path, key]))
            for key in {"_disabled_", "load_path", "may_miss", "spread", "resume", "save_dir"} & handler.keys()
        }
        if "load_path" in given and not given.get("_disabled_"):
            options = {key: given[key] for key in ("may_miss", "spread") if key in given}
            fitting_weights(network, given["load_path"], **options)
        if given.get("resume"):
            fitting_weights(network, resumable(given["save_dir"]))


def _expected(key: str, value: Any, known: Sequence[Any]) -> str | None:
    """Return what kind of value is expected, or ``None`` if this one is of that kind or any will do."""
    if _are_numbers(known):
        lengths = {len(k) for k in known}
        if not isinstance(value, (list, tuple)):
            return "a list of numbers"
        fits = _all_are((int, float), value) and (len(value) in lengths or 1 in lengths)
        return None if fits else f"{' or '.join(map(str, sorted(lengths)))} numbers"
    for types, words in _KINDS:
        if known and _all_are(types, known):
            if not _all_are(types, [value]):
                return words
            least = 1 if key in _AT_LEAST_ONE else 0
            too_small = types != (bool,) and min(known) > 0 and value < least
            return f"{words} of at least {least}" if too_small else None
    return None


def _are_numbers(known: Sequence[Any]) -> bool:
    """Tell whether all configs that have a setting have a list of numbers there."""
    return bool(known) and all(isinstance(k, list) and k and _all_are((int, float), k) for k in known)


def _as_typed(key: str, arguments: Sequence[str]) -> str | None:
    """Return the word that a command line has for a setting, or ``None`` if it has none."""
    words = [b for a, b in pairwise(arguments) if a == f"--{key}"]
    words += [a.split("=", 1)[1] for a in arguments if a.startswith(f"--{key}=")]
    return words[-1] if words else None


def _all_are(types: tuple[type, ...], values: Sequence[Any]) -> bool:
    return all(isinstance(value, types) and (bool in types or not isinstance(value, bool)) for value in values)


def _check_device(device: str) -> None:
    try:
        kind, place = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, expected cpu, cuda or, of several, cuda:0") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but PyTorch sees no GPU here; give --device cpu, or leave it out")
    if kind == "cuda" and place >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ValueError(f"device is {device!r}, but the last GPU that PyTorch sees here is cuda:{last}")


def _shipped_configs(folder: Path) -> list[dict[str, Any]]:
    contents = []
    for file in sorted(folder.glob("*.json")):
        try:
            contents.append(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, OSError):
            continue  # MONAI itself refuses the configs in use
    return [_nested(content) for content in contents if isinstance(content, dict)]


def _nested(config: dict[str, Any]) -> dict[str, Any]:
    """Turn an overlay's ``{"a#b": c}`` into ``{"a": {"b": c}}``."""
    nested: dict[str, Any] = {}
    for key, value in config.items():
        *path, last = key.lstrip("+").replace("::", "#").split("#")
        section = nested
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return nested


def _sections(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    for key, value in config.items():
        if isinstance(value, dict) and key != "_meta_":
            yield (*path, key), value
            yield from _sections(value, (*path, key))


def _listed(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield the components in lists, such as transforms, and where they are."""
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        if isinstance(config, list) and isinstance(value, dict) and isinstance(value.get("_target_"), str):
            yield (*path, str(key)), value
        if key != "_meta_":
            yield from _listed(value, (*path, str(key)))


def _handlers(config: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    for path, section in [((), config), *_sections(config)]:
        handlers = section.get("handlers")
        for number, handler in enumerate(handlers if isinstance(handlers, list) else []):
            if isinstance(handler, dict):
                yield (*path, "handlers", str(number)), handler


def _is_table(section: dict[str, Any]) -> bool:
    """Tell whether a dictionary is a value, one of numbers to numbers such as a map of labels, and no component's settings."""
    return bool(section) and all(re.fullmatch(r"-?\d+", str(key)) for key in section)


def _at(configs: Sequence[Any], path: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return what the configs have at a path, of those that have a dictionary there."""
    found = list(configs)
    for key in path:
        found = [config.get(key) for config in found if isinstance(config, dict)]
    return [config for config in found if isinstance(config, dict)]


def _parameters(target: Any) -> set[str]:
    """Return the arguments that a component takes; ``**`` stands for any."""
    return _parameters_of(target) if isinstance(target, str) and not target.startswith("$") else {"**"}


@cache
def _parameters_of(target: str) -> set[str]:
    try:
        name = ConfigComponent({"_target_": target}).resolve_module_name()
        module, _, attribute = name.rpartition(".")
        component = getattr(sys.modules.get(module) or __import__(module, fromlist=[attribute]), attribute)
        parameters = inspect.signature(component).parameters.values()
    except (ImportError, AttributeError, TypeError, ValueError):
        return {"**"}
    return {"**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters}


def _unknown(key: str, known: Iterable[str]) -> ValueError:
    return ValueError(f"{key!r} is no setting of this bundle{did_you_mean(key, sorted(known))}")
