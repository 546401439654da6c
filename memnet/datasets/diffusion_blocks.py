"""Cuts one diffusion series into separate blocks of space: ``python -m memnet diffusion-blocks``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from memnet.datasets.diffusion_files import read_series, write_series
from memnet.datasets.diffusion_split import SECTIONS
from memnet.diffusion.tensors import DiffusionSeries

__all__ = ["add_parser", "cut_blocks"]


def cut_blocks(
    data: str | Path,
    output_dir: str | Path,
    shares: Sequence[float] = (0.5, 0.2, 0.3),
    gap: int = 2,
    axis: int = 1,
) -> list[Path]:
    """Write training, validation and test blocks of one series, for want of several subjects.

    Args:
        data: see :func:`memnet.datasets.diffusion_files.read_series`.
        output_dir: gets ``training``, ``validation`` and ``test``, each with one series, its bvals, bvecs and mask.
        shares: of the length along the axis, in this order.
        gap: voxels left out between two blocks.
        axis: the axis of the grid that is cut.

    Returns:
        The three series.

    Raises:
        ValueError: the shares do not add up to 1, the gap is negative, or a block would have fewer than two voxels or no brain.
    """
    if gap < 0:
        raise ValueError(
            f"gap is {gap}, expected 0 voxels or more: blocks that overlap share what is trained on and tested with"
        )
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares are {list(shares)}, expected three positive numbers that add up to 1")
    series = read_series(data)
    length = series.mask.shape[axis]
    ends = np.round(np.cumsum([0, *shares]) * length).astype(int)
    blocks: dict[str, DiffusionSeries] = {}
    for number, section in enumerate(SECTIONS):
        begin, end = int(ends[number] + (gap if number else 0)), int(ends[number + 1])
        if end - begin < 2:
            raise ValueError(f"{data}: {length} voxels along axis {axis} leave {end - begin} for {section}")
        box = tuple(slice(begin, end) if a == axis else slice(None) for a in range(3))
        affine = series.affine.copy()
        affine[:3, 3] += begin * affine[:3, axis]
        if not series.mask[box].any():
            raise ValueError(f"{data}: voxels {begin} to {end - 1} along axis {axis}, for {section}, hold no brain")
        blocks[section] = replace(series, signals=series.signals[box], mask=series.mask[box], affine=affine)
    written = {Path(output_dir) / section / f"{section}.nii.gz": block for section, block in blocks.items()}
    for file, block in written.items():
        write_series(file, block)
    return list(written)


def add_parser(commands: Any) -> None:
    """Add the command ``diffusion-blocks`` to the command line."""
    parser = commands.add_parser("diffusion-blocks", help="cut a diffusion series into blocks to train and test on")
    parser.add_argument("data", help="4D NIfTI with its b-values and directions beside it")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--shares", type=float, nargs=3, default=[0.5, 0.2, 0.3], help="training, validation, test")
    parser.add_argument("--gap", type=int, default=2, help="voxels left out between blocks")
    parser.add_argument("--axis", type=int, choices=range(3), default=1)
    parser.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
    for path in cut_blocks(arguments.data, arguments.output_dir, arguments.shares, arguments.gap, arguments.axis):
        print(path)
