"""MoDL on one tensor that holds k-space, coil maps and mask, as MONAI's workflow hands over one input."""

from __future__ import annotations

import torch

from memnet.metadata import plain_tensor
from memnet.nets.modl import MoDL

__all__ = ["PackedMoDL", "pack", "unpack"]


def pack(kspace: torch.Tensor, csm: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Put k-space, coil maps and mask into the channels of one tensor.

    Args:
        kspace: complex ``(coils, *dims)``.
        csm: complex ``(coils, *dims)``; dimensions of size 1 are broadcast.
        mask: bool or real ``(1, *dims)``; dimensions of size 1 are broadcast.

    Returns:
        Complex ``(2 coils + 1, *dims)``.
    """
    shape = kspace.shape[1:]
    return torch.cat([kspace, csm.expand_as(kspace), mask.expand(1, *shape).to(kspace.dtype)])


def unpack(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take apart what :func:`pack` put together; what comes back are views.

    Args:
        image: complex ``(B, 2 coils + 1, *dims)``.

    Returns:
        K-space and coil maps ``(B, coils, *dims)``, and the mask, real ``(B, 1, *dims)``.

    Raises:
        ValueError: the tensor is not complex or has an even number of channels.
    """
    if not image.is_complex() or image.shape[1] % 2 == 0 or image.shape[1] < 3:
        raise ValueError(
            "expected complex (B, 2 coils + 1, *dims): k-space, coil maps and mask, got "
            f"{image.dtype}, {tuple(image.shape)}"
        )
    n_coils = image.shape[1] // 2
    return image[:, :n_coils], image[:, n_coils : 2 * n_coils], image[:, 2 * n_coils :].real


class PackedMoDL(MoDL):
    """:class:`memnet.MoDL` with one input and one output, for MONAI's engines and tools; arguments and weights are the same.

    With ``spatial_dims=2`` it takes the slices of a slab, or the frames of a movie, one by one.
    """

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Reconstruct.

        Args:
            image: complex ``(B, 2 coils + 1, *dims)``, see :func:`pack`; the first of three dims is the slices of a slab
                whose readout has been transformed, or the frames of a movie.

        Returns:
            Real and imaginary part, ``(B, 2, *dims)``.

        Raises:
            ValueError: the tensor is not complex or has an even number of channels.
        """
        inputs = list(unpack(plain_tensor(image)))
        batch = inputs[0].shape[0]
        by_slice = self.spatial_dims == 2 and inputs[0].dim() == 5
        if by_slice:
            inputs = [x.movedim(2, 1).flatten(0, 1) for x in inputs]
        output = torch.view_as_real(super().forward(*inputs))
        return (output.unflatten(0, (batch, -1)) if by_slice else output).movedim(-1, 1)
