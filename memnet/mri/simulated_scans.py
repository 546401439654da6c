"""Simulates multi-coil k-space from magnitude images, where no raw data exist."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memnet.mri.coils import simulated_maps
from memnet.mri.fourier import image_to_kspace

__all__ = ["simulate_movie", "simulate_volume", "smooth_phase"]


def simulate_volume(magnitude: torch.Tensor, n_coils: int = 8, noise: float = 0.01, seed: int = 0) -> torch.Tensor:
    """Simulate a fully sampled 3D scan: smooth phase, coil maps, complex Gaussian noise.

    Simulated data lack what makes real ones hard: motion, off-resonance, relaxation along the echo train, and the phase and
    noise that the magnitude's own reconstruction has thrown away.

    Args:
        magnitude: ``(x, y, z)``, at least 0, of any scale.
        n_coils: coils.
        noise: standard deviation of the noise in each coil's image (real and imaginary part alike), relative to the 99th
            percentile of the magnitude where that is not 0.
        seed: of coils, phase and noise.

    Returns:
        Complex64 ``(n_coils, x, y, z)``, the image along x and k-space along y and z.

    Raises:
        ValueError: the magnitude is empty.
    """
    generator = torch.Generator().manual_seed(seed)
    return _encode(_complex_image(magnitude, generator), magnitude.shape, n_coils, noise, generator)


def simulate_movie(magnitude: torch.Tensor, n_coils: int = 8, noise: float = 0.01, seed: int = 0) -> torch.Tensor:
    """Simulate a fully sampled 2D cine scan, as :func:`simulate_volume`; coil maps do not move.

    Args:
        magnitude: ``(frames, x, y)``.
        n_coils: see :func:`simulate_volume`.
        noise: see :func:`simulate_volume`.
        seed: see :func:`simulate_volume`.

    Returns:
        Complex64 ``(n_coils, frames, x, y)``, k-space along x and y.

    Raises:
        ValueError: the magnitude is empty.
    """
    generator = torch.Generator().manual_seed(seed)
    return _encode(_complex_image(magnitude, generator), (1, *magnitude.shape[1:]), n_coils, noise, generator)


def smooth_phase(shape: Sequence[int], strength: float = 1.0, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw a smooth phase: cosines of up to three half periods along each dimension.

    Args:
        shape: of the image, three dimensions.
        strength: standard deviation, rad.
        generator: where the randomness comes from.

    Returns:
        Radians, of that shape.
    """
    order = 4
    weights = torch.randn(order, order, order, generator=generator)
    falloff = torch.arange(order)
    weights /= 1 + falloff[:, None, None] ** 2 + falloff[:, None] ** 2 + falloff**2
    cosines = [torch.cos(torch.pi * falloff * ((torch.arange(n) + 0.5) / n)[:, None]) for n in shape]
    phase = torch.einsum("abc,xa,yb,zc->xyz", weights, *cosines)
    return phase * strength / phase.std().clamp_min(1e-6)


def _complex_image(magnitude: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    there = magnitude[magnitude > 0].float()
    if not len(there):
        raise ValueError(f"the image of shape {tuple(magnitude.shape)} is nowhere above 0; it cannot be scanned")
    bright = there.kthvalue(max(1, round(0.99 * len(there)))).values
    return torch.polar(magnitude.float().clamp_min(0) / bright, smooth_phase(magnitude.shape, generator=generator))


def _encode(
    image: torch.Tensor, maps: Sequence[int], n_coils: int, noise: float, generator: torch.Generator
) -> torch.Tensor:
    csm = simulated_maps(maps, n_coils, generator)
    # a coil at a time, since volumes are large
    kspace = torch.empty(n_coils, *image.shape, dtype=torch.complex64)
    for coil in range(n_coils):
        kspace[coil] = image_to_kspace(image * csm[coil], (-2, -1))
        kspace[coil] += noise * torch.view_as_complex(torch.randn(*image.shape, 2, generator=generator))
    return kspace
