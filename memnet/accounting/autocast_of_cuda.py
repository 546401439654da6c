"""The precisions of a GPU's autocast, for steps that are simulated on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

__all__ = ["AutocastOfCuda"]

# what CUDA's autocast computes in float32, and a CPU's in the precision that it is given
_IN_FLOAT32 = frozenset(
    "__pow__ __rdiv__ __rpow__ __rtruediv__ acos asin cosh cosine_similarity cumprod cumsum dist erfinv exp expm1 group_norm "
    "interpolate l1_loss layer_norm log log10 log1p log2 log_softmax norm normalize pdist pow reciprocal renorm rsqrt sinh "
    "smooth_l1_loss softmax softmin softplus square sum tan".split()
)
# what a CPU's autocast computes in float32, and CUDA's in the precision that it is given
_AS_GIVEN = frozenset("adaptive_avg_pool3d adaptive_max_pool3d avg_pool3d max_pool3d pad".split())
_HALVES = (torch.float16, torch.bfloat16)


class AutocastOfCuda(TorchFunctionMode):
    """Under a CPU's autocast, give each function of PyTorch the precision that it would have under CUDA's.

    Checkpointed and inverted blocks run again under it, see :class:`memnet.recompute.Replay`.

    References:
        https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function."""
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if not torch.is_autocast_enabled("cpu") or name not in _IN_FLOAT32 | _AS_GIVEN:
            return func(*args, **kwargs)
        if name in _IN_FLOAT32:
            args, kwargs = tree_map_only(torch.Tensor, _as_float32, (tuple(args), kwargs))
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs)


def _as_float32(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in _HALVES else x
