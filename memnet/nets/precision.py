"""Where autocast must not be trusted."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["sound_autocast"]


def sound_autocast(x: torch.Tensor, planes: int) -> AbstractContextManager[Any]:
    """Return a context that leaves bfloat16 where a CPU's convolutions have wrong gradients: in 3D, over two planes.

    PyTorch 2.13 (oneDNN 3.12) then takes the weights' gradient of a convolution of width 3 that pads with zeros from memory that
    nobody wrote. Such inputs are small, and float32 costs them little.

    Args:
        x: input of a network, ``(B, C, D, H, W)``.
        planes: first extent of the smallest tensor that a convolution sees.
    """
    wrong = x.device.type == "cpu" and x.dim() == 5 and planes == 2
    if wrong and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu"):
        return torch.autocast("cpu", enabled=False)
    return nullcontext()
