"""Reads and writes BART's pairs of files: ``.hdr`` with the dimensions, ``.cfl`` with the values."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np

from memnet.whole_files import whole_file

__all__ = ["read_cfl", "write_cfl"]


def read_cfl(path: str | Path) -> np.ndarray:
    """Read an array.

    Args:
        path: either of the two files, or their name without the suffix.

    Returns:
        Complex64, dimensions in BART's order (x, y, z, coils, maps, ...), trailing ones of size 1 left out.

    Raises:
        ValueError: a file is missing or damaged, or their sizes disagree.
    """
    values, header = _files(path)
    for file in (header, values):
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
    lines = [line for line in header.read_text(encoding="utf-8", errors="replace").splitlines() if line[:1] != "#"]
    words = lines[0].split() if lines else []
    if not words or not all(word.isdigit() and int(word) > 0 for word in words):
        raise ValueError(f"{header}: expected the dimensions in a line after '# Dimensions', got {' '.join(words)!r}")
    shape = [int(word) for word in words]
    if values.stat().st_size != 8 * prod(shape):
        raise ValueError(
            f"{values}: has {values.stat().st_size} bytes, its header announces {8 * prod(shape)}; is it truncated?"
        )
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    return np.fromfile(values, dtype="<c8").reshape(shape, order="F")


def write_cfl(path: str | Path, array: np.ndarray) -> None:
    """Write an array.

    Args:
        path: see :func:`read_cfl`.
        array: real or complex, dimensions in BART's order.
    """
    values, header = _files(path)
    with whole_file(values) as partial:
        array.astype("<c8").ravel(order="F").tofile(partial)
    with whole_file(header) as partial:
        partial.write_text(f"# Dimensions\n{' '.join(map(str, array.shape))}\n", encoding="utf-8")


def _files(path: str | Path) -> tuple[Path, Path]:
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".cfl", ".hdr") else path
    return stem.with_name(f"{stem.name}.cfl"), stem.with_name(f"{stem.name}.hdr")
