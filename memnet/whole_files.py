"""Writes files that are there as a whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import csv
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["NotWrittenError", "remove_partial_files", "whole_file", "write_table"]

_PREFIX = ".partial-"


class NotWrittenError(OSError, ValueError):
    """A file that could not be written, with the reason; what was there before is untouched."""


@contextmanager
def whole_file(target: str | Path) -> Iterator[Path]:
    """Hand out a path beside a file to write to; afterwards it takes the file's place.

    It is on the disk before it is renamed, so that a full disk, a quota or a network drive that says so only then leaves the
    earlier file as it was. An error removes it. A process that is killed leaves it behind, hidden, see
    :func:`remove_partial_files`. Processes and threads that write the same file do not meet: the last one's is there.

    Args:
        target: the file; its folder must exist.

    Yields:
        A path in the same folder, with a name of its own that ends as the target's.

    Raises:
        NotWrittenError: naming the target, for an ``OSError`` inside, or one behind what a library raised.
    """
    target = Path(target)
    partial = target.with_name(f"{_PREFIX}{secrets.token_hex(4)}-{target.name}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise NotWrittenError(f"{target}: cannot be written ({reason})") from error
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(target: str | Path) -> None:
    """Remove what processes that were killed while writing a file have left; only where no other process writes it."""
    target = Path(target)
    ending = f"-{target.name}"
    for file in target.parent.glob(f"{_PREFIX}*"):
        if file.name.endswith(ending) and len(file.name) == len(_PREFIX) + 8 + len(ending):
            file.unlink(missing_ok=True)


def write_table(target: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file of rows with the same keys, its header.

    Raises:
        NotWrittenError: see :func:`whole_file`.
    """
    with whole_file(target) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _reason(error: BaseException | None) -> str | None:
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        error = error.__cause__ or error.__context__
    return None
