"""Bounds the norm of the gradient in a training by MONAI's engines."""

from __future__ import annotations

import torch
from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from torch import nn

__all__ = ["GradientClipping"]


class GradientClipping:
    """Handler that scales the gradient down where its norm passes a bound, after each backward pass.

    For trainers without a ``GradScaler``, as the bundles' own, which autocast to bfloat16 in the inferer.

    Args:
        network: the network whose parameters' gradients make one vector.
        max_norm: largest Euclidean norm, above 0; no bound where None.

    Raises:
        ValueError: ``max_norm`` is not above 0; on attaching, if the trainer scales gradients.

    References:
        On the difficulty of training recurrent neural networks (Pascanu et al., 2013), https://arxiv.org/abs/1211.5063
    """

    def __init__(self, network: nn.Module, max_norm: float | None = 1.0) -> None:
        self.network, self.max_norm = network, float("inf") if max_norm is None else max_norm
        if not self.max_norm > 0:
            raise ValueError(f"max_norm must be above 0, got {max_norm}")

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if getattr(engine, "scaler", None) is not None:
            raise ValueError("GradientClipping: the trainer scales gradients (amp=True), whose norm says nothing")
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Clip."""
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)
