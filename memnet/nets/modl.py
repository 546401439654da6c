"""MoDL: unrolled reconstruction that alternates a learned regulariser and data consistency, with memory-efficient learning."""

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import nn

from memnet.chain import Chain, Memory
from memnet.mri.operators import SenseOperator
from memnet.nets.contraction import refresh
from memnet.nets.modl_steps import ConsistencyStep, DataConsistency, Regularization, ResidualCNN

__all__ = ["MoDL"]


class MoDL(nn.Module):
    r"""Model-based deep learning: :math:`z = x + R(x)` and :math:`x = (A^H A + \mu I)^{-1} (A^H y + \mu z)`, N times.

    What backpropagation keeps is the choice of ``memory``; outputs are the same under every strategy, and gradients, too,
    but for ``invert``:

    - ``store`` keeps everything.
    - ``checkpoint`` keeps the image before each step (8 bytes a voxel), and one step is alive at a time.
    - ``recursive`` keeps the first image alone, for O(log N) times the computation.
    - ``invert`` is memory-efficient learning as published: the last image is kept, the regulariser is inverted by a fixed
      point and data consistency in closed form. Neither is exact. The drift is measured in the recomputation that the
      gradient needs anyway, and past the steps' ``drift_tolerance`` it is an error, or the unrolls are run again.

    Args:
        spatial_dims: dimensions of the regulariser's convolutions: 2, or 3 for volumes and for movies (frames first).
        n_unrolls: N.
        channels: filters of the regulariser.
        shared: one regulariser for all unrolls, or one each.
        regularizer: a :class:`Regularization`, or any module from ``(B, 2, *dims)`` to a residual of that shape, in place of
            :class:`ResidualCNN`; copied where it is not shared.
        data_consistency: in place of the default :class:`DataConsistency`, shared by all unrolls.
        memory: the strategy; the attribute may be set at any time.
        tile: tiles of the default regulariser, see :class:`Regularization`.
        contraction: of the default regulariser, see :class:`Regularization`; training follows its weights, a power iteration a
            step.
        every: under ``invert``, unrolls from one image that is kept to the next; all unrolls where None.
        on_drift: ``"raise"`` or ``"rerun"``, see :class:`memnet.Chain`.
        host: hold the images that backpropagation keeps in host memory.
        n_turned: in evaluation, in how many unrolls, the last ones, the regulariser is averaged over four phases of the image:
            the phase of an MR image as a whole is arbitrary, which a network of real and imaginary part does not know. In each
            the regulariser then runs four times.

    Raises:
        ValueError: ``n_unrolls`` or ``every`` is less than 1, ``n_turned`` is not between 0 and ``n_unrolls``, or a contraction
            is asked of a regulariser that is given.

    References:
        MoDL: model-based deep learning architecture for inverse problems (Aggarwal et al., 2019),
        https://arxiv.org/abs/1712.02862
        Memory-efficient learning for large-scale computational imaging (Kellman et al., 2020),
        https://arxiv.org/abs/2003.05551
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        n_unrolls: int = 10,
        channels: int = 64,
        shared: bool = True,
        regularizer: nn.Module | None = None,
        data_consistency: DataConsistency | None = None,
        memory: Memory = "checkpoint",
        tile: Sequence[int] | None = (64,),
        contraction: float | None = None,
        every: int | None = None,
        on_drift: Literal["raise", "rerun"] = "raise",
        host: bool = False,
        n_turned: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= n_turned <= n_unrolls:
            raise ValueError(f"n_turned must be between 0 and the {n_unrolls} unrolls, got {n_turned}")
        for name, value in {"n_unrolls": n_unrolls, "every": every}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if contraction is not None and regularizer is not None:
            raise ValueError("contraction is of the default regulariser; give Regularization(..., contraction=...)")
        n_regularizers = 1 if shared else n_unrolls
        if regularizer is None:
            steps = [
                Regularization(ResidualCNN(spatial_dims, channels), tile, contraction=contraction)
                for _ in range(n_regularizers)
            ]
        else:
            step = regularizer if isinstance(regularizer, Regularization) else Regularization(regularizer)
            steps = [step, *(copy.deepcopy(step) for _ in range(n_regularizers - 1))]
        self.regularizers = nn.ModuleList(steps)
        self.data_consistency = DataConsistency() if data_consistency is None else data_consistency
        self.spatial_dims = spatial_dims
        self.n_unrolls, self.every, self.on_drift, self.host = n_unrolls, every, on_drift, host
        self.n_turned = n_turned
        self.memory = memory

    @property
    def memory(self) -> Memory:
        """The memory strategy."""
        return self._memory

    @memory.setter
    def memory(self, memory: Memory) -> None:
        if memory not in get_args(Memory):
            raise ValueError(f"memory must be one of {', '.join(get_args(Memory))}, got {memory!r}")
        self._memory = memory

    def spread_weights(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give each regulariser the weights of one that a ``state_dict`` has: of its own place, or the nearest.

        The first and the last go to the first and the last; one serves all. For networks that are trained on: those of another
        number of unrolls are not what they were trained to be.
        """
        pattern = re.compile(r"regularizers\.(\d+)\.(.*)")
        there: dict[int, dict[str, torch.Tensor]] = {}
        for name, weight in weights.items():
            if match := pattern.fullmatch(name):
                there.setdefault(int(match[1]), {})[match[2]] = weight
        if not there:
            return dict(weights)
        spread = {name: weight for name, weight in weights.items() if not pattern.fullmatch(name)}
        last, n = max(there), len(self.regularizers)
        for i in range(n):
            nearest = min(there, key=lambda place: abs(place - (i * last / (n - 1) if n > 1 else 0)))
            spread |= {f"regularizers.{i}.{name}": weight for name, weight in there[nearest].items()}
        return spread

    def forward(self, kspace: torch.Tensor, csm: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Reconstruct.

        Args:
            kspace: complex ``(B, coils, *dims)``, zero where nothing was sampled; scaled so that the image is of order 1.
            csm: coil maps, see :class:`memnet.SenseOperator`.
            mask: which samples were taken, see :class:`memnet.SenseOperator`.

        Returns:
            The image, complex ``(B, *dims)``; 0 where all coil maps are.

        Raises:
            ValueError: shapes or types do not fit.
            memnet.DriftError: in the backward pass, see ``memory``.
        """
        if self.training:
            refresh(self.regularizers)
        operator = SenseOperator(csm, mask, self.data_consistency.fft_dims)
        adjoint = operator.adjoint(kspace)
        # The coil maps are constants of the call, not of the chain's state: they have no gradient to carry along.
        consistency = ConsistencyStep(self.data_consistency, operator)
        steps = [s for i in range(self.n_unrolls) for s in (self._regularizer(i), consistency)]
        length = 2 * (self.every or self.n_unrolls) if self.memory == "invert" else len(steps)
        state: Any = (adjoint, adjoint)
        with _images_on_host(adjoint) if self.host else nullcontext():
            for i in range(0, len(steps), length):
                state = Chain(steps[i : i + length], self.memory, segment=1, on_drift=self.on_drift)(*state)
        # What no coil sees, data consistency leaves as the regulariser made it.
        return state[0] * csm.ne(0).any(1)

    def _regularizer(self, unroll: int) -> nn.Module:
        step: Any = self.regularizers[unroll % len(self.regularizers)]
        if not self.training and unroll >= self.n_unrolls - self.n_turned:
            step = copy.copy(step)  # with the same parameters
            step.turned = True
        return step


def _images_on_host(adjoint: torch.Tensor) -> AbstractContextManager[Any]:
    """Hold what autograd keeps in pinned host memory, but for the first image, which lives on anyway."""

    def pack(x: torch.Tensor) -> Any:
        if x.dim() == 0 or x.data_ptr() == adjoint.data_ptr():
            return x.detach()
        if not x.is_cuda:  # past PyTorch's allocator, so that what a CPU run counts is what a GPU would hold
            bits = x.detach().resolve_conj()
            bits = bits.view(torch.int16) if x.dtype == torch.bfloat16 else bits  # which NumPy does not know
            return x.device, torch.from_numpy(bits.numpy().copy("K")).view(x.dtype)
        held = torch.empty_like(x, device="cpu", pin_memory=True)
        held.copy_(x)
        return x.device, held

    def unpack(kept: Any) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else kept[1].to(kept[0], non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
