"""The encoding operator of parallel MRI: coil maps, Fourier transform, sampling mask."""

import math
from collections.abc import Callable

import torch

__all__ = ["SenseOperator"]

Map = Callable[[torch.Tensor], torch.Tensor]


class SenseOperator:
    r"""SENSE encoding :math:`y_c = M F S_c x`: coil maps :math:`S_c`, Fourier transform :math:`F`, sampling mask :math:`M`.

    :math:`F` is centred (the zero frequency and the image's centre lie at index ``n // 2``) and orthonormal, over the last
    ``fft_dims`` dimensions; further dimensions are slices, or the frames of a movie. Coil after coil is computed, so that no
    temporary is larger than an image. The operator is linear and its gradients are its adjoints: autograd keeps nothing.

    Args:
        csm: complex coil maps ``(B, coils, *dims)``; a dimension of size 1 (frames) is broadcast. Constants: no gradient.
        mask: which samples were taken, ``(B or 1, 1 or coils, *dims)``, bool or real in [0, 1]; dimensions of size 1 are
            broadcast.
        fft_dims: how many of the last dimensions are Fourier encoded.

    Raises:
        ValueError: shapes or types do not fit, or the coil maps require a gradient.

    References:
        SENSE: sensitivity encoding for fast MRI (Pruessmann et al., 1999),
        https://doi.org/10.1002/(SICI)1522-2594(199911)42:5<952::AID-MRM16>3.0.CO;2-S
    """

    def __init__(self, csm: torch.Tensor, mask: torch.Tensor, fft_dims: int = 2) -> None:
        if not csm.is_complex() or csm.requires_grad:
            raise ValueError(
                f"csm must be complex and without gradient, got {csm.dtype}, requires_grad={csm.requires_grad}"
            )
        if mask.is_complex() or mask.dim() != csm.dim():
            raise ValueError(
                f"mask must be bool or real and have {csm.dim()} dimensions, got {mask.dtype}, {tuple(mask.shape)}"
            )
        if mask.shape[1] not in (1, csm.shape[1]):
            raise ValueError(f"mask is for {mask.shape[1]} coils, csm has {csm.shape[1]}")
        sides = zip(mask.shape[2:], csm.shape[2:], strict=True)
        if mask.shape[0] not in (1, csm.shape[0]) or any(m != n and 1 not in (m, n) for m, n in sides):
            raise ValueError(f"mask of shape {tuple(mask.shape)} does not fit csm of shape {tuple(csm.shape)}")
        if not 1 <= fft_dims <= csm.dim() - 2:
            raise ValueError(
                f"fft_dims must be 1 to {csm.dim() - 2} for csm of shape {tuple(csm.shape)}, got {fft_dims}"
            )
        self.csm = csm
        self.mask = mask if mask.dtype == torch.bool else mask.to(csm.real.dtype)
        self.fft_dims = tuple(range(-fft_dims, 0))
        self._sides = tuple(map(max, mask.shape[2:], csm.shape[2:]))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map an image ``(B, *dims)`` to k-space ``(B, coils, *dims)``, both complex."""
        return _Linear.apply(self._check(image, self.csm[:, 0]), self._forward, self._adjoint)

    def adjoint(self, kspace: torch.Tensor) -> torch.Tensor:
        """Map k-space ``(B, coils, *dims)`` to the image ``(B, *dims)`` of the adjoint: masked, transformed, coils combined."""
        return _Linear.apply(self._check(kspace, self.csm), self._adjoint, self._forward)

    def normal(self, image: torch.Tensor) -> torch.Tensor:
        """Map an image ``(B, *dims)`` to the adjoint of its k-space; as ``adjoint(forward(image))``, without k-space."""
        return _Linear.apply(self._check(image, self.csm[:, 0]), self._normal, self._normal)

    def _check(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        first = like.shape[: like.dim() - len(self._sides)]  # batch, and coils of k-space
        expected = (*first, *self._sides)
        fits = x.dim() == len(expected) and x.shape[1 : len(first)] == first[1:]
        if not x.is_complex() or not fits or any(n not in (m, 1) for m, n in zip(x.shape, expected, strict=True)):
            raise ValueError(f"expected a complex tensor of a shape like {expected}, got {x.dtype}, {tuple(x.shape)}")
        return x

    def _forward(self, image: torch.Tensor) -> torch.Tensor:
        centred = self._modulate(image, 0)
        coils = []
        for c in range(self.csm.shape[1]):
            kspace = torch.fft.fftn(centred * self.csm[:, c], dim=self.fft_dims, norm="ortho")
            coils.append(self._modulate(kspace, 1).mul_(self._coil_mask(c)))
        return torch.stack(coils, 1)

    def _adjoint(self, kspace: torch.Tensor) -> torch.Tensor:
        image: torch.Tensor | None = None
        for c in range(self.csm.shape[1]):
            samples = self._modulate(kspace[:, c] * self._coil_mask(c), 1, conjugate=True)
            image = self._combine(image, samples, c)
        return self._modulate(_some(image), 0, conjugate=True)

    def _normal(self, image: torch.Tensor) -> torch.Tensor:
        # The modulation of k-space commutes with the mask and cancels; that of the image commutes with the coil maps.
        centred = self._modulate(image, 0)
        squared = self.mask if self.mask.dtype == torch.bool else self.mask.square()
        result: torch.Tensor | None = None
        for c in range(self.csm.shape[1]):
            samples = torch.fft.fftn(centred * self.csm[:, c], dim=self.fft_dims, norm="ortho")
            samples.mul_(squared[:, c if squared.shape[1] > 1 else 0])
            result = self._combine(result, samples, c)
        return self._modulate(_some(result), 0, conjugate=True)

    def _combine(self, image: torch.Tensor | None, samples: torch.Tensor, coil: int) -> torch.Tensor:
        part = torch.fft.ifftn(samples, dim=self.fft_dims, norm="ortho").mul_(self.csm[:, coil].conj())
        return part if image is None else image.add_(part)

    def _coil_mask(self, coil: int) -> torch.Tensor:
        return self.mask[:, coil if self.mask.shape[1] > 1 else 0]

    def _modulate(self, x: torch.Tensor, start: int, conjugate: bool = False) -> torch.Tensor:
        r"""Multiply by :math:`e^{2\pi i c (n - s c)/N}` along every encoded dimension, :math:`c = N // 2`.

        A discrete transform between two such modulations, s = 0 in the image and s = 1 in k-space, is the centred one;
        it spares the shifts, which copy.
        """
        y = x
        for dim in self.fft_dims:
            n = x.shape[dim]
            centre = n // 2
            index = torch.arange(n, device=x.device) - start * centre
            if n % 2 == 0:
                factor = (1 - 2 * (index % 2)).to(x.real.dtype)
            else:
                angle = 2 * math.pi * centre / n * index.to(torch.float64) * (-1 if conjugate else 1)
                factor = torch.polar(torch.ones_like(angle), angle).to(x.dtype)
            factor = factor.view(-1, *[1] * (-dim - 1))
            y = y * factor if y is x else y.mul_(factor)
        return y


class _Linear(torch.autograd.Function):
    """A linear map whose derivative is its adjoint, differentiable any number of times."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, apply: Map, adjoint: Map) -> torch.Tensor:
        ctx.maps = apply, adjoint
        return apply(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        apply, adjoint = ctx.maps
        return _Linear.apply(gradient, adjoint, apply), None, None

    @staticmethod
    def jvp(ctx, tangent: torch.Tensor, *_) -> torch.Tensor:
        return ctx.maps[0](tangent)


def _some(x: torch.Tensor | None) -> torch.Tensor:
    if x is None:
        raise ValueError("csm has no coil")
    return x
