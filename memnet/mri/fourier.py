"""The centred orthonormal Fourier transform that data, coil maps and simulation share with the encoding operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["image_to_kspace", "kspace_to_image"]


def image_to_kspace(image: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Transform an image to k-space; the image's centre and the zero frequency lie at index ``n // 2``.

    Args:
        image: real or complex, of any shape.
        dims: the dimensions to encode.

    Returns:
        Complex k-space of the same shape.
    """
    return torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(image, dims), dim=dims, norm="ortho"), dims)


def kspace_to_image(kspace: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Undo :func:`image_to_kspace`.

    Args:
        kspace: complex, of any shape.
        dims: the dimensions to decode.

    Returns:
        The complex image of the same shape.
    """
    return torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(kspace, dims), dim=dims, norm="ortho"), dims)
