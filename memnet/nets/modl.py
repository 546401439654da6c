"""MoDL: unrolled reconstruction that alternates a learned regulariser and data consistency, with memory-efficient learning."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from monai.networks.layers.factories import Conv
from torch import nn

from memnet.chain import Chain, Memory
from memnet.invertible import DriftError, Invertible, Recorded
from memnet.mri.operators import SenseOperator
from memnet.mri.solvers import ConjugateGradientGradient, conjugate_gradient
from memnet.nets.contraction import contract, refresh
from memnet.recompute import Gradients, replay_with_grad
from memnet.tiles import run_in_tiles

__all__ = ["DataConsistency", "MoDL", "Regularization", "ResidualCNN"]


class ResidualCNN(nn.Sequential):
    """Convolutions 3^d with ReLU between them: the residual branch of MoDL's denoiser.

    Args:
        spatial_dims: 1, 2 or 3.
        channels: filters of the inner layers.
        n_layers: convolutions, at least 2.

    Attributes:
        halo: how far an output voxel sees, voxels.
    """

    def __init__(self, spatial_dims: int = 3, channels: int = 64, n_layers: int = 5) -> None:
        widths = [2, *[channels] * (n_layers - 1), 2]
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [Conv[Conv.CONV, spatial_dims](a, b, 3, padding=1, padding_mode="replicate"), nn.ReLU()]
        super().__init__(*layers[:-1])
        self.halo = n_layers


class _Step(Invertible):
    """A step of an unroll, inverted approximately.

    How well is measured twice: by the recomputation that the gradient needs, and, since the inverses of later steps amplify
    errors without a trace in it, on some voxels of the input that are kept.
    """

    name: str
    drift_tolerance: float
    exact = False

    def record(self, *state: torch.Tensor) -> Recorded:
        """See :meth:`memnet.Invertible.record`."""
        return super().record(*state)._replace(kept=(_some_voxels(state[0]),))

    def pull_back(
        self, recorded: Recorded, gradients: Sequence[torch.Tensor | None]
    ) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor | None], Gradients]:
        """See :meth:`memnet.Invertible.pull_back`.

        Raises:
            memnet.DriftError: if the recomputed output, or the input that is given back, is off by more than the tolerance.
        """
        inputs = self.restore(recorded)
        outputs, pull = replay_with_grad([recorded.replays], inputs)
        drifts = {
            "its output": _drift(outputs[0], recorded.state[0]),
            "its input, with what the inverses after it missed,": _drift(_some_voxels(inputs[0]), recorded.kept[0]),
        }
        for what, drift in drifts.items():
            if not drift <= self.drift_tolerance:
                raise DriftError(
                    f"the inverse of {self.name} gives back {what} to {drift:.1e} of its norm only (tolerance "
                    f'{self.drift_tolerance:.0e}), so that the gradients would be wrong: use memory="checkpoint", which is '
                    'exact, keep more images (every=1), bound the regulariser (contraction=0.9), or on_drift="rerun".'
                )
        return inputs, *pull(gradients)


class Regularization(_Step):
    r"""Learned regulariser :math:`z = x + R(x)`, inverted by iterating :math:`x \leftarrow z - R(x)`.

    Args:
        residual: :math:`R`, a module from ``(B, 2, *dims)`` (real and imaginary part) to the same shape.
        tile: extents of the tiles in which :math:`R` is computed and differentiated, along the last dimensions, 0 for all;
            the module's attribute ``halo`` says how far it sees. None for no tiles.
        inverse_iterations: fixed-point iterations, T; they converge where R is a contraction.
        drift_tolerance: largest accepted error of the recomputed output, relative to its norm.
        contraction: bound the Lipschitz constant of :math:`R`, in place, to below 1 so that the iterations converge, see
            :func:`memnet.nets.contraction.contract`; None leaves it free.

    Attributes:
        turned: apply :math:`R` to the image and to the image with its phase turned by 90, 180 and 270 degrees, turn the results
            back, and average them.

    Raises:
        ValueError: there are tiles, but the module has no ``halo``; or the module's constant cannot be bounded.
    """

    name = "regularization"
    turned = False

    def __init__(
        self,
        residual: nn.Module,
        tile: Sequence[int] | None = None,
        inverse_iterations: int = 5,
        drift_tolerance: float = 1e-3,
        contraction: float | None = None,
    ) -> None:
        super().__init__()
        if tile is not None and not hasattr(residual, "halo"):
            raise ValueError(f"{type(residual).__name__} has no attribute halo, which tiles need; give tile=None")
        self.residual = residual if contraction is None else contract(residual, contraction)
        self.tile = tile
        self.halo: int = getattr(residual, "halo", 0)
        self.inverse_iterations = inverse_iterations
        self.drift_tolerance = drift_tolerance

    @property
    def recomputes(self) -> bool:
        """Whether the step keeps its input alone by itself, and needs no chain for that."""
        return self.tile is not None

    def plain(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Map ``[x, *rest]`` to ``[z, *rest]``, ``x`` complex ``(B, *dims)``."""
        x = state[0]
        if not self.turned:
            return [x + self._increment(x), *state[1:]]
        z = x
        for phase in (1, 1j, -1, -1j):
            z = z + self._increment(phase * x) / (4 * phase)
        return [z, *state[1:]]

    def _increment(self, x: torch.Tensor) -> torch.Tensor:
        channels = torch.view_as_real(x).movedim(-1, 1)
        if self.tile is None:
            residual = self.residual(channels)
        else:
            residual = run_in_tiles(self.residual, channels, self.halo, self.tile)
        # Physics stays in float32 whatever the precision of the network.
        return torch.view_as_complex(residual.to(x.real.dtype).movedim(1, -1).contiguous())

    def inverse(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map ``(z, *rest)`` back to ``(x, *rest)``, approximately."""
        return self._iterate(lambda *x: self.plain(list(x)), *state)

    def restore(self, recorded: Recorded) -> tuple[torch.Tensor, ...]:
        """See :meth:`memnet.Invertible.restore`."""
        return self._iterate(recorded.replays.again, *recorded.state)

    @torch.no_grad()
    def _iterate(self, forward: Callable, z: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = z
        for _ in range(self.inverse_iterations):
            x = x + (z - forward(x, *rest)[0])
        return x, *rest


class DataConsistency(nn.Module):
    r"""Data consistency :math:`x = (A^H A + \mu I)^{-1} (A^H y + \mu z)` by conjugate gradients.

    Its inverse is :math:`z = x + (A^H A x - A^H y) / \mu`, exact where the conjugate gradients have converged; it multiplies
    errors by up to :math:`(1 + \mu) / \mu`.

    Args:
        mu: the first value of :math:`\mu`, above 0.
        learn_mu: learn its logarithm.
        max_iterations: see :func:`memnet.conjugate_gradient`.
        tolerance: see :func:`memnet.conjugate_gradient`.
        gradient: see :func:`memnet.conjugate_gradient`.
        fft_dims: how many of the last dimensions are Fourier encoded.
        drift_tolerance: largest accepted error of the recomputed output, relative to its norm.

    Raises:
        ValueError: ``mu`` is not above 0.
    """

    def __init__(
        self,
        mu: float = 0.05,
        learn_mu: bool = True,
        max_iterations: int = 10,
        tolerance: float = 0.0,
        gradient: ConjugateGradientGradient = "unrolled",
        fft_dims: int = 2,
        drift_tolerance: float = 1e-3,
    ) -> None:
        super().__init__()
        if mu <= 0:
            raise ValueError(f"mu must be above 0, got {mu}")
        self.log_mu = nn.Parameter(torch.tensor(math.log(mu)), requires_grad=learn_mu)
        self.max_iterations, self.tolerance, self.gradient = max_iterations, tolerance, gradient
        self.fft_dims = fft_dims
        self.drift_tolerance = drift_tolerance

    def forward(self, z: torch.Tensor, adjoint: torch.Tensor, operator: SenseOperator) -> torch.Tensor:
        """Solve for the image.

        Args:
            z: regularised image, complex ``(B, *dims)``.
            adjoint: :math:`A^H y`, of the same shape.
            operator: :math:`A`.

        Returns:
            :math:`x`, of the same shape.
        """
        mu = self.log_mu.exp()
        right = adjoint + mu * z
        return conjugate_gradient(operator.normal, right, mu, self.max_iterations, self.tolerance, self.gradient)

    @torch.no_grad()
    def inverse(self, x: torch.Tensor, adjoint: torch.Tensor, operator: SenseOperator) -> torch.Tensor:
        """Return :math:`z` of :math:`x`; arguments as in :meth:`forward`."""
        return x + (operator.normal(x) - adjoint) / self.log_mu.exp()


class _Consistency(_Step):
    """Data consistency with the data of one call, as a chain's block."""

    name = "data consistency"

    def __init__(self, step: DataConsistency, operator: SenseOperator) -> None:
        super().__init__()
        self.step, self.operator, self.drift_tolerance = step, operator, step.drift_tolerance

    def plain(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        z, adjoint = state
        return [self.step(z, adjoint, self.operator), adjoint]

    def inverse(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, adjoint = state
        return self.step.inverse(x, adjoint, self.operator), adjoint


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
        """Give each regulariser the weights of the one that a ``state_dict`` has; one with several stays as it is."""
        first, others = "regularizers.0.", range(1, len(self.regularizers))
        if any(name.startswith("regularizers.1.") for name in weights):
            return dict(weights)
        copies = {
            name.replace(first, f"regularizers.{i}.", 1): weight
            for i in others
            for name, weight in weights.items()
            if name.startswith(first)
        }
        return {**weights, **copies}

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
        consistency = _Consistency(self.data_consistency, operator)
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


def _some_voxels(x: torch.Tensor) -> torch.Tensor:
    """Copy about a thousand values, evenly spread."""
    return x.detach().flatten()[:: max(1, x.numel() // 1024)].clone()


def _drift(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.real.dtype).tiny))


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
