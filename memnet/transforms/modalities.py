"""Loads MRI modalities as the channels of one image, scales them and leaves some out in training."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any, cast

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
from nibabel.spatialimages import HeaderDataError, SpatialImage

from memnet.dicom import holds_dicom, read_pixels, read_stack, split_uid
from memnet.metadata import plain_tensor
from memnet.transforms.grids import file_grid, grid_of, require_one_grid, same_grid
from memnet.transforms.intensity import zero_background
from memnet.workflow.scans import tell_modality, volumes_of

__all__ = [
    "KeepLogitsd",
    "LoadModalitiesd",
    "LoadVolumed",
    "RandDropModalityd",
    "ScaleModalitiesd",
    "ToSpacingd",
    "read_volume",
    "require_real_numbers",
]

MODALITIES = ("T1", "T2")
_MOST_VOXELS = 2**28
_SIDES, _FARTHEST = (1e-3, 1e3), 1e5  # of voxels, and of the first one from the origin, mm
_MOST_COMPRESSED = 1100  # times that gzip makes zeros smaller, and a little more


def read_volume(path: str | Path, constant: bool = False) -> MetaTensor:
    """Read a 3D volume and refuse what no later step could use.

    Args:
        path: NIfTI (.nii, .nii.gz), Analyze (.hdr or .img) or another single-volume format of nibabel; ``file:2`` for one
            volume of a 4D file, counted from 0; or a DICOM series: its folder, ``folder:UID``, or its only file, see
            :func:`memnet.dicom.read_stack`.
        constant: take a volume whose voxels are all the same, such as the label map of a healthy brain.

    Returns:
        ``(1, D, H, W)`` float32 with the file's affine (mm, RAS+).

    Raises:
        ValueError: naming the file, if it is missing, no such image, cut short, not 3D, not finite, or constant.
    """
    return _checked(
        path, *(_read_dicom(path) if Path(path).is_dir() or holds_dicom(path) else _read_nifti(path)), constant
    )


def _checked(path: str | Path, values: np.ndarray, affine: np.ndarray, constant: bool) -> MetaTensor:
    not_finite = int(values.size - np.isfinite(values).sum())
    if not_finite:
        raise ValueError(f"{path}: {not_finite} of {values.size} voxels are NaN or infinite; replace them first")
    if values.size == 0 or (values.min() == values.max() and not constant):
        value = values.flat[0] if values.size else "missing"
        raise ValueError(f"{path}: every voxel is {value}; there is nothing to see in it")
    is_regular = np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) >= 1e-9
    if not is_regular or not np.isfinite(nib.io_orientation(affine)).all():
        raise ValueError(f"{path}: its affine is not invertible, so that voxel size and orientation are unknown")
    sides, origin = np.linalg.norm(affine[:3, :3], axis=0), affine[:3, 3]
    if sides.min() < _SIDES[0] or sides.max() > _SIDES[1] or np.abs(origin).max() > _FARTHEST:
        told = " x ".join(f"{side:.3g}" for side in sides), ", ".join(f"{x:.3g}" for x in origin)
        raise ValueError(
            f"{path}: its affine has voxels of {told[0]} mm at {told[1]} mm, which is no scan; is it damaged?"
        )
    meta = {
        "filename_or_obj": str(path),
        "original_affine": affine,
        "spatial_shape": np.array(values.shape),
        "space": "RAS",
    }
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(values))[None], affine=torch.from_numpy(affine), meta=meta)


def _read_dicom(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    stack = read_stack(path)
    return read_pixels(stack), stack.affine


def _read_nifti(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    file, volume = split_uid(path)
    if not file.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        image = nib.load(file)
        require_real_numbers(image)
        shape = tuple(image.shape)
        stored = Path(image.file_map["image"].filename or file)
        n_bytes = prod(shape) * image.get_data_dtype().itemsize
        if n_bytes > stored.stat().st_size * (_MOST_COMPRESSED if stored.suffix == ".gz" else 1):
            raise ValueError(f"its header speaks of {n_bytes} bytes, {stored.name} is cut short")
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not a NIfTI (or Analyze) image, or damaged ({_first_line(error)})") from error
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 + (volume is not None):
        raise ValueError(f"{path}: has shape {shape}, expected a 3D volume, or file:0 to name one volume of a 4D file")
    if volume is not None and not (volume.isdigit() and int(volume) < shape[3]):
        raise ValueError(f"{path}: no such volume, the file has shape {shape} and they count from 0")
    try:
        part = image.dataobj if volume is None else image.dataobj[:, :, :, int(volume)]
        values = np.asarray(part, dtype=np.float32).reshape(shape[:3])
    except (OSError, EOFError, zlib.error, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: cannot be read, cut short or damaged ({_first_line(error)})") from error
    return values, np.asarray(image.affine, dtype=np.float64)


def require_real_numbers(image: SpatialImage) -> None:
    """Refuse complex values, of which a reader would keep the real part, and colours.

    Raises:
        ValueError: the image holds such values.
    """
    kind = image.get_data_dtype()
    if kind.kind not in "biuf":
        raise ValueError(f"it holds {'complex values' if kind.kind == 'c' else 'colours'}, expected real numbers")


class LoadModalitiesd(MapTransform):
    """Load the modalities of a subject into one image whose channel is all zero where a modality is missing.

    The image has the grid of the first modality that is there; another one's grid may differ only with ``resample``.

    Args:
        keys: the entries to load: a list of a file for each modality, ``None`` for a missing one; one file, of a single
            modality or, where ``lone`` is ``None``, 4D with a volume for each, all zero for a missing one; or, from a host
            that reads the files itself, the image ``(D, H, W)`` or ``(C, D, H, W)`` in memory, its affine in a MetaTensor.
        modalities: the channels' names, in order.
        name_key: an entry that gives the output's name where file names would collide; optional in the data.
        lone: which modality a file is that comes alone; if ``None`` the one its name tells, see
            :func:`memnet.workflow.scans.tell_modality`.
        resample: resample modalities of other grids by the affines, trilinearly, rather than refuse them.
        strip_background: shift each modality so that its constant background is 0 and nothing is less, see
            :func:`memnet.transforms.intensity.zero_background`.
        shown: the modality to draw label maps over; its file is the metadata's ``shown``, unless it is missing or has
            another grid.

    Raises:
        ValueError: naming the file or the entry that cannot be used; see :func:`read_volume`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        modalities: Sequence[str] = MODALITIES,
        name_key: str = "output_name",
        lone: str | None = "T1",
        resample: bool = True,
        strip_background: bool = False,
        shown: str | None = None,
    ) -> None:
        super().__init__(keys)
        self.modalities = tuple(modalities)
        for name in (lone, shown):
            if name is not None and name not in self.modalities:
                raise ValueError(f"modality is {name!r}, expected one of {', '.join(self.modalities)}")
        self.name_key, self.lone, self.resample, self.shown = name_key, lone, resample, shown
        self.strip_background = strip_background

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the files by a ``(n_modalities, D, H, W)`` image."""
        d = dict(data)
        for key in self.key_iterator(d):
            entry = d[key]
            in_memory = isinstance(entry, (np.ndarray, torch.Tensor))
            d[key] = self._join(self._split(entry) if in_memory else self._read(entry))
            if self.name_key in d:
                d[key].meta["output_name"] = d[self.name_key]
        return d

    def _read(self, entry: Any) -> list[MetaTensor | None]:
        paths = [entry] if isinstance(entry, (str, Path)) else list(entry)
        n_modalities, names = len(self.modalities), ", ".join(self.modalities)
        if len(paths) not in (1, n_modalities) or all(p is None for p in paths):
            raise ValueError(f"{entry!r}: expected one file or {n_modalities} ({names}, null for a missing one)")
        in_one_file = volumes_of(paths[0], n_modalities) if len(paths) == 1 and self.lone is None else []
        if in_one_file:
            return self._without_empty(paths[0], [read_volume(path, constant=True) for path in in_one_file])
        volumes = [None if path is None else read_volume(path) for path in paths]
        return volumes if len(paths) == n_modalities else self._place(volumes[0], paths[0])

    def _split(self, image: np.ndarray | torch.Tensor) -> list[MetaTensor | None]:
        """Take the modalities out of an image in memory."""
        image = image if isinstance(image, MetaTensor) else MetaTensor(image)
        name, affine = image.meta.get("filename_or_obj", "image"), image.affine.double().numpy()
        channels = image.float().cpu().numpy()
        channels = channels[None] if channels.ndim == 3 else channels
        if channels.ndim != 4 or len(channels) not in (1, len(self.modalities)):
            expected = f"(D, H, W), or {len(self.modalities)} of them ({', '.join(self.modalities)})"
            raise ValueError(f"{name}: has shape {tuple(image.shape)}, expected {expected}")
        if len(channels) == 1:
            return self._place(_checked(name, channels[0], affine, False), name)
        return self._without_empty(name, [_checked(name, channel, affine, True) for channel in channels])

    def _place(self, volume: MetaTensor | None, name: Any) -> list[MetaTensor | None]:
        """Put a modality that comes alone in its place."""
        lone = self.lone or tell_modality(name, self.modalities)
        if lone is None:
            names = ", ".join(self.modalities)
            raise ValueError(f"{name}: which of {names} is it? Give --modality, or a list of {len(self.modalities)}")
        return [volume if name == lone else None for name in self.modalities]

    def _without_empty(self, name: Any, volumes: list[MetaTensor]) -> list[MetaTensor | None]:
        if not any(bool(volume.any()) for volume in volumes):
            raise ValueError(f"{name}: every voxel is 0; there is nothing to see in it")
        return [volume if bool(volume.any()) else None for volume in volumes]

    def _join(self, modalities: list[MetaTensor | None]) -> MetaTensor:
        volumes = {channel: volume for channel, volume in enumerate(modalities) if volume is not None}
        first = next(iter(volumes.values()))
        if not self.resample:
            require_one_grid([(v.meta["filename_or_obj"], grid_of(v)) for v in volumes.values()])
        image = torch.zeros(len(self.modalities), *first.shape[1:])
        for channel, volume in volumes.items():
            shifted = cast(MetaTensor, zero_background(volume)) if self.strip_background else volume
            image[channel] = _onto_grid(shifted, first)[0]
        meta = {k: v for k, v in first.meta.items() if k != "affine"}
        shown = volumes.get(self.modalities.index(self.shown)) if self.shown else None
        if shown is not None and same_grid(grid_of(shown), grid_of(first)):
            meta["shown"] = shown.meta["filename_or_obj"]
        return MetaTensor(image, affine=first.affine, meta=meta)


class LoadVolumed(MapTransform):
    """Load single 3D volumes, such as label maps, with the checks of :func:`read_volume`.

    Args:
        keys: the entries to load, a file each.
        grid_key: an image loaded before, on whose file's grid the volumes must be; ``None`` allows any grid.
        constant: see :func:`read_volume`.

    Raises:
        ValueError: naming the file that cannot be used.
    """

    def __init__(self, keys: KeysCollection, grid_key: str | None = None, constant: bool = False) -> None:
        super().__init__(keys)
        self.grid_key, self.constant = grid_key, constant

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the files by ``(1, D, H, W)`` volumes."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = read_volume(d[key], self.constant)
            if self.grid_key is not None:
                both = (d[self.grid_key], d[key])
                require_one_grid([(v.meta["filename_or_obj"], file_grid(v)) for v in both])
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
            channels = plain_tensor(image)
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

    Raises:
        ValueError: the voxels' sides, as the file has them, make a volume of nothing or of more than 2^28 voxels.
    """

    def __init__(self, keys: KeysCollection, spacing: float = 1.0) -> None:
        super().__init__(keys)
        self.side = spacing
        self.spacing = Spacing(pixdim=(spacing,) * 3, mode=GridSampleMode.BILINEAR, dtype=np.float32)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample."""
        d = dict(data)
        for key in self.key_iterator(d):
            _require_sensible_size(d[key], self.side)
            d[key] = self.spacing(d[key])
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample back to the original grid."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.spacing.inverse(d[key])
        return d


class RandDropModalityd(RandomizableTransform, MapTransform):
    """Set some of the present modalities to zero with some probability, never all.

    Which ones is drawn from all choices that leave one: of four 1 goes with 4, 2 with 6 and 3 with 4 chances in 14.

    Args:
        keys: the images, ``(C, D, H, W)``.
        prob: probability that modalities are dropped.
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
        """Drop channels."""
        d = dict(data)
        self.randomize()
        for key in self.key_iterator(d):
            present = [c for c in range(d[key].shape[0]) if bool((d[key][c] != 0).any())]
            if self._do_transform and len(present) > 1:
                choices = [c for n in range(1, len(present)) for c in combinations(present, n)]
                d[key] = d[key].clone()
                d[key][list(choices[int(self._choice * len(choices))])] = 0
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
    if same_grid(grid_of(volume), grid_of(reference)):
        return volume.as_tensor()
    resample = SpatialResample(mode=GridSampleMode.BILINEAR, padding_mode=GridSamplePadMode.ZEROS)
    moved = torch.as_tensor(resample(volume, dst_affine=reference.affine, spatial_size=reference.shape[1:]))
    if not bool((moved != 0).any()):
        names = f"{volume.meta['filename_or_obj']} and {reference.meta['filename_or_obj']}"
        raise ValueError(f"{names}: do not overlap in space according to their affines")
    return moved


def _require_sensible_size(image: MetaTensor, side: float) -> None:
    sides = np.linalg.norm(np.asarray(image.affine, dtype=np.float64)[:3, :3], axis=0)
    sizes = [n * of_file / side for n, of_file in zip(image.shape[1:], sides, strict=True)]
    if min(sizes) < 0.5 or float(np.prod(sizes)) > _MOST_VOXELS:
        told = " x ".join(f"{s:.3g}" for s in sides)
        raise ValueError(
            f"{image.meta.get('filename_or_obj', 'image')}: has voxels of {told} mm, so that at {side:g} mm it would have "
            f"{' x '.join(f'{size:.3g}' for size in sizes)} voxels; is its header right?"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
