"""Finds what fits a budget: the largest patch, and the share of it that ``memory="auto"`` gets."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

from memnet.accounting.planner import Plan, TrainingStep

__all__ = ["fill_budget", "largest_patch"]

_MOST_HALVED = 64  # sides are multiples of, at most


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
        multiple: sides that are tried are multiples of it, or of 16, 32 or 64 where the network fails at others.
        shape: sizes of the patch, 0 for the sides to be found; all where empty.

    Returns:
        The plan of that patch, or None if not even a side of twice ``multiple`` fits.
    """
    shape = shape or (0,) * len(step.patch)
    n_free, fixed = list(shape).count(0), prod(n or 1 for n in shape)
    first = side = 8 * multiple
    least = multiple  # the largest that fits so far, or is too small for the network
    most: int | None = None  # the smallest that does not fit, or is too large for the network
    best: Plan | None = None
    last: Plan | None = None
    while side:
        try:
            with _quiet():
                plan = step.plan(memory, precision, [n or side for n in shape], batch)
        except RuntimeError:  # the network's own
            if last is None:
                raise
            if side > first and multiple < _MOST_HALVED:  # smaller ones go: it cannot be halved as often as they
                multiple *= 2
            elif side > first:
                most = side
            else:  # too small to be halved so often
                least, side = side, (side + (most or first)) // 2
            side = _between(side, least, most, multiple)
            continue
        voxels, slope = prod(plan.patch), plan.peak / prod(plan.patch)
        if last is not None and last.patch != plan.patch:
            slope = (plan.total - last.total) / (voxels - prod(last.patch))
        if plan.total <= budget:
            best, least = plan, side
        elif last is None:
            # Small patches may take a kernel that needs more than the one for larger ones: come from above.
            last, side = plan, 2 * side
            continue
        else:
            most = side
        fitting = voxels + (budget - plan.total) / slope if slope > 0 else 8 * voxels
        last, side = plan, int((max(fitting, 0) / fixed) ** (1 / n_free) + 1e-6)
        side = _between(side, least, most, multiple)
    return best


def _between(side: int, least: int, most: int | None, multiple: int) -> int:
    """Return the multiple nearest to a side, from below, that lies between two others; 0 where there is none."""
    smallest = (least // multiple + 1) * multiple
    side = max(side // multiple * multiple, smallest)
    if most is None:
        return side
    largest = (most - 1) // multiple * multiple
    return min(side, largest) if largest >= smallest else 0


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep PyTorch from logging what fails in a simulation, where sizes are tried that may."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
