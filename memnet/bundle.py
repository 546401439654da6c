"""What a bundle's configs need around MONAI's own workflow: its folder, checked overrides, errors of one line."""

from __future__ import annotations

import atexit
import difflib
import errno
import inspect
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.config_item import ConfigComponent
from torch import distributed

from memnet.whole_files import NotWrittenError
from memnet.workflow.allocation import keep_freed_memory
from memnet.workflow.out_of_memory import is_out_of_memory, what_fits

__all__ = ["bundle_root", "check_overrides", "end", "input_error", "one_line_errors", "start"]

# ids that MONAI itself adds to a config
_OF_MONAI = {"_meta_", "tracking_uri", "experiment_name", "run_name", "save_execute_config", "is_not_rank0", "tracking"}
_PACKAGE = str(Path(__file__).parent)
# what a system says of its disks and folders, of which no program is to blame
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OF_THE_MACHINE = _FULL | {errno.EROFS, errno.EACCES, errno.EPERM}
_LOAD_CONFIG, _LOAD_CONFIGS = ConfigParser.load_config_file.__code__, ConfigParser.load_config_files.__code__
_NOT_WRITTEN = re.compile(rf"^{NotWrittenError.__module__}\.{NotWrittenError.__name__}: (.+)$", re.MULTILINE)


def start() -> str:
    """Begin a run: refuse unknown overrides; in ``python -m monai.bundle``, end a user's error in one line.

    Returns:
        The bundle's folder.

    Raises:
        ValueError: if an override names nothing in the config.
    """
    if _is_command():
        one_line_errors()
        keep_freed_memory()
    workflow = _calling_workflow()
    if workflow is not None:
        check_overrides(workflow)
        _read_words(workflow)
    return bundle_root()


def end() -> None:
    """End a run of several processes: leave the process group and, in ``python -m monai.bundle``, the process itself.

    A DistributedDataParallel network keeps Gloo's threads alive past ``destroy_process_group``; those that still hold a tensor
    when the interpreter is taken down abort the process at times (https://github.com/pytorch/pytorch/pull/179291), and the
    launcher reports a finished training as failed. So the interpreter is not taken down: what is registered to run at exit
    runs, and the process exits.
    """
    if not distributed.is_initialized():
        return
    distributed.barrier()
    distributed.destroy_process_group()
    if _is_command():
        atexit._run_exitfuncs()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def bundle_root() -> str:
    """Return the folder of the bundle whose config is being read, whatever the working directory.

    Returns:
        An absolute path: the parent of the ``configs`` folder of the MONAI workflow that asks. Where no workflow asks,
        as when a config is parsed alone, the working directory, as MONAI's own bundles assume.
    """
    workflow = _calling_workflow()
    root = Path() if workflow is None else workflow.config_root_path / ".."
    return str(root.resolve())


def check_overrides(workflow: ConfigWorkflow) -> None:
    """Refuse an override whose key exists nowhere, which MONAI would take without a word.

    A key is known if one of the bundle's configs has it or if the config in use refers to it. The arguments of a
    component (``network_def#channels``) are compared with its signature.

    Args:
        workflow: the workflow with its overrides applied.

    Raises:
        ValueError: naming the key and the nearest known one; or what is to be run is not in the config.
    """
    shipped = _shipped_configs(workflow.config_root_path)
    if not shipped:
        return
    config = workflow.parser.get()
    if workflow.run_id not in config:
        to_run = ", ".join(key for key in ("training", "evaluating", "run") if key in config)
        raise ValueError(
            f"{workflow.run_id!r} is nothing that this config runs ({to_run}); of several files give their folder or a list, "
            "\"['a.nii.gz', 'b.nii.gz']\", rather than a pattern that the shell resolves"
        )
    referred = set(re.findall(r"@(\w+)", json.dumps(config, default=str)))
    known = {key for content in shipped for key in content} | referred | _OF_MONAI
    known |= {workflow.run_id, workflow.init_id, workflow.final_id}
    for key in config:
        if key not in known:
            raise ValueError(_unknown(key, sorted(k for k in known if k not in _OF_MONAI)))
    for path, section in _sections(config):
        originals = [c for c in (_at(content, path) for content in shipped) if isinstance(c, dict)]
        if not originals:
            continue
        target = section.get("_target_")
        names = {k for c in originals for k in c} | (_parameters(target) if target else set())
        for key in section:
            # a dictionary is a component that someone adds, such as a metric of their own
            added = not target and isinstance(section[key], dict)
            if key not in names and not added and not (target and "**" in names):
                raise ValueError(_unknown("#".join([*path, key]), ["#".join([*path, k]) for k in sorted(names)]))


def input_error(error: BaseException | None) -> ValueError | None:
    """Find the error about the user's input behind the errors that MONAI wrapped around it.

    Args:
        error: what was caught.

    Returns:
        The ``ValueError`` that this package raised; one that says so where the machine ran out of memory or disk, a folder
        is read-only or a config cannot be read; or ``None`` if there is none, that is for a programming error.
    """
    while error is not None:
        if is_out_of_memory(error):
            return ValueError(f"out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
        # of what its writers raise, MONAI's SaveImage hands on the text alone
        told = _NOT_WRITTEN.search(str(error)) if isinstance(error, RuntimeError) else None
        if told:
            return ValueError(told[1])
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            place = f"{Path(os.fsdecode(error.filename))}: " if error.filename else ""
            if error.errno in _FULL:
                return ValueError(f"{place}cannot be written ({error.strerror})")
            return ValueError(f"{place}{error.strerror}; outputs go where --output_dir says")
        if isinstance(error, ValueError) and error.__traceback__ is not None:
            raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
            if raised_in.startswith(_PACKAGE):
                return error
        config = _unread_config(error)
        if config is not None:
            return ValueError(f"{config}: no config that can be read, a JSON object ({error})")
        error = error.__cause__ or error.__context__
    return None


def one_line_errors() -> None:
    """Make this process end a user's error in one line and exit code 1, without a traceback.

    Hosts such as MONAI Label do not call it: the ``ValueError`` reaches them.
    """
    if sys.excepthook is _print_input_error:
        return
    sys.excepthook = _print_input_error
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_news)


def _unread_config(error: BaseException) -> str | None:
    """Return the config that MONAI's parser was at, of whose errors few name it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is _LOAD_CONFIG:
            return str(frame.f_locals["filepath"])
        if frame.f_code is _LOAD_CONFIGS and not isinstance(frame.f_locals.get("config_dict", {}), dict):
            return str(frame.f_locals["i"])
    return None


def _is_command() -> bool:
    return sys.argv[0].endswith(str(Path("monai", "bundle", "__main__.py")))


def _read_words(workflow: ConfigWorkflow) -> None:
    """Take ``--resume true`` for what it says; the command line knows ``True`` alone and would pass the word on."""
    words = {"true": True, "false": False, "null": None, "none": None}
    config = workflow.parser.get()
    for path, section in [((), config), *_sections(config)]:
        for key, value in section.items():
            if isinstance(value, str) and value.lower() in words:
                workflow.parser["#".join([*path, key])] = words[value.lower()]


def _print_input_error(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    found = input_error(error)
    if found is None:
        sys.__excepthook__(kind, error, where)
    else:
        advice = _what_fits(error, where)
        print(f"error: {' '.join(f'{found}{advice}'.split())}", file=sys.stderr)


def _what_fits(error: BaseException | None, where: TracebackType | None) -> str:
    """Return what would fit, if memory is what is missing in a workflow's run."""
    while error is not None and not is_out_of_memory(error):
        error = error.__cause__ or error.__context__
    while error is not None and where is not None:
        caller = where.tb_frame.f_locals.get("self")
        if isinstance(caller, ConfigWorkflow):
            return f"; {what_fits(caller.parser.get())}"
        where = where.tb_next
    return ""


def _is_news(record: logging.LogRecord) -> bool:
    """Keep ignite and MONAI from reporting an input error before it is printed."""
    error = record.exc_info[1] if record.exc_info else sys.exc_info()[1]
    return record.levelno < logging.ERROR or input_error(error) is None


def _calling_workflow() -> ConfigWorkflow | None:
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, ConfigWorkflow):
            return caller
        frame = frame.f_back
    return None


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


def _at(config: dict[str, Any], path: tuple[str, ...]) -> Any:
    found: Any = config
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


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


def _unknown(key: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{key!r} is no setting of this bundle{hint}"
