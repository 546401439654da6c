"""The tables that benchmarks print, and the machine that their numbers come from."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Iterable, Sequence

import torch

__all__ = ["machine", "markdown_table", "shown", "shown_range"]


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a markdown table.

    Args:
        columns: the titles.
        rows: the cells of each row, as many as there are columns; see :func:`shown` for numbers.

    Raises:
        ValueError: a row has more or fewer cells.
    """
    lines = [list(columns), ["---"] * len(columns)]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(columns)} columns: {list(row)}")
        lines.append([str(cell) for cell in row])
    first, ruler, *rest = (" | ".join(line) for line in lines)
    return "\n".join([f"| {first} |", f"|{ruler.replace(' ', '')}|", *(f"| {line} |" for line in rest)])


def shown(value: float | None, digits: int) -> str:
    """Return a number with so many digits after the point, ``-`` where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def shown_range(values: Sequence[float], digits: int = 2) -> str:
    """Return the median of numbers and, in brackets, the least and the greatest; ``-`` where there is none."""
    if not values:
        return "-"
    median, least, greatest = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{median} ({least}-{greatest})"


def machine(device: str = "cpu") -> str:
    """Name the hardware, its threads and the version of PyTorch."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    n_threads = torch.get_num_threads()
    return f"{hardware}, {n_threads} thread{'s' * (n_threads != 1)}, torch {torch.__version__}"
