"""What a network must beat: SENSE by conjugate gradients, and compressed sensing by SigPy and BART where installed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from memnet.datasets.bart import read_cfl, write_cfl
from memnet.mri.fourier import image_to_kspace
from memnet.mri.operators import SenseOperator
from memnet.mri.solvers import conjugate_gradient

__all__ = ["METHODS", "Method", "bart_pics", "cg_sense", "sigpy_pics", "zero_filled"]

Solver = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
_WAVELET = "db4"
_WAVELET_SIDE = 28  # samples, of which the wavelet makes two levels
_LEAST_PLANES = 6
_LLR_BLOCK = 7  # voxels a side
_TIME = 10  # BART's dimension of time


class Method(NamedTuple):
    """One way to reconstruct.

    Attributes:
        solve: from k-space and coil maps complex ``(coils, slices or frames, y, z)``, mask bool or real of one coil, and the
            weight of the regularisation, to the image, complex ``(slices or frames, y, z)``. The last two dimensions are
            Fourier encoded; the image is of order 1.
        weight: where a search for the best one begins; 0 where there is nothing to choose.
        needs: module or program that must be installed; empty for none.
        takes_odd_sides: whether sides of k-space may be odd.
    """

    solve: Solver
    weight: float = 0.0
    needs: str = ""
    takes_odd_sides: bool = True

    @property
    def is_installed(self) -> bool:
        """Whether what it needs is there."""
        return not self.needs or bool(importlib.util.find_spec(self.needs) or shutil.which(self.needs))


def zero_filled(kspace: torch.Tensor, csm: torch.Tensor, mask: torch.Tensor, weight: float = 0.0) -> torch.Tensor:
    """Return :math:`A^H y`, see :attr:`Method.solve`."""
    return SenseOperator(csm[None], mask[None]).adjoint(kspace[None])[0]


def cg_sense(
    kspace: torch.Tensor, csm: torch.Tensor, mask: torch.Tensor, weight: float, max_iterations: int = 50
) -> torch.Tensor:
    r"""Minimise :math:`\lVert A x - y\rVert^2 + \lambda\lVert x\rVert^2`, see :attr:`Method.solve`."""
    operator = SenseOperator(csm[None], mask[None])
    # slices and frames do not know each other, but share the steps of the iteration, as in SigPy and BART
    return conjugate_gradient(operator.normal, operator.adjoint(kspace[None]), weight, max_iterations, 1e-6)[0]


def sigpy_pics(
    kspace: torch.Tensor,
    csm: torch.Tensor,
    mask: torch.Tensor,
    weight: float,
    penalty: str = "wavelet",
    axes: Sequence[int] = (0, 1, 2),
    max_iterations: int | None = None,
) -> torch.Tensor:
    r"""Minimise :math:`\frac12\lVert A x - y\rVert^2 + \lambda R(x)` by SigPy, see :attr:`Method.solve`.

    Args:
        kspace: see :attr:`Method.solve`.
        csm: likewise.
        mask: likewise.
        weight: :math:`\lambda`.
        penalty: R: ``wavelet`` (l1 of Daubechies wavelets, by FISTA), ``tv`` (l1 of finite differences, by primal-dual hybrid
            gradients) or ``l2`` (half the squared norm, by conjugate gradients).
        axes: those of the image that R sees; wavelets leave those out that are too short for two levels, since SigPy takes for
            all axes as many levels as the shortest allows, and of a thin slab none.
        max_iterations: iterations; 100, and 400 of the primal-dual method, which converges slowly, if ``None``.

    References:
        SigPy: a Python package for high performance iterative reconstruction (Ong and Lustig, 2019),
        https://github.com/mikgroup/sigpy
    """
    import sigpy  # an optional dependency

    shape, y = kspace.shape[1:], kspace.numpy()
    # the maps' squared magnitudes sum to at most 1, so that the encoding's norm does, too
    maps = sigpy.linop.Multiply(shape, np.ascontiguousarray(csm.expand_as(kspace).numpy()))
    fourier = sigpy.linop.FFT(maps.oshape, axes=(-2, -1))
    operator = sigpy.linop.Multiply(fourier.oshape, mask.to(torch.float32).expand(1, *shape).numpy()) * fourier * maps
    if max_iterations is None:
        max_iterations = 400 if penalty == "tv" else 100
    options: dict[str, object] = {"max_iter": max_iterations, "show_pbar": False}
    if penalty == "l2":
        options["lamda"] = weight
    elif penalty == "wavelet":
        long = tuple(axis for axis in axes if shape[axis] >= _WAVELET_SIDE)
        transform = sigpy.linop.Wavelet(shape, axes=long, wave_name=_WAVELET)
        options |= {"alpha": 1.0}
        options["proxg"] = sigpy.prox.UnitaryTransform(sigpy.prox.L1Reg(transform.oshape, weight), transform)
    else:
        differences = sigpy.linop.FiniteDifference(shape, axes=tuple(axes))
        options |= {"G": differences, "proxg": sigpy.prox.L1Reg(differences.oshape, weight)}
    return torch.from_numpy(np.asarray(sigpy.app.LinearLeastSquares(operator, y, **options).run()))


def bart_pics(
    kspace: torch.Tensor,
    csm: torch.Tensor,
    mask: torch.Tensor,
    weight: float,
    penalty: str = "W:7:0:{weight}",
    max_iterations: int = 100,
    movie: bool = False,
) -> torch.Tensor:
    """Reconstruct by ``bart pics``, see :attr:`Method.solve`.

    Args:
        kspace: see :attr:`Method.solve`.
        csm: likewise.
        mask: likewise.
        weight: of the regularisation.
        penalty: what follows ``-R``.
        max_iterations: iterations.
        movie: whether the first dimension is the frames, rather than slices, which BART gets as a third encoded dimension.

    Raises:
        ValueError: BART fails, with what it says, or a side of k-space is odd.

    References:
        BART toolbox for computational magnetic resonance imaging (Uecker et al.), https://mrirecon.github.io/bart
    """
    n_planes, *sides = kspace.shape[1:]
    if any(n % 2 for n in sides):
        raise ValueError(f"BART centres odd sides otherwise; expected even sides of k-space, got {sides}")
    taken = mask.to(kspace.dtype).expand(1, *kspace.shape[1:])
    movie = movie or n_planes == 1  # one slice has no third dimension to encode
    if movie:
        inputs = {"kspace": _as_movie(kspace), "maps": _as_movie(csm[:, :1]), "mask": _as_movie(taken)}
    else:
        # slices become an encoded dimension, too, whose number must be even, and not too small for BART's wavelets
        padding = (0, 0, 0, 0, 0, max(_LEAST_PLANES - n_planes, n_planes % 2))
        volumes = {
            "kspace": image_to_kspace(functional.pad(kspace, padding), (1,)),
            "maps": functional.pad(csm.expand_as(kspace), padding),
            "mask": functional.pad(taken, padding, value=1.0) * taken[:, :1],
        }
        inputs = {name: volume.movedim(0, -1).numpy() for name, volume in volumes.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, values in inputs.items():
            write_cfl(Path(folder) / name, values)
        command = ["bart", "pics", "-w", "1", "-i", str(max_iterations), "-b", str(_LLR_BLOCK), "-p", "mask"]
        command += ["-R", penalty.format(weight=weight), "kspace", "maps", "image"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{' '.join(command)} failed: {done.stderr or done.stdout}")
        found = torch.from_numpy(read_cfl(Path(folder) / "image"))
    image = found.reshape(*sides, n_planes).movedim(-1, 0) if movie else found[:n_planes]
    # BART's transform of a side that 4 does not divide is ours but for a constant phase
    product = (zero_filled(kspace, csm, mask.real).conj() * image).sum()
    return image * torch.polar(torch.ones(()), -product.angle())


def _as_movie(x: torch.Tensor) -> np.ndarray:
    """Turn ``(coils, frames, y, z)`` into ``(y, z, 1, coils, 1, 1, 1, 1, 1, 1, frames)``."""
    values = x.permute(2, 3, 0, 1).numpy()
    return values.reshape(*values.shape[:2], 1, values.shape[2], *[1] * (_TIME - 4), values.shape[3])


_SENSE = {
    "zero-filled": Method(zero_filled),
    "CG-SENSE": Method(cg_sense, 0.032),
}
METHODS: dict[str, dict[str, Method]] = {
    "volume": _SENSE
    | {
        "SigPy l1-wavelet": Method(sigpy_pics, 0.004, "sigpy"),
        "SigPy TV": Method(partial(sigpy_pics, penalty="tv"), 0.004, "sigpy"),
        "BART l1-wavelet": Method(bart_pics, 0.004, "bart", False),
        "BART TV": Method(partial(bart_pics, penalty="T:7:0:{weight}"), 0.004, "bart", False),
    },
    "movie": _SENSE
    | {
        "SigPy l1-wavelet": Method(sigpy_pics, 0.004, "sigpy"),
        "SigPy temporal TV": Method(partial(sigpy_pics, penalty="tv", axes=(0,)), 0.004, "sigpy"),
        "BART temporal TV": Method(
            partial(bart_pics, penalty=f"T:{2**_TIME}:0:{{weight}}", movie=True), 0.004, "bart", False
        ),
        "BART LLR": Method(partial(bart_pics, penalty="L:7:7:{weight}", movie=True), 0.004, "bart", False),
    },
}
