"""Loads MRI modalities as the channels of one image, and leaves some out in training."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandGaussianNoised, RandomizableTransform, SpatialResample
from monai.utils import GridSampleMode, GridSamplePadMode

from memnet.dicom import split_uid
from memnet.transforms.grids import grid_of, require_one_grid, same_grid, smoothed
from memnet.transforms.intensity import zero_background
from memnet.transforms.volumes import check_volume, read_volume
from memnet.workflow.scans import tell_modality, volumes_of

__all__ = ["LoadModalitiesd", "RandDropModalityd", "RandNoiseModalitiesd"]

logger = logging.getLogger("memnet")

MODALITIES = ("T1", "T2")


class LoadModalitiesd(MapTransform):
    """Load the modalities of a subject into one image whose channel is all zero where a modality is missing.

    The image has the grid of the first modality that is there; another one's grid may differ only with ``resample``. The
    metadata is the first one's, and ``beside`` has the names of the others' files.

    Args:
        keys: the entries to load: a list of a file for each modality, ``None`` for a missing one; one file, of a single
            modality or, where ``lone`` is ``None``, 4D with a volume for each, all zero for a missing one; or, from a host
            that reads the files itself, the image ``(D, H, W)`` or ``(C, D, H, W)`` in memory, its affine in a MetaTensor.
        modalities: the channels' names, in order.
        name_key: an entry that gives the output's name where file names would collide; optional in the data.
        lone: which modality a file is that comes alone and whose name does not tell, see
            :func:`memnet.workflow.scans.tell_modality`; such a file is refused if ``None``.
        resample: resample modalities of other grids by the affines, trilinearly, rather than refuse them; of smaller voxels
            smoothed, see :func:`memnet.transforms.grids.smoothed`.
        strip_background: shift each modality so that its constant background is 0 and nothing is less, see
            :func:`memnet.transforms.intensity.zero_background`.
        shown: the modality to draw label maps over; its file is the metadata's ``shown``, unless it is missing or has
            another grid.

    Raises:
        ValueError: naming the file or the entry that cannot be used; see :func:`memnet.transforms.volumes.read_volume`.
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
            return self._place(check_volume(name, channels[0], affine, False), name)
        return self._without_empty(name, [check_volume(name, channel, affine, True) for channel in channels])

    def _place(self, volume: MetaTensor | None, name: Any) -> list[MetaTensor | None]:
        """Put a modality that comes alone in its place."""
        lone = tell_modality(name, self.modalities) or self.lone
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
        if meta.get("space_code") == 0:
            _warn_of_guessed_orientation(str(meta["filename_or_obj"]))
        names = [_file_name(v.meta["filename_or_obj"]) for v in volumes.values()]
        meta["beside"] = ", ".join(sorted({*names} - {names[0]}))
        shown = volumes.get(self.modalities.index(self.shown)) if self.shown else None
        if shown is not None and same_grid(grid_of(shown), grid_of(first)):
            meta["shown"] = shown.meta["filename_or_obj"]
        return MetaTensor(image, affine=first.affine, meta=meta)


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


class RandNoiseModalitiesd(RandGaussianNoised):
    """MONAI's Gaussian noise, in the modalities that are there; a missing (all-zero) one stays zero.

    Args:
        arguments: those of :class:`monai.transforms.RandGaussianNoised`; images are ``(C, D, H, W)``.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add noise."""
        missing = {key: ~(data[key] != 0).flatten(1).any(1) for key in self.key_iterator(dict(data))}
        d = cast(dict[Hashable, Any], super().__call__(data))
        for key, channels in missing.items():
            if bool(channels.any()):
                d[key] = d[key].clone()
                d[key][channels] = 0
        return d


@cache
def _warn_of_guessed_orientation(path: str) -> None:
    logger.warning(
        "%s: its header tells no orientation (sform_code and qform_code are 0); left and right, front and back are a guess",
        path,
    )


def _file_name(path: Any) -> str:
    """Return the name of a file, or of a folder of DICOM and which of its series was read."""
    file, uid = split_uid(path)
    return f"{file.name}:{uid}" if uid and file.is_dir() else file.name


def _onto_grid(volume: MetaTensor, reference: MetaTensor) -> torch.Tensor:
    if same_grid(grid_of(volume), grid_of(reference)):
        return volume.as_tensor()
    resample = SpatialResample(mode=GridSampleMode.BILINEAR, padding_mode=GridSamplePadMode.ZEROS)
    volume = smoothed(volume, np.asarray(reference.affine))
    moved = torch.as_tensor(resample(volume, dst_affine=reference.affine, spatial_size=reference.shape[1:]))
    if not bool((moved != 0).any()):
        names = f"{volume.meta['filename_or_obj']} and {reference.meta['filename_or_obj']}"
        raise ValueError(f"{names}: do not overlap in space according to their affines")
    return moved
