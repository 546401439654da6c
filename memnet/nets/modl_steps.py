"""The steps of an unroll, learned regularisation and data consistency, with their inverses and the drift of these."""

import math
from collections.abc import Callable, Sequence

import torch
from monai.networks.layers.factories import Conv
from torch import nn

from memnet.invertible import DriftError, Invertible, Recorded
from memnet.mri.operators import SenseOperator
from memnet.mri.solvers import ConjugateGradientGradient, conjugate_gradient
from memnet.nets.contraction import contract
from memnet.recompute import Gradients, replay_with_grad
from memnet.tiles import run_in_tiles
from memnet.witness import some_values

__all__ = ["ConsistencyStep", "DataConsistency", "Regularization", "ResidualCNN"]


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
        return super().record(*state)._replace(kept=(some_values(state[:1]),))

    def pull_back(
        self, recorded: Recorded, gradients: Sequence[torch.Tensor | None]
    ) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor | None], Gradients]:
        """See :meth:`memnet.Invertible.pull_back`.

        Raises:
            memnet.DriftError: if the recomputed output, or the input that is given back, is off by more than the tolerance.
        """
        inputs = self.restore(recorded)
        outputs, pull = replay_with_grad([recorded.replays], inputs)
        # beside an output that is far larger, as biases make it of next to nothing, an input is no scale
        least = some_values(outputs[:1]).norm()
        drifts = {
            "its output": _drift(outputs[0], recorded.state[0]),
            "its input, with what the inverses after it missed,": _drift(
                some_values(inputs[:1]), recorded.kept[0], least
            ),
        }
        for what, drift in drifts.items():
            if not bool(drift <= self.drift_tolerance):  # asked of the tensor, as a simulation without data can be
                raise DriftError(
                    f"the inverse of {self.name} gives back {what} to {float(drift):.1e} of its norm only (tolerance "
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


class ConsistencyStep(_Step):
    """Data consistency with the data of one call, as a chain's block."""

    name = "data consistency"

    def __init__(self, step: DataConsistency, operator: SenseOperator) -> None:
        super().__init__()
        self.step, self.operator, self.drift_tolerance = step, operator, step.drift_tolerance

    def plain(self, state: list[torch.Tensor]) -> list[torch.Tensor]:
        """Solve for the image; the adjoint goes along."""
        z, adjoint = state
        return [self.step(z, adjoint, self.operator), adjoint]

    def inverse(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Bring back the image before the step, in closed form."""
        x, adjoint = state
        return self.step.inverse(x, adjoint, self.operator), adjoint


def _drift(found: torch.Tensor, expected: torch.Tensor, least: torch.Tensor | None = None) -> torch.Tensor:
    scale = expected.norm().clamp_min(torch.finfo(expected.real.dtype).tiny)
    return (found - expected).norm() / (scale if least is None else torch.maximum(scale, least))
