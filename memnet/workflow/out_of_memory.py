"""Says what would fit where a device ran out of memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from memnet.accounting.fitting import largest_patch
from memnet.accounting.planner import Plan, TrainingStep
from memnet.workflow.inferers import supports_bfloat16

__all__ = ["is_out_of_memory", "what_fits"]

# what a RuntimeError says of a host, of pinned memory and of CUDA's libraries
_WORDS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUFFT_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)
# what these libraries say of other faults, too, so that it counts where a GPU is nearly full
_AMBIGUOUS = ("unable to find an engine to execute this computation", "CUFFT_INTERNAL_ERROR")
_NEARLY_FULL = 0.1  # less than this share of a GPU's memory is free
# of the device's memory; the rest is for its context, the libraries' workspaces and gaps
_SHARE = 0.85
# the numbers of a config that its memory grows with, and how a person makes each smaller
_SIZES = ("roi_size", "slab_size", "patch_size", "batch_size", "sw_batch_size", "patches_per_volume")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is a device's or the machine's memory running out."""
    if not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _WORDS):
        return True
    return any(words in str(error) for words in _AMBIGUOUS) and _is_nearly_full()


def _is_nearly_full() -> bool:
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        free, total = torch.cuda.mem_get_info()  # of the device that is used: a look at another would take memory there
    except RuntimeError:
        return False
    # of what the allocator keeps for itself only a part could be given out, in pieces that may be too small
    return free < _NEARLY_FULL * total


def what_fits(config: Mapping[str, Any], budget: int | None = None) -> str:
    """Name the memory strategy, or else the patch, with which a training would fit, by a dry run of its step.

    Args:
        config: the run's config, overrides applied.
        budget: bytes of the device; those that it has by default.

    Returns:
        A sentence. Where the config is not of a training, or a dry run cannot tell, it names what to make smaller.
    """
    is_training = "training" in config and "evaluating" not in config
    if is_training:
        device = _device(config.get("device"))
        budget = _bytes_of(device) if budget is None else budget
        try:
            step = TrainingStep(config, device="cuda" if device.type == "cuda" else "cpu")
            halves = config.get("amp") and (device.type == "cpu" or supports_bfloat16(device))  # as bfloat16_autocast
            return _of_training(step, int(_SHARE * budget), "bfloat16" if halves else "float32")
        except Exception:  # whatever a dry run stumbles on, the person is told the rest
            pass
    sizes = [f"--{name} (now {config[name]})" for name in _SIZES if config.get(name)]
    told = f"make {' or '.join(sizes) or 'the input'} smaller"
    if is_training and config.get("memory"):
        told += (
            f", give another --memory (now {config['memory']}; store keeps most, then checkpoint, recursive, invert)"
        )
    return told if config.get("device") == "cpu" else f"{told}, or give --device cpu"


def _of_training(step: TrainingStep, budget: int, precision: str) -> str:
    as_it_is = step.plan(None, precision)
    told = f"by a dry run this step takes {_gib(as_it_is)}"
    if as_it_is.total <= budget:
        return f"{told}, which the device has; something else is using it"
    plans = []
    for memory in step.strategies:
        plans.append(step.plan(memory, precision))
        if memory is not None and plans[-1].total <= budget:
            return f"{told}; it fits with {step.overrides(plans[-1])} ({_gib(plans[-1])})"
    least = min(plans, key=lambda plan: plan.total)
    largest = largest_patch(step, budget, least.memory, precision)
    if largest is None:
        return f"{told}, {_gib(least)} with {step.overrides(least)}; no patch fits this device"
    return f"{told}; it fits with {step.overrides(largest)} ({_gib(largest)})"


def _device(named: Any) -> torch.device:
    name = named if isinstance(named, str) and not named.startswith("$") else None
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _bytes_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gib(plan: Plan) -> str:
    return f"{plan.total / 2**30:.3g} GiB"
