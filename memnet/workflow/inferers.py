"""Inferers that run a network in the precision and memory layout that suit the machine."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.utils import ensure_tuple

__all__ = ["PrecisionInferer", "PrecisionSlidingWindowInferer", "bfloat16_autocast", "supports_bfloat16"]


def supports_bfloat16(device: torch.device | str) -> bool:
    """Tell whether bfloat16 is worth using: the hardware multiplies in it, rather than emulating it.

    Args:
        device: CPU or GPU.

    Returns:
        Whether it does.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class PrecisionInferer(SimpleInferer):
    """Run the network on the whole input, under bfloat16 autocast if asked, with any device.

    MONAI's engines know autocast for CUDA alone; bfloat16 needs no gradient scaling.

    Args:
        amp: autocast to bfloat16.
    """

    def __init__(self, amp: bool = False) -> None:
        super().__init__()
        self.amp = amp

    def __call__(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return ``network(inputs)``; inputs are ``(B, C, D, H, W)``."""
        with bfloat16_autocast(inputs.device, self.amp):
            return network(_channels_last(inputs), *args, **kwargs)


class PrecisionSlidingWindowInferer(SlidingWindowInferer):
    """MONAI's sliding window, in channels-last layout and in bfloat16 where the hardware has it.

    Args:
        amp: autocast to bfloat16; ``None`` decides by :func:`supports_bfloat16`.
        arguments: those of :class:`monai.inferers.SlidingWindowInferer`.

    Raises:
        ValueError: windows overlap by less than nothing or by all of themselves.
    """

    def __init__(self, *arguments: Any, amp: bool | None = None, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        if not all(0 <= overlap < 1 for overlap in ensure_tuple(self.overlap)):
            raise ValueError(f"overlap is {self.overlap!r}, expected at least 0 and less than 1")
        self.amp = amp

    def __call__(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the logits ``(B, classes, D, H, W)`` of inputs ``(B, C, D, H, W)``, in the inputs' dtype."""

        def window(x: torch.Tensor, *window_args: Any, **window_kwargs: Any) -> Any:
            return network(_channels_last(x), *window_args, **window_kwargs)

        with bfloat16_autocast(inputs.device, self.amp):
            return super().__call__(inputs, window, *args, **kwargs)


def bfloat16_autocast(device: torch.device, amp: bool | None) -> AbstractContextManager[Any]:
    """Autocast to bfloat16.

    Args:
        device: where the inputs lie.
        amp: whether to; ``None`` decides by :func:`supports_bfloat16`.

    Warns:
        UserWarning: a GPU before compute capability 8.0 is asked to, which would convolve by a kernel that unfolds its
            input, many times the memory and time of float32's; it computes in float32 instead.
    """
    supported = supports_bfloat16(device)
    if amp and device.type == "cuda" and not supported:
        warnings.warn(
            "this GPU has no bfloat16 convolutions (compute capability 8.0); it computes in float32", stacklevel=3
        )
        amp = False
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=supported if amp is None else amp)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    # convolutions on a CPU are three times faster in this layout, and tensor cores want it
    return x.contiguous(memory_format=torch.channels_last_3d) if x.dim() == 5 else x
