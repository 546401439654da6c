"""Records of what was measured: one JSON file a trial, there as a whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memnet.whole_files import whole_file

__all__ = ["Record", "read_record", "record_file", "write_whole"]

Record = dict[str, Any]


def record_file(output_dir: str | Path, contender: str, seed: int) -> Path:
    """Return the file of a trial's record."""
    return Path(output_dir) / f"{contender}_seed{seed}.json"


def read_record(file: str | Path) -> Record | None:
    """Return what a file records, or None if it is not there.

    Raises:
        ValueError: the file is damaged.
    """
    file = Path(file)
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not a record of a trial ({error}); delete it to run the trial again") from error


def write_whole(file: Path, content: str) -> None:
    """Write a text file in one piece, so that an interruption leaves none half-written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as partial:
        partial.write_text(content, encoding="utf-8")
