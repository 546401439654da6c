"""Coil sensitivities: compression to fewer coils, maps from calibration data, and smooth maps to simulate with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["calibration_region", "compress_coils", "espirit_maps", "simulated_maps"]


def compress_coils(kspace: torch.Tensor, n_coils: int, source: torch.Tensor | None = None) -> torch.Tensor:
    """Combine coils into fewer virtual ones that keep the most energy, strongest first.

    Args:
        kspace: complex ``(coils, *dims)``.
        n_coils: virtual coils; as many as there are coils are turned, not reduced.
        source: k-space of the same coils whose energy is to be kept; this one's if ``None``.

    Returns:
        Complex ``(min(n_coils, coils), *dims)``.

    References:
        Array compression for MRI with large coil arrays (Buehrer et al., 2007), https://doi.org/10.1002/mrm.21237
    """
    samples = (kspace if source is None else source).flatten(1)
    _, vectors = torch.linalg.eigh(samples @ samples.mH)
    virtual = vectors.flip(1)[:, :n_coils].mH
    return (virtual @ kspace.flatten(1)).reshape(-1, *kspace.shape[1:])


def calibration_region(mask: torch.Tensor) -> tuple[int, int]:
    """Return the sides of the largest centred rectangle that is sampled without a gap.

    Args:
        mask: bool ``(y, z)``.

    Returns:
        Samples along y and z; ``(0, 0)`` where the very centre was not taken.
    """
    centre = [n // 2 for n in mask.shape]
    best = (0, 0)
    for half in range(1, max(mask.shape) // 2 + 1):
        start = [max(0, c - half) for c in centre]
        stop = [min(n, c + half) for c, n in zip(centre, mask.shape, strict=True)]
        if not bool(mask[start[0] : stop[0], start[1] : stop[1]].all()):
            break
        best = (stop[0] - start[0], stop[1] - start[1])
    # one of the two sides may reach further than the square
    for axis in (0, 1):
        for half in range(best[axis] // 2 + 1, mask.shape[axis] // 2 + 1):
            sides = [*best]
            sides[axis] = 2 * half
            start = [c - s // 2 for c, s in zip(centre, sides, strict=True)]
            if min(sides) < 1 or not bool(mask[start[0] : start[0] + sides[0], start[1] : start[1] + sides[1]].all()):
                break
            best = (sides[0], sides[1])
    return best


def espirit_maps(
    kspace: torch.Tensor,
    calibration: Sequence[int] = (24, 24),
    kernel: int = 6,
    threshold: float = 0.02,
    crop: float = 0.8,
    n_squarings: int = 5,
) -> torch.Tensor:
    r"""Estimate coil maps by ESPIRiT, slice after slice.

    The patches of the calibration region span a subspace; the coil maps at a pixel are the eigenvector of eigenvalue 1 of the
    projection on it, :math:`\sum_k g_k(x) g_k(x)^H` with :math:`g_k` the transforms of the subspace's kernels. Their squared
    magnitudes sum to 1; their phase makes the strongest virtual coil of the calibration data real.

    Args:
        kspace: complex ``(coils, slices, y, z)``; beside the calibration region it may be undersampled.
        calibration: sides of the centred region that was sampled without a gap, samples; no more than 24 are used.
        kernel: side of the patches, samples.
        threshold: least singular value of a kernel that is kept, relative to the largest.
        crop: least eigenvalue of a pixel that shows something; elsewhere maps are zero.
        n_squarings: the eigenvector is that to which the projection's power ``2**n_squarings`` takes the principal coil.

    Returns:
        Complex ``(coils, slices, y, z)``.

    Raises:
        ValueError: the calibration region is no larger than the kernel.

    References:
        ESPIRiT, an eigenvalue approach to autocalibrating parallel MRI (Uecker et al., 2014),
        https://doi.org/10.1002/mrm.24751
    """
    sides = [min(24, side, n) for side, n in zip(calibration, kspace.shape[-2:], strict=True)]
    if min(sides) <= kernel:
        raise ValueError(
            f"the centre of k-space is sampled without a gap over {calibration[0]} x {calibration[1]} samples; coil maps "
            f"need reference lines over more than {kernel} x {kernel}"
        )
    start = [n // 2 - side // 2 for n, side in zip(kspace.shape[-2:], sides, strict=True)]
    region = kspace[..., start[0] : start[0] + sides[0], start[1] : start[1] + sides[1]]
    region = region / region.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)  # powers of what is huge overflow
    to_image = [_kernel_transform(n, kernel, region) for n in kspace.shape[-2:]]
    # one virtual coil for all slices, so that phases do not jump between them; an eigenvector's own phase is arbitrary
    samples = region.flatten(1)
    principal = torch.linalg.eigh(samples @ samples.mH)[1][:, -1]
    principal = principal * torch.polar(torch.ones(()), -principal[0].angle().cpu()).to(principal)
    slices = [
        _slice_maps(region[:, i], principal, to_image, kernel, threshold, crop, n_squarings)
        for i in range(kspace.shape[1])
    ]
    return torch.stack(slices, 1)


def simulated_maps(shape: Sequence[int], n_coils: int = 8, generator: torch.Generator | None = None) -> torch.Tensor:
    """Simulate the smooth maps of coils around a volume.

    Coils lie on a cylinder about the first dimension, in two rings, turned and shifted at random; a map falls with the squared
    distance from its coil and its phase turns with the direction to it. Squared magnitudes sum to 1.

    Args:
        shape: ``(x, y, z)``, voxels.
        n_coils: coils.
        generator: where the randomness comes from.

    Returns:
        Complex64 ``(n_coils, x, y, z)``.
    """
    x, y, z = (torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in shape)
    turn, *shift = (torch.rand(n_coils + 1, generator=generator) - 0.5).tolist()
    maps = []
    for coil in range(n_coils):
        angle = 2 * math.pi * (coil + turn + 0.3 * shift[coil]) / n_coils
        to_y, to_z = y - 1.4 * math.cos(angle), z - 1.4 * math.sin(angle)
        to_x = x - (0.5 if coil % 2 else -0.5) - 0.4 * shift[coil]
        squared = to_x.square()[:, None, None] + to_y.square()[:, None] + to_z.square()
        phase = angle + 0.7 * (to_y[:, None] * math.sin(angle) - to_z * math.cos(angle)) + 0.4 * to_x[:, None, None]
        maps.append(torch.polar(1 / (0.3 + squared), phase.expand_as(squared).contiguous()))
    csm = torch.stack(maps)
    return csm / csm.abs().square().sum(0).sqrt()


def _kernel_transform(n: int, kernel: int, like: torch.Tensor) -> torch.Tensor:
    """Return the ``(n, 2 kernel - 1)`` matrix from a correlation of kernels to what it multiplies an image with."""
    position = (torch.arange(n, dtype=torch.float64, device=like.device) - n // 2)[:, None]
    shift = torch.arange(1 - kernel, kernel, dtype=torch.float64, device=like.device)
    angle = 2 * math.pi * position * shift / n
    return torch.polar(torch.ones_like(angle), angle).to(like.dtype)


def _slice_maps(
    region: torch.Tensor,
    principal: torch.Tensor,
    to_image: Sequence[torch.Tensor],
    kernel: int,
    threshold: float,
    crop: float,
    n_squarings: int,
) -> torch.Tensor:
    n_coils = region.shape[0]
    size = (to_image[0].shape[0], to_image[1].shape[0])
    if not bool(region.any()):
        return region.new_zeros(n_coils, *size)
    patches = region.unfold(1, kernel, 1).unfold(2, kernel, 1).movedim(0, 2).reshape(-1, n_coils * kernel**2)
    powers, vectors = torch.linalg.eigh(patches.mT @ patches.conj())
    if not powers[-1] > 0:  # vanishes beside other slices
        return region.new_zeros(n_coils, *size)
    kept = vectors[:, powers > threshold**2 * powers[-1]].mT.reshape(-1, n_coils, kernel, kernel)
    # The kernels' correlations are their products in the image; a transform large enough keeps them from wrapping.
    spectra = torch.fft.fft2(kept, (2 * kernel, 2 * kernel))
    correlation = torch.fft.ifft2(torch.einsum("kiyz,kjyz->ijyz", spectra, spectra.conj()))
    shifts = torch.arange(1 - kernel, kernel, device=region.device) % (2 * kernel)
    correlation = correlation[..., shifts[:, None], shifts] / kernel**2
    projection = torch.einsum("ya,ijab,zb->yzij", to_image[0], correlation, to_image[1])
    # The projection is Hermitian and not negative: what starts at the principal coil keeps a real product with it.
    power, least = projection, torch.finfo(projection.real.dtype).tiny
    for _ in range(n_squarings):
        power = power @ power
        trace = power.diagonal(dim1=-2, dim2=-1).real.sum(-1).clamp_min(least)  # kept at 1, lest air's powers vanish
        power = power / trace[..., None, None]
    maps = power @ principal
    maps = maps / maps.norm(dim=-1, keepdim=True).clamp_min(least)
    value = torch.linalg.vecdot(maps, (projection @ maps[..., None])[..., 0]).real
    maps = maps * (value > crop)[..., None]
    return maps.movedim(-1, 0).contiguous()
