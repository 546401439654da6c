"""What scanner and preprocessing do to an ideal image: resolution, bias field, noise, skull stripping, scaling."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from torch.nn import functional

__all__ = ["RandAcquireModalitiesd", "RandScaleModalitiesd", "RandStripSkulld"]


class RandAcquireModalitiesd(RandomizableTransform, MapTransform):
    """Blur, resample to a coarser grid and back, bias, noise and gamma, each channel by itself; empty channels stay empty.

    Args:
        keys: images ``(C, D, H, W)`` at 1 mm, intensities of order 1.
        prob_coarse: probability that a channel was acquired with larger voxels.
        prob_thick: probability that those are thick slices, not cubes.
        voxel_size: largest edge of coarse cubes, mm.
        thickness: largest slice thickness, mm.
        blur: least and largest standard deviation of the point spread at 1 mm, voxels.
        bias: largest standard deviation of the log bias field at its control points.
        noise: largest standard deviation of the noise.
        gamma: standard deviation of the log exponent.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        prob_coarse: float = 0.4,
        prob_thick: float = 0.35,
        voxel_size: float = 1.6,
        thickness: float = 5.0,
        blur: tuple[float, float] = (0.4, 0.9),
        bias: float = 0.3,
        noise: float = 0.06,
        gamma: float = 0.15,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, 1.0)
        self.prob_coarse, self.prob_thick = prob_coarse, prob_thick
        self.voxel_size, self.thickness, self.blur = voxel_size, thickness, blur
        self.bias, self.noise, self.gamma = bias, noise, gamma

    def randomize(self, data: Any = None) -> None:
        """Draw one channel's acquisition."""
        super().randomize(None)
        self._factors = np.ones(3)
        if self.R.random() < self.prob_coarse:
            if self.R.random() < self.prob_thick:
                self._factors[self.R.randint(3)] = self.R.uniform(1.5, self.thickness)
            else:
                self._factors = self.R.uniform(1.0, self.voxel_size, 3)
        sigma = self.R.uniform(*self.blur)
        self._sigma = np.sqrt(sigma**2 + 0.42**2 * (self._factors**2 - 1))
        points = self.R.randint(2, 6)
        self._bias = self.R.normal(0, self.bias * self.R.random() ** 1.5, (1, 1, points, points, points))
        self._noise = self.noise * self.R.random() ** 2
        self._exponent = float(np.exp(self.R.normal(0, self.gamma)))
        self._seed = int(self.R.randint(2**31 - 1))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return images of the same shape, scaled so that their brightest voxels are about 1."""
        d = dict(data)
        for key in self.key_iterator(d):
            image = torch.as_tensor(d[key]).clone()
            for channel in range(image.shape[0]):
                self.randomize()  # for empty channels too: what is drawn must not depend on what is missing
                if bool((image[channel] != 0).any()):
                    image[channel] = self._acquire(image[channel])
            d[key] = image
        return d

    def _acquire(self, image: torch.Tensor) -> torch.Tensor:
        shape = image.shape
        dark = float(image.min()) == 0.0 and float((image == 0).float().mean()) > 0.01
        x = blur(image[None, None], self._sigma)
        bias = functional.interpolate(
            torch.from_numpy(self._bias).float(), shape, mode="trilinear", align_corners=True
        ).exp_()
        x = x * bias
        coarse = tuple(max(2, round(n / f)) for n, f in zip(shape, self._factors, strict=True))
        if coarse != tuple(shape):
            x = functional.interpolate(x, coarse, mode="trilinear", align_corners=False)
        generator = torch.Generator().manual_seed(self._seed)
        noise = self._noise * torch.randn(x.shape, generator=generator)
        x = (x + (noise * (x > 0.02) if dark else noise)).abs_()
        if coarse != tuple(shape):
            x = functional.interpolate(x, shape, mode="trilinear", align_corners=False)
        x = x / bright(x).clamp(min=1e-3)
        return x.pow_(self._exponent)[0, 0]


class RandStripSkulld(RandomizableTransform, MapTransform):
    """Remove what lies outside the brain as brain extraction does: too much here, too little there, fluid kept or not.

    Args:
        keys: images ``(C, D, H, W)``, set to exactly zero outside the drawn mask.
        label_key: tissue labels, set to background where the image is removed.
        mask_key: the true brain, ventricles included; removed from the data.
        prob: probability that the skull is stripped at all; never where the brain is less than 2 percent of the patch, which
            would leave nothing to see.
        prob_tight: probability that the mask follows the cortex into the sulci instead of bridging them.
        margin: least and largest share of brain in the neighbourhood of a voxel at which a bridging mask ends; below one
            half it keeps a rim of fluid, above it cuts the crowns of the gyri.
        irregularity: standard deviation of that share over the mask.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        label_key: str = "label",
        mask_key: str = "brain",
        prob: float = 0.65,
        prob_tight: float = 0.5,
        margin: tuple[float, float] = (0.08, 0.5),
        irregularity: float = 0.1,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.label_key, self.mask_key = label_key, mask_key
        self.prob_tight, self.margin, self.irregularity = prob_tight, margin, irregularity

    def randomize(self, data: Any = None) -> None:
        """Draw whether to strip, and the kind of mask."""
        super().randomize(None)
        self._tight = self.R.random() < self.prob_tight
        self._threshold = self.R.uniform(*self.margin)
        self._rim = int(self.R.randint(0, 3))
        self._field = self.R.normal(0, self.irregularity * self.R.random(), (1, 1, 6, 6, 6)).astype(np.float32)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return images and labels with everything outside the mask at exactly 0."""
        d = dict(data)
        self.randomize()
        brain = torch.as_tensor(d.pop(self.mask_key))[None].float()
        if not self._do_transform or float(brain.mean()) < 0.02:
            return d
        field = functional.interpolate(
            torch.from_numpy(self._field), brain.shape[2:], mode="trilinear", align_corners=True
        )
        if self._tight:
            grown = brain
            for _ in range(self._rim):
                grown = functional.avg_pool3d(grown, 3, 1, 1) * 27 > 1.5
                grown = grown.float()
            mask = (grown > 0) & (field > -2 * self.irregularity)
        else:
            share = brain
            for axis in range(3):
                kernel = [9 if i == axis else 1 for i in range(3)]
                share = functional.avg_pool3d(share, kernel, 1, [k // 2 for k in kernel], count_include_pad=False)
            mask = share > (self._threshold + field).clamp_(min=0.02)
        keep = mask[0]
        for key in self.key_iterator(d):
            d[key] = torch.as_tensor(d[key]) * keep
        d[self.label_key] = torch.as_tensor(d[self.label_key]) * keep
        return d


class RandScaleModalitiesd(RandomizableTransform, MapTransform):
    """Scale every channel to [0, 1] as percentiles of a whole volume would, up to what a patch cannot know.

    Args:
        keys: images ``(C, D, H, W)``.
        jitter: least and largest factor on the scaled intensities before they are cut off at 1.
    """

    def __init__(self, keys: KeysCollection = "image", jitter: tuple[float, float] = (0.75, 1.2)) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, 1.0)
        self.jitter = jitter

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return images in [0, 1], float32; empty channels stay empty."""
        d = dict(data)
        for key in self.key_iterator(d):
            image = torch.as_tensor(d[key]).clone()
            for channel in range(image.shape[0]):
                factor = self.R.uniform(*self.jitter)
                top = bright(image[channel])
                image[channel] = (image[channel] * (factor / max(float(top), 1e-3))).clamp_(0, 1)
            d[key] = image
        return d


def bright(image: torch.Tensor) -> torch.Tensor:
    """Return the intensity that 1.5 percent of the voxels other than 0 exceed; 0 for an empty image."""
    values = image.flatten()[::7]
    values = values[values > 0]
    return torch.quantile(values, 0.985) if len(values) else image.new_zeros(())


def blur(image: torch.Tensor, sigma: np.ndarray) -> torch.Tensor:
    """Convolve ``(1, 1, D, H, W)`` with a Gaussian of standard deviation ``sigma`` (voxels) along each axis."""
    for axis, s in enumerate(sigma):
        radius = max(1, int(np.ceil(2.5 * s)))
        line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float32) / max(float(s), 1e-3)) ** 2)
        pad = [0] * 6
        pad[4 - 2 * axis] = pad[5 - 2 * axis] = radius
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = -1
        image = functional.conv3d(functional.pad(image, pad, mode="replicate"), (line / line.sum()).view(shape))
    return image
