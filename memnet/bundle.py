"""What a bundle's configs need around MONAI's own workflow: its folder, checked overrides, errors of one line."""

from __future__ import annotations

import atexit
import errno
import inspect
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeGuard

from monai.bundle import ConfigParser, ConfigWorkflow
from torch import distributed

from memnet.whole_files import NotWrittenError
from memnet.workflow.allocation import keep_freed_memory
from memnet.workflow.checkpoints import resumable, written
from memnet.workflow.out_of_memory import is_out_of_memory, what_fits
from memnet.workflow.processes import rank
from memnet.workflow.settings import (
    build_without_memory,
    check_launcher,
    check_output_folder,
    check_overrides,
    check_values,
    check_weights,
    read_words,
    typed_settings,
)

__all__ = ["bundle_root", "end", "hide_warnings_of_monai", "input_error", "rank", "refused_input", "start"]

_INTERRUPTED = 130  # a shell's code for Ctrl-C
_PATIENCE = 5  # with what is to be done at exit, of who presses Ctrl-C, s
_PACKAGE = str(Path(__file__).parent)
# what a system says of its disks and folders, of which no program is to blame
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OF_THE_MACHINE = _FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR}
_LOAD_CONFIG, _LOAD_CONFIGS = ConfigParser.load_config_file.__code__, ConfigParser.load_config_files.__code__
_NOT_WRITTEN = re.compile(rf"^{NotWrittenError.__module__}\.{NotWrittenError.__name__}: (.+)$", re.MULTILINE)


def start() -> str:
    """Begin a run: refuse settings that cannot be; in ``python -m monai.bundle``, end a user's error in one line.

    Returns:
        The bundle's folder.

    Raises:
        ValueError: if an override names nothing in the config or is no value for what it names; see
            :mod:`memnet.workflow.settings`. That nothing can be written, or that weights do not fit, is an error of a
            command alone: others read a bundle without running it.
    """
    if _is_command():
        _one_line_errors()
        keep_freed_memory()
        hide_warnings_of_monai()
    workflow = _calling_workflow()
    if workflow is not None:
        if _is_command():
            check_launcher(workflow)
        check_overrides(workflow, typed_settings(sys.argv) if _is_command() else ())
        read_words(workflow)
        check_values(workflow)
        if _is_command() and "output_dir" in workflow.parser:
            check_output_folder(str(workflow.parser.get_parsed_content("output_dir")))
        _check_network(workflow)
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
        _exit_at_once(0)


def bundle_root() -> str:
    """Return the folder of the bundle whose config is being read, whatever the working directory.

    Returns:
        An absolute path: the parent of the ``configs`` folder of the MONAI workflow that asks. Where no workflow asks,
        as when a config is parsed alone, the working directory, as MONAI's own bundles assume.
    """
    workflow = _calling_workflow()
    root = Path() if workflow is None else workflow.config_root_path / ".."
    return str(root.resolve())


def input_error(error: BaseException | None) -> ValueError | None:
    """Find the error about the user's input behind the errors that MONAI wrapped around it.

    Args:
        error: what was caught.

    Returns:
        The ``ValueError`` that this package raised; one that says so where the machine ran out of memory or disk, a folder
        is read-only or a config cannot be read; or ``None`` if there is none, that is for a programming error.
    """
    for cause in _causes(error):
        if is_out_of_memory(cause):
            return ValueError(f"out of memory ({str(cause).splitlines()[0] if str(cause) else type(cause).__name__})")
        # of what its writers raise, MONAI's SaveImage hands on the text alone
        told = _NOT_WRITTEN.search(str(cause)) if isinstance(cause, RuntimeError) else None
        if told:
            return ValueError(told[1])
        if isinstance(cause, OSError) and cause.errno in _OF_THE_MACHINE:
            place = f"{Path(os.fsdecode(cause.filename))}: " if cause.filename else ""
            if cause.errno in _FULL:
                return ValueError(f"{place}cannot be written ({cause.strerror})")
            return ValueError(f"{place}{cause.strerror}; outputs go where --output_dir says")
        if _is_own(cause):
            return cause
        config = _unread_config(cause)
        if config is not None:
            return ValueError(f"{config}: no config that can be read, a JSON object ({cause})")
    return None


def refused_input(error: BaseException | None) -> ValueError | None:
    """Find the error with which this package refused what it was given to read, behind what MONAI wrapped around it.

    Args:
        error: what was caught.

    Returns:
        The ``ValueError``; ``None`` for any other error, among them those of :func:`input_error` that are of the machine.
    """
    causes = list(_causes(error))
    if any(is_out_of_memory(cause) or isinstance(cause, NotWrittenError) for cause in causes):
        return None
    return next((cause for cause in causes if _is_own(cause)), None)


def hide_warnings_of_monai() -> None:
    """Hide what MONAI warns its own developers of: its surface distances call a function as it no longer is to be called."""
    warnings.filterwarnings("ignore", "monai.*always_return_as_numpy", FutureWarning)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_own(error: BaseException) -> TypeGuard[ValueError]:
    """Tell whether an error is a ``ValueError`` that this package raised."""
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return False
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_PACKAGE)


def _one_line_errors() -> None:
    """Make this process end a user's error in one line and exit code 1, without a traceback.

    Hosts such as MONAI Label do not call it: the ``ValueError`` reaches them.
    """
    if sys.excepthook is _print_input_error:
        return
    sys.excepthook = _print_input_error
    logging.setLoggerClass(_NewsLogger)  # of MONAI's handlers, which log to handlers of their own
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


def _check_network(workflow: ConfigWorkflow) -> None:
    try:
        network = build_without_memory(workflow)
        if network is not None and _is_command():
            check_weights(workflow, network)
    except Exception as error:  # whatever else the meta device stumbles on, the run itself is to tell
        found = input_error(error)
        if found is not None:
            raise ValueError(str(found)) from error  # anew, since the error found is one of those behind this one


def _print_input_error(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(f"interrupted{_how_to_go_on(where)}", file=sys.stderr)
        _exit_at_once(_INTERRUPTED, _PATIENCE)
        return
    found = input_error(error)
    if found is None:
        sys.__excepthook__(kind, error, where)
    else:
        told = " ".join(f"{found}{_what_fits(error, where)}".split())
        print(f"error: {told}", file=sys.stderr)
        summary = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if summary:  # of torchrun, which ends with a page of its own
            Path(summary).write_text(json.dumps({"message": told, "timestamp": int(time.time())}), encoding="utf-8")


def _what_fits(error: BaseException | None, where: TracebackType | None) -> str:
    """Return what would fit, if memory is what is missing in a workflow's run."""
    while error is not None and not is_out_of_memory(error):
        error = error.__cause__ or error.__context__
    workflow = _workflow_in(where)
    return "" if error is None or workflow is None else f"; {what_fits(workflow.parser.get())}"


def _how_to_go_on(where: TracebackType | None) -> str:
    """Return how, if what was interrupted is a training that has come to the end of an epoch."""
    workflow = _workflow_in(where)
    if workflow is None or "resume" not in workflow.parser:
        return ""
    try:
        last = resumable(workflow.parser.get_parsed_content("output_dir"))
    except ValueError:
        return ""
    return f"; the same command with --resume true goes on from {last}" if last.resolve() in written else ""


def _exit_at_once(code: int, patience: float | None = None) -> None:
    """End the process without taking the interpreter down, which threads at work in libraries do not survive."""
    at_exit = threading.Thread(target=atexit._run_exitfuncs, daemon=True)  # such as files of events to be completed
    at_exit.start()
    at_exit.join(patience)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _workflow_in(where: TracebackType | None) -> ConfigWorkflow | None:
    while where is not None:
        caller = where.tb_frame.f_locals.get("self")
        if isinstance(caller, ConfigWorkflow):
            return caller
        where = where.tb_next
    return None


def _is_news(record: logging.LogRecord) -> bool:
    """Keep ignite and MONAI from reporting an input error, or an interrupt, before it is printed."""
    error = record.exc_info[1] if record.exc_info else sys.exc_info()[1]
    return record.levelno < logging.ERROR or not (isinstance(error, KeyboardInterrupt) or input_error(error))


class _NewsLogger(logging.Logger):
    def filter(self, record: logging.LogRecord) -> bool | logging.LogRecord:
        return _is_news(record) and super().filter(record)


def _calling_workflow() -> ConfigWorkflow | None:
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, ConfigWorkflow):
            return caller
        frame = frame.f_back
    return None
