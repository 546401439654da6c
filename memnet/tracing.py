"""Whether somebody looks on who knows plain operations alone."""

import torch
from torch.autograd import forward_ad

__all__ = ["is_differentiated_forwards", "is_traced"]


def is_traced() -> bool:
    """Tell whether a tracer, an exporter, forward-mode differentiation or a transform of ``torch.func`` looks on.

    To these a network is plain modules, without Functions of its own.
    """
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_exporting()
        or torch._C._are_functorch_transforms_active()
        or is_differentiated_forwards()
    )


def is_differentiated_forwards() -> bool:
    """Tell whether tensors may carry tangents, see :class:`torch.autograd.forward_ad.dual_level`."""
    return forward_ad._current_level >= 0
