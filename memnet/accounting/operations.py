"""Floating-point operations of matrix products and convolutions: the one count behind every claim about computation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["count_flops", "flops_of"]


def flops_of(function: Any, arguments: Sequence[Any], options: Mapping[str, Any], outputs: Any) -> int:
    """Return what a call of an operation computes by the formulas of torch's FlopCounterMode, 0 for what these leave out.

    Args:
        function: the overload, such as ``torch.ops.aten.mm.default``.
        arguments: its positional arguments.
        options: its keyword arguments.
        outputs: what it returned.
    """
    count = flop_registry.get(function._overloadpacket)
    return 0 if count is None else count(*arguments, **options, out_val=outputs)


def count_flops(run: Callable[[], object]) -> int:
    """Count the floating-point operations of a run, those of backward passes included."""
    with _Counter() as counter:
        run()
    return counter.total


class _Counter(TorchDispatchMode):
    """Adds up; the hooks on modules of torch's own FlopCounterMode fail where a backward pass runs another."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        self.total += flops_of(function, args, kwargs or {}, outputs)
        return outputs
