"""The dictionary transform that loads raw data, or simulates them from magnitude images."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from memnet.datasets.raw_data import read_raw_data
from memnet.mri.fourier import kspace_to_image
from memnet.mri.simulated_scans import simulate_movie, simulate_volume
from memnet.transforms.volumes import require_real_numbers

__all__ = ["LoadKspaced", "fit_field_of_view"]

logger = logging.getLogger("memnet")

Data = Mapping[Hashable, Any]


class LoadKspaced(MapTransform):
    """Load raw data; the readout of a volume becomes slices, by an inverse Fourier transform.

    Files of raw data are read, see :func:`memnet.datasets.raw_data.read_raw_data`. From a NIfTI file of magnitudes fully sampled
    raw data are simulated, the same every time: of a volume with the first axis as the readout, or of the middle slice of a
    movie ``(x, y, slice, frame)``, or of the slice that the entry ``slice_index`` names. Of the first such file it is logged.

    Args:
        keys: entry with the file's name, which stays as it is.
        movie: whether a file holds the frames of a 2D slice, rather than a volume.
        n_coils: coils of simulated data.
        noise: noise of simulated data, see :func:`memnet.mri.simulated_scans.simulate_volume`.
        margin: air around the head or knee in simulated scans of a volume, voxels, see :func:`fit_field_of_view`; all that the
            file has if ``None``.

    Raises:
        ValueError: the file cannot be read or is of the other kind, naming it.
    """

    def __init__(
        self,
        keys: KeysCollection,
        movie: bool = False,
        n_coils: int = 8,
        noise: float = 0.01,
        margin: int | None = None,
    ) -> None:
        super().__init__(keys)
        self.movie, self.n_coils, self.noise, self.margin = movie, n_coils, noise, margin
        self._has_told = False

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Add ``kspace``, MetaTensor complex64 ``(coils, slices or frames, y, z)``, and ``mask``, bool ``(1, ...)``.

        A reference scan in the file is added as ``calibration``, complex64 ``(coils, slices, y, z)`` or ``(coils, 1, x, y)`` of
        a movie.
        """
        d = dict(data)
        path, slice_index, is_stack = Path(d[self.first_key(d)]), d.get("slice_index"), False
        if path.name.endswith((".nii", ".nii.gz")):
            kspace, mask, affine = self._simulate(path, slice_index)
        else:
            kspace, mask, affine, calibration, is_stack = self._read(path, slice_index)
            if calibration is not None:
                d["calibration"] = calibration
        is_simulated = path.name.endswith((".nii", ".nii.gz"))
        # is_stack: slices encoded one by one
        meta = {"filename_or_obj": str(path), "is_stack": is_stack, "is_simulated": is_simulated}
        d["kspace"] = MetaTensor(kspace, torch.from_numpy(affine), meta=meta)
        d["mask"] = mask
        return d

    def _read(
        self, path: Path, slice_index: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, torch.Tensor | None, bool]:
        raw = read_raw_data(path, slice_index)
        kspace, sampled = torch.from_numpy(raw.kspace), torch.from_numpy(raw.sampled)
        n_frames, n_z = kspace.shape[0], kspace.shape[4]
        if self.movie and (n_frames == 1 or n_z > 1):
            raise ValueError(
                f"{path}: holds {n_frames} frame and {n_z} steps along z; expected the frames of a 2D slice"
            )
        if not self.movie and (n_frames > 1 or n_z == 1):
            raise ValueError(f"{path}: holds {n_frames} frames and {n_z} steps along z; expected one 3D volume")
        calibration = None if raw.calibration is None else torch.from_numpy(raw.calibration)
        if self.movie:
            calibration = None if calibration is None else calibration[:, None, :, :, 0]
            movie = kspace[..., 0].movedim(0, 1).contiguous()
            mask = sampled[:, None] if raw.support is None else torch.from_numpy(raw.support)
            return movie, mask[None, ..., 0], raw.affine, calibration, False
        volume = kspace[0] if raw.is_stack else kspace_to_image(kspace[0], (1,))
        calibration = None if calibration is None else kspace_to_image(calibration, (1,))
        return volume, sampled[0][None, None], raw.affine, calibration, raw.is_stack

    def _simulate(self, path: Path, slice_index: int | None) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        try:
            image = nib.load(path)
            require_real_numbers(image)
            values = np.asarray(image.dataobj, dtype=np.float32)
        except (OSError, EOFError, zlib.error, nib.filebasedimages.ImageFileError, ValueError) as error:
            raise ValueError(f"{path}: not a NIfTI file, or damaged ({error})") from error
        while values.ndim > (4 if self.movie else 3) and values.shape[-1] == 1:
            values = values[..., 0]
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: holds values that are not finite numbers")
        if not (values > 0).any():
            raise ValueError(f"{path}: is nowhere above 0")
        if values.ndim != (4 if self.movie else 3):
            wanted = "a movie (x, y, slice, frame)" if self.movie else "a volume"
            raise ValueError(f"{path}: has the shape {values.shape}; expected {wanted}")
        self._tell(path, values.shape[2] if self.movie and slice_index is None else 1)
        affine = np.asarray(image.affine, dtype=float)
        seed = zlib.crc32(f"{path.name} {slice_index}".encode())
        if not self.movie:
            if self.margin is not None:
                values, affine = fit_field_of_view(values, affine, self.margin)
            kspace = simulate_volume(torch.from_numpy(values), self.n_coils, self.noise, seed)
            return kspace, torch.ones(1, 1, *kspace.shape[2:], dtype=torch.bool), affine
        index = values.shape[2] // 2 if slice_index is None else slice_index
        if not 0 <= index < values.shape[2]:
            raise ValueError(f"{path}: has no slice {index}, but slices 0 to {values.shape[2] - 1}")
        frames = torch.from_numpy(np.ascontiguousarray(values[:, :, index].transpose(2, 0, 1)))
        if not bool((frames > 0).any()):
            raise ValueError(f"{path}: its slice {index} is nowhere above 0")
        kspace = simulate_movie(frames, self.n_coils, self.noise, seed)
        affine[:3, 3] += affine[:3, 2] * index
        return kspace, torch.ones(1, kspace.shape[1], 1, kspace.shape[3], dtype=torch.bool), affine

    def _tell(self, path: Path, n_slices: int) -> None:
        """Say, of the first file, that what comes of it is no scan."""
        if not self._has_told:
            part = f" of slice {n_slices // 2}, 0 to {n_slices - 1} being there," if n_slices > 1 else ""
            logger.info(
                "%s: holds magnitudes; raw data%s are simulated from them, fully sampled, with %d coils and noise of %g",
                path,
                part,
                self.n_coils,
                self.noise,
            )
        self._has_told = True


def fit_field_of_view(magnitude: np.ndarray, affine: np.ndarray, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a volume to what is above 0, as a scan is planned: k-space of air costs time and says nothing.

    Args:
        magnitude: ``(x, y, z)``, somewhere above 0.
        affine: ``(4, 4)``, mm.
        margin: air on each side, voxels; sides grow to the next multiple of 8, and no side beyond the volume.

    Returns:
        The part of the volume, and its affine.
    """
    part, origin = [], []
    for axis, n in enumerate(magnitude.shape):
        there = np.flatnonzero((magnitude > 0).any(tuple({0, 1, 2} - {axis})))
        side = min(n, -(-(there[-1] - there[0] + 1 + 2 * margin) // 8) * 8)
        start = min(max(0, (there[0] + there[-1] + 1 - side) // 2), n - side)
        part.append(slice(start, start + side))
        origin.append(start)
    placed = affine.copy()
    placed[:3, 3] += affine[:3, :3] @ origin
    return np.ascontiguousarray(magnitude[tuple(part)]), placed
