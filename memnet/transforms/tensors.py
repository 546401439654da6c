"""MONAI dictionary transforms of diffusion tensors: reading, completing the edge, patches, symmetries."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable, RandomizableTransform
from monai.utils import ensure_tuple
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from scipy import ndimage
from torch.nn import functional

from memnet.datasets.diffusion import prepare
from memnet.datasets.diffusion_files import read_tensors, source_of
from memnet.diffusion.tensors import SYMMETRIC, complete_edge, has_tensor, rotate_tensors, rotation_of
from memnet.metadata import plain_tensor
from memnet.transforms.grids import grid_of, same_grid
from memnet.transforms.volumes import read_volume

__all__ = [
    "CompleteEdged",
    "FitTensorsd",
    "LoadTensorsd",
    "MarkRegionsd",
    "RandTensorPatchd",
    "RandTensorSymmetryd",
    "interpolate",
    "signed_permutations",
    "turn",
]

UNIT = 1e-3
"""mm^2/s of a value that networks see: um^2/ms, in which brain is of magnitude 1."""

EDGE, INTERIOR = 1, 2


class FitTensorsd(MapTransform):
    """Fit tensors to a diffusion series, or take those that have been fitted to it before.

    Args:
        keys: entries that hold a series, see :func:`memnet.datasets.diffusion.find_series`.
        images: for each of them the entry that then names the tensor image.
        masks: for each of them the entry that then names the brain's mask.
        cache_dir: where the tensors are kept, see :func:`memnet.datasets.diffusion.prepare`.
        shells: see :meth:`memnet.diffusion.tensors.DiffusionSeries.select`.
        allow_missing_keys: leave data as it is that does not have the entries.

    Raises:
        ValueError: see :func:`memnet.datasets.diffusion_files.read_series`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        images: KeysCollection,
        masks: KeysCollection,
        cache_dir: str | Path,
        shells: Sequence[float] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.images, self.masks = ensure_tuple(images), ensure_tuple(masks)
        self.cache_dir, self.shells = cache_dir, shells

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace each series by the files of its tensors and brain."""
        d = dict(data)
        for key, image, mask in self.key_iterator(d, self.images, self.masks):
            (fitted,) = prepare([d.pop(key)], self.cache_dir, self.shells, rate=None)
            d[image], d[mask] = fitted["tensor_high"], fitted["mask_high"]
        return d


class LoadTensorsd(MapTransform):
    """Load a tensor image, turned to RAS, its tensors in the axes of the turned grid and in um^2/ms.

    Args:
        keys: entries that name a tensor image, see :func:`memnet.datasets.diffusion_files.read_tensors`.
        masks: for each of them the entry that names the brain mask on the same grid, one half and more being brain; where the
            data has no such entry, voxels with a tensor are brain, see :func:`memnet.diffusion.tensors.has_tensor`.
        order: how the file's values are ordered.
        axes: what x, y and z are in the file.
        allow_missing_keys: leave out entries that the data does not have.

    Raises:
        ValueError: naming the file that cannot be used.
    """

    def __init__(
        self,
        keys: KeysCollection,
        masks: KeysCollection,
        order: str = "nifti",
        axes: Literal["world", "voxel", "fsl"] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.masks = ensure_tuple(masks)
        self.order, self.axes = order, axes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace each file by ``(7, D, H, W)``: the tensor in NIfTI's order, and the brain as 0 and 1."""
        d = dict(data)
        for key, mask_key in self.key_iterator(d, self.masks):
            d[key] = self._load(d[key], d.pop(mask_key, None))
        return d

    def _load(self, path: str | Path, mask_path: str | Path | None) -> MetaTensor:
        tensors, affine = read_tensors(path, self.order, self.axes)
        brain = has_tensor(tensors)
        if mask_path is not None:
            mask = read_volume(mask_path, constant=True)
            if not same_grid(grid_of(mask), (brain.shape, affine)):
                raise ValueError(
                    f"{mask_path}: the mask's grid ({tuple(mask.shape[1:])}) is not that of {path} ({brain.shape})"
                )
            # a fit leaves zeros where there was no signal
            brain = (mask[0].numpy() >= 0.5) & brain
        if not brain.any():
            raise ValueError(f"{path}: no voxel has a tensor within the mask")
        orientation = io_orientation(affine)
        turned = affine @ inv_ornt_aff(orientation, brain.shape)
        tensors = rotate_tensors(apply_orientation(tensors, orientation), rotation_of(turned).T) / UNIT
        content = np.concatenate([tensors, apply_orientation(brain, orientation)[..., None]], -1, dtype=np.float32)
        values = torch.from_numpy(np.ascontiguousarray(np.moveaxis(content, -1, 0)))
        meta = {"filename_or_obj": source_of(path), "original_affine": affine, "space": "RAS"}
        return MetaTensor(values, affine=torch.from_numpy(turned), meta=meta)


class CompleteEdged(MapTransform):
    """Complete patches that leave the brain: voxels outside it get the tensor of the nearest voxel of the brain.

    Args:
        keys: entries of :class:`LoadTensorsd`.
        brain_key: the entry for the brain.
    """

    def __init__(self, keys: KeysCollection, brain_key: str = "brain") -> None:
        super().__init__(keys)
        self.brain_key = brain_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace ``(7, D, H, W)`` by the completed tensors ``(6, D, H, W)``, and add the brain, ``(1, D, H, W)``."""
        d = dict(data)
        for key in self.key_iterator(d):
            values = d[key]
            completed = complete_edge(values[:6].numpy(), values[6].numpy() > 0)
            d[self.brain_key] = values[6:].clone()
            d[key] = MetaTensor(torch.from_numpy(np.ascontiguousarray(completed)), meta=values.meta)
        return d


class MarkRegionsd(MapTransform):
    """Mark in the fine tensors' last channel what is interior (2) and edge (1) of the brain, and what neither (0).

    Interior are the voxels of the brain whose coarse neighbourhood, what a prediction is made from at least, lies in the
    coarse brain; the others are edge.

    Args:
        keys: the fine tensors of :class:`LoadTensorsd`.
        brain_key: the coarse brain of :class:`CompleteEdged`.
        neighbourhood: voxels a side of the coarse neighbourhood.

    Raises:
        ValueError: at run time, if the fine grid is not a whole number of times as fine as the coarse one.
    """

    def __init__(self, keys: KeysCollection, brain_key: str = "brain", neighbourhood: int = 5) -> None:
        super().__init__(keys)
        self.brain_key, self.neighbourhood = brain_key, neighbourhood

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change the last channel of ``(7, r D, r H, r W)``."""
        d = dict(data)
        for key in self.key_iterator(d):
            values, brain = d[key].clone(), d[self.brain_key][0].numpy() > 0
            rate = values.shape[1] // brain.shape[0]
            if tuple(values.shape[1:]) != tuple(rate * n for n in brain.shape):
                raise ValueError(
                    f"{values.meta['filename_or_obj']}: {tuple(values.shape[1:])} voxels are not a whole number of times as "
                    f"many as the {brain.shape} of low resolution"
                )
            interior = ndimage.binary_erosion(brain, np.ones((self.neighbourhood,) * 3))
            fine = torch.from_numpy(interior)
            for axis in range(3):
                fine = fine.repeat_interleave(rate, axis)
            values[6] = torch.where(values[6] > 0, torch.where(fine, float(INTERIOR), float(EDGE)), 0.0)
            d[key] = values
        return d


class RandTensorPatchd(MapTransform, Randomizable):
    """Draw a patch around a random voxel of the brain, and what a network makes of it: the patch without its border, finer.

    Args:
        image_key: coarse tensors ``(6, D, H, W)``.
        label_key: fine tensors with their regions ``(7, r D, r H, r W)``.
        brain_key: the coarse brain ``(1, D, H, W)``; left out of the result.
        patch_size: voxels a side of a coarse patch, odd.
        border: coarse voxels on each side that are seen and not refined.

    Raises:
        ValueError: the size is even or too small; at run time, if the volume is smaller than a patch.
    """

    def __init__(
        self,
        image_key: str = "image",
        label_key: str = "label",
        brain_key: str = "brain",
        patch_size: int = 11,
        border: int = 2,
    ) -> None:
        super().__init__([image_key, label_key])
        if patch_size % 2 == 0 or patch_size <= 2 * border:
            raise ValueError(f"patch_size must be odd and larger than {2 * border}, got {patch_size}")
        self.brain_key, self.patch_size, self.border = brain_key, patch_size, border

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``image`` ``(6, n, n, n)`` and ``label`` ``(7, m, m, m)`` with ``m = r (n - 2 border)``."""
        image_key, label_key = self.keys
        image, label, brain = data[image_key], data[label_key], data[self.brain_key]
        sizes = np.array(image.shape[1:])
        if sizes.min() < self.patch_size:
            name = image.meta.get("filename_or_obj", "the image")
            raise ValueError(
                f"{name}: {tuple(sizes.tolist())} voxels are fewer than a patch's {self.patch_size} a side"
            )
        rate, half = label.shape[1] // image.shape[1], self.patch_size // 2
        voxels = torch.nonzero(plain_tensor(brain)[0])
        centre = voxels[int(self.R.randint(len(voxels)))].tolist()
        inside = half - self.border
        low = _window(plain_tensor(image), [c - half for c in centre], self.patch_size)
        high = _window(plain_tensor(label), [rate * (c - inside) for c in centre], rate * (2 * inside + 1), outside=6)
        rest = {k: v for k, v in data.items() if k not in (image_key, label_key, self.brain_key)}
        return {**rest, image_key: low, label_key: high}


def _window(x: torch.Tensor, start: list[int], size: int, outside: int | None = None) -> torch.Tensor:
    """Cut a cube that may leave the volume, which goes on with its border's values, channel ``outside`` with 0."""
    indices = [torch.arange(s, s + size) for s in start]
    held = [i.clamp(0, n - 1) for i, n in zip(indices, x.shape[1:], strict=True)]
    cut = x[:, held[0][:, None, None], held[1][None, :, None], held[2][None, None, :]]
    if outside is not None:
        valid = [i == h for i, h in zip(indices, held, strict=True)]
        cut[outside] *= valid[0][:, None, None] & valid[1][None, :, None] & valid[2][None, None, :]
    return cut


def signed_permutations() -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """Return the 48 symmetries of a cube: for each new axis the old one, and its sign."""
    orders = list(itertools.permutations(range(3)))
    signs = list(itertools.product((1, -1), repeat=3))
    return [cast(Any, (order, sign)) for order in orders for sign in signs]


class RandTensorSymmetryd(RandomizableTransform, MapTransform):
    """Turn and reflect a tensor image by a random symmetry of the cube, its tensors with it; nothing is interpolated.

    Args:
        keys: entries ``(C, D, H, W)`` whose first six channels are a tensor in NIfTI's order and the grid's axes.
        prob: how often.
    """

    def __init__(self, keys: KeysCollection, prob: float = 1.0) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the turned entries."""
        d = dict(data)
        self.randomize(None)
        order, sign = signed_permutations()[int(self.R.randint(48))]
        if self._do_transform:
            for key in self.key_iterator(d):
                d[key] = turn(d[key], order, sign)
        return d


def turn(values: torch.Tensor, order: tuple[int, int, int], sign: tuple[int, int, int]) -> torch.Tensor:
    """Turn a tensor image so that new axis ``i`` is the old ``order[i]``, reversed where ``sign[i]`` is -1."""
    turned = values.permute(0, *(1 + axis for axis in order))
    turned = turned.flip([1 + i for i in range(3) if sign[i] < 0])
    pairs = [(max(order[i], order[j]), min(order[i], order[j])) for i, j in SYMMETRIC]
    sources = [SYMMETRIC.index((low, high)) for high, low in pairs]
    signs = values.new_tensor([float(sign[i] * sign[j]) for i, j in SYMMETRIC]).view(6, 1, 1, 1)
    return torch.cat([turned[sources] * signs, turned[6:]])


def interpolate(image: torch.Tensor, rate: int, order: Literal[1, 3]) -> torch.Tensor:
    """Refine tensors by interpolation of their entries.

    Args:
        image: ``(C, D, H, W)``, completed beyond the brain.
        rate: how many times as fine.
        order: 1 trilinear, 3 cubic splines.

    Returns:
        ``(C, r D, r H, r W)``, on the grid of :func:`memnet.diffusion.tensors.fine_affine`.
    """
    if order == 1:
        return functional.interpolate(
            plain_tensor(image)[None], scale_factor=rate, mode="trilinear", align_corners=False
        )[0]
    volumes = [ndimage.zoom(v, rate, order=order, mode="nearest", grid_mode=True) for v in plain_tensor(image).numpy()]
    return torch.from_numpy(np.stack(volumes))
