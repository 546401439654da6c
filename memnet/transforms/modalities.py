"""Loads one or two MRI modalities as the channels of one image, scales them and leaves some out in training."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import (
    InvertibleTransform,
    MapTransform,
    RandomizableTransform,
    ScaleIntensityRangePercentiles,
    Spacing,
    SpatialResample,
)
from monai.utils import GridSampleMode, GridSamplePadMode
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

__all__ = [
    "KeepLogitsd",
    "LoadModalitiesd",
    "LoadVolumed",
    "RandDropModalityd",
    "ScaleModalitiesd",
    "ToSpacingd",
    "read_volume",
]

MODALITIES = ("T1", "T2")


def read_volume(path: str | Path) -> MetaTensor:
    """Read a 3D volume and refuse what no later step could use.

    Args:
        path: NIfTI (.nii, .nii.gz), Analyze (.hdr or .img) or another single-volume format of nibabel.

    Returns:
        ``(1, D, H, W)`` float32 with the file's affine (mm, RAS+).

    Raises:
        ValueError: naming the file, if it is missing, no such image, cut short, not 3D, not finite, or constant.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a NIfTI file (convert DICOM first, e.g. with dcm2niix)")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        image = nib.load(path)
        shape = tuple(image.shape)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path}: not a NIfTI (or Analyze) image, or damaged ({_first_line(error)})") from error
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise ValueError(f"{path}: has shape {shape}, expected a 3D volume (extract one volume of a series first)")
    try:
        values = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read, cut short or damaged ({_first_line(error)})") from error
    not_finite = int(values.size - np.isfinite(values).sum())
    if not_finite:
        raise ValueError(f"{path}: {not_finite} of {values.size} voxels are NaN or infinite; replace them first")
    if values.size == 0 or values.min() == values.max():
        value = values.flat[0] if values.size else "missing"
        raise ValueError(f"{path}: every voxel is {value}; there is nothing to see in it")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(f"{path}: its affine is not invertible, so that voxel size and orientation are unknown")
    meta = {"filename_or_obj": str(path), "original_affine": affine, "spatial_shape": np.array(shape), "space": "RAS"}
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(values))[None], affine=torch.from_numpy(affine), meta=meta)


class LoadModalitiesd(MapTransform):
    """Load a T1, a T2 or both into one image whose channel is all zero where a modality is missing.

    A second modality is resampled onto the first one's grid by their affines.

    Args:
        keys: the entries to load: a file (taken as the first modality) or a list of files, ``None`` for a missing one.
        modalities: the channels' names, in order.
        name_key: an entry that gives the output's name where file names would collide; optional in the data.

    Raises:
        ValueError: naming the file or the entry that cannot be used; see :func:`read_volume`.
    """

    def __init__(
        self, keys: KeysCollection, modalities: Sequence[str] = MODALITIES, name_key: str = "output_name"
    ) -> None:
        super().__init__(keys)
        self.modalities = tuple(modalities)
        self.name_key = name_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the files by a ``(n_modalities, D, H, W)`` image."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self._load(d[key])
            if self.name_key in d:
                d[key].meta["output_name"] = d[self.name_key]
        return d

    def _load(self, entry: Any) -> MetaTensor:
        paths = [entry] if isinstance(entry, (str, Path)) else list(entry)
        if not 1 <= len(paths) <= len(self.modalities) or all(p is None for p in paths):
            raise ValueError(f"{entry!r}: expected 1 to {len(self.modalities)} files ({', '.join(self.modalities)})")
        volumes = [None if p is None else read_volume(p) for p in paths]
        first = next(v for v in volumes if v is not None)
        image = torch.zeros(len(self.modalities), *first.shape[1:])
        for channel, volume in enumerate(volumes):
            if volume is not None:
                image[channel] = _onto_grid(volume, first)[0]
        meta = {k: v for k, v in first.meta.items() if k != "affine"}
        return MetaTensor(image, affine=first.affine, meta=meta)


class LoadVolumed(MapTransform):
    """Load single 3D volumes, such as label maps, with the checks of :func:`read_volume`.

    Args:
        keys: the entries to load, a file each.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the files by ``(1, D, H, W)`` volumes."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = read_volume(d[key])
        return d


class ScaleModalitiesd(MapTransform):
    """Scale every channel from its 0 and ``upper`` percentile to [0, 1], clipped; a missing (all-zero) one stays zero.

    Args:
        keys: the images, ``(C, D, H, W)``.
        upper: the percentile that becomes 1.
    """

    def __init__(self, keys: KeysCollection, upper: float = 99.5) -> None:
        super().__init__(keys)
        self.scale = ScaleIntensityRangePercentiles(lower=0, upper=upper, b_min=0, b_max=1, clip=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Scale in float32."""
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key].clone()
            channels = image.as_tensor() if isinstance(image, MetaTensor) else image
            for channel in channels:
                # MONAI's transform warns of a division by zero where all values are the same
                if channel.min() < channel.max():
                    channel.copy_(self.scale(channel))
            d[key] = image
        return d


class ToSpacingd(MapTransform, InvertibleTransform):
    """Resample to isotropic voxels, trilinearly, and back.

    MONAI's ``Spacingd`` takes every entry whose key begins like the image's for metadata, and fails on the
    ``image_path`` that MONAI Label hands over.

    Args:
        keys: the images, ``(C, D, H, W)`` MetaTensors.
        spacing: side of a voxel in mm.
    """

    def __init__(self, keys: KeysCollection, spacing: float = 1.0) -> None:
        super().__init__(keys)
        self.spacing = Spacing(pixdim=(spacing,) * 3, mode=GridSampleMode.BILINEAR, dtype=np.float32)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.spacing(d[key])
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample back to the original grid."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.spacing.inverse(d[key])
        return d


class RandDropModalityd(RandomizableTransform, MapTransform):
    """Set one of the present modalities to zero with some probability, never the last one.

    Args:
        keys: the images, ``(C, D, H, W)``.
        prob: probability that a modality is dropped.
    """

    def __init__(self, keys: KeysCollection, prob: float = 0.5) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self._choice = 0.0

    def randomize(self, data: Any = None) -> None:
        """Draw whether to drop, and which."""
        super().randomize(None)
        self._choice = self.R.random()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Drop a channel."""
        d = dict(data)
        self.randomize()
        for key in self.key_iterator(d):
            present = [c for c in range(d[key].shape[0]) if bool((d[key][c] != 0).any())]
            if self._do_transform and len(present) > 1:
                d[key] = d[key].clone()
                d[key][present[int(self._choice * len(present))]] = 0
        return d


class KeepLogitsd(MapTransform):
    """Keep the logits of a network's output in training, which with the variational branch is a tuple.

    Args:
        keys: the predictions: logits, or the logits and the branch's losses.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the first of the tuple."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = d[key][0] if isinstance(d[key], (tuple, list)) else d[key]
        return d


def _onto_grid(volume: MetaTensor, reference: MetaTensor) -> torch.Tensor:
    same = volume.shape == reference.shape and torch.allclose(volume.affine, reference.affine, atol=1e-4)
    if same:
        return volume.as_tensor()
    resample = SpatialResample(mode=GridSampleMode.BILINEAR, padding_mode=GridSamplePadMode.ZEROS)
    moved = torch.as_tensor(resample(volume, dst_affine=reference.affine, spatial_size=reference.shape[1:]))
    if not bool((moved != 0).any()):
        names = f"{volume.meta['filename_or_obj']} and {reference.meta['filename_or_obj']}"
        raise ValueError(f"{names}: do not overlap in space according to their affines")
    return moved


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
