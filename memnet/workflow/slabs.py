"""Reconstructs a volume slab by slab along the direction that is not Fourier encoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import Inferer
from tqdm import trange

from memnet.metadata import plain_tensor
from memnet.workflow.inferers import bfloat16_autocast

__all__ = ["SlabInferer"]


class SlabInferer(Inferer):
    """Apply a network to slabs of consecutive slices, and blend them where they overlap.

    Args:
        slab_size: slices of a slab; all at once if ``None``.
        overlap: slices that two neighbouring slabs share at least; within them the weight goes over from one to the other.
        amp: autocast the network to bfloat16; ``None`` decides by :func:`memnet.workflow.inferers.supports_bfloat16`. The physics
            stays in float32.
        progress: show a progress bar where there are several slabs.

    Raises:
        ValueError: the overlap is negative or leaves a slab nothing of its own.
    """

    def __init__(
        self, slab_size: int | None = None, overlap: int = 8, amp: bool | None = False, progress: bool = False
    ) -> None:
        super().__init__()
        if overlap < 0 or (slab_size is not None and slab_size <= overlap):
            raise ValueError(f"expected an overlap from 0 to less than slab_size {slab_size}, got {overlap}")
        self.slab_size, self.overlap, self.amp, self.progress = slab_size, overlap, amp, progress

    def __call__(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what the network makes of ``(B, C, slices, y, z)``, ``(B, C', slices, y, z)``."""
        # MetaTensors of a batch cannot be cut
        inputs = plain_tensor(inputs)
        with bfloat16_autocast(inputs.device, self.amp):
            return self._blend(inputs, lambda slab: network(slab, *args, **kwargs))

    def _blend(self, inputs: torch.Tensor, network: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        n_slices, size = inputs.shape[2], self.slab_size
        if size is None or n_slices <= size:
            return network(inputs)
        n_slabs = -(-(n_slices - self.overlap) // (size - self.overlap))
        place = torch.arange(size, device=inputs.device)
        ramp = torch.minimum(place, place.flip(0)).clamp_max(self.overlap) + 1.0
        result = inputs  # until the first slab says what comes out
        total = inputs.real.new_zeros(n_slices, 1, 1)
        for i in trange(n_slabs, disable=not self.progress, desc="slabs", leave=False, ncols=100):
            start = round(i * (n_slices - size) / (n_slabs - 1))
            slab = network(inputs[:, :, start : start + size])
            if i == 0:
                result = slab.new_zeros(*slab.shape[:2], n_slices, *slab.shape[3:])
            result[:, :, start : start + size] += slab * ramp[:, None, None]
            total[start : start + size] += ramp[:, None, None]
        return result / total
