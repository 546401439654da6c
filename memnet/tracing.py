"""Whether somebody looks on who knows plain operations alone."""

import torch

__all__ = ["is_traced"]


def is_traced() -> bool:
    """Tell whether a tracer, an exporter or a transform of ``torch.func`` looks on: no custom Functions, plain modules only."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()
