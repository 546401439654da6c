"""Reads Cartesian raw data in the formats that they are distributed in: ISMRMRD, fastMRI, CMRxRecon, BART."""

from __future__ import annotations

import logging
from pathlib import Path
from xml.etree import ElementTree

import h5py
import numpy as np
from monai.apps.reconstruction.fastmri_reader import FastMRIReader

from memnet.datasets.bart import read_cfl
from memnet.datasets.ismrmrd import RawData, check_samples, crop_field_of_view, read_ismrmrd, slices_of_ismrmrd

__all__ = ["read_bart", "read_cmrxrecon", "read_fastmri", "read_raw_data", "slices_of"]

logger = logging.getLogger("memnet")

_NAMESPACE = "{http://www.ismrm.org/ISMRMRD}"
_BART_DIMENSIONS = (0, 1, 2, 3, 10)  # x, y, z, coils, time
_LEAST_TAKEN = 0.75  # of the samples of readouts without a mask in the plane
_NO_GEOMETRY = "%s: says nothing of voxels and axes; the image gets voxels of 1 mm and the axes of the scanner"


def read_raw_data(path: str | Path, slice_index: int | None = None) -> RawData:
    """Read raw data of any format that is known, by the file's suffix and content.

    Args:
        path: ISMRMRD or fastMRI (``.h5``), CMRxRecon (``.mat``), or BART (``.cfl`` beside its ``.hdr``).
        slice_index: which slice of a movie's file that has several; the middle one if ``None``.

    Returns:
        The data; their affine is the scanner's axes where the format has none.

    Raises:
        ValueError: the file is missing, damaged, of no known format, of the wrong order of dimensions, holds samples that are
            not finite or coils that are all zero, or has no such slice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".cfl":
        return read_bart(path)
    if path.suffix == ".mat":
        return read_cmrxrecon(path, slice_index)
    if "kspace" in _names(path):
        return read_fastmri(path)
    return read_ismrmrd(path, slice_index)


def read_fastmri(path: str | Path) -> RawData:
    """Read the slices of a fastMRI file by MONAI's reader; readout oversampling is removed.

    Args:
        path: the ``.h5`` file, of several coils or one.

    Returns:
        The slices as :attr:`RawData.is_stack`.

    Raises:
        ValueError: see :func:`read_raw_data`.

    References:
        fastMRI: an open dataset and benchmarks for accelerated MRI (Zbontar et al., 2018), https://arxiv.org/abs/1811.08839
    """
    path = Path(path)
    try:
        content = FastMRIReader().read(path)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path}: not a fastMRI file, or damaged ({error})") from error
    slices = np.asarray(content["kspace"])
    if slices.ndim == 3:
        slices = slices[:, None]
    if slices.ndim != 4 or not np.iscomplexobj(slices):
        raise ValueError(
            f"{path}: its kspace is {slices.dtype} of the shape {slices.shape}; expected complex (slices, coils, x, y)"
        )
    # (slices, coils, x, y) to (1, coils, slices, x, y)
    kspace = np.ascontiguousarray(slices.transpose(1, 0, 2, 3)[None], dtype=np.complex64)
    check_samples(path, kspace, 1)
    lines = _fastmri_lines(path, content.get("mask"), kspace)
    kspace *= lines
    voxel, share = _fastmri_header(path, content.get("ismrmrd_header"), kspace.shape)
    if share < 1:
        kspace = crop_field_of_view(kspace, round(share * kspace.shape[3]), 3)
    sampled = np.broadcast_to(lines, (1, *kspace.shape[3:])).copy()
    return RawData(kspace, sampled, _centred(np.diag([*voxel, 1.0]), kspace.shape), True)


def read_cmrxrecon(path: str | Path, slice_index: int | None = None) -> RawData:
    """Read one slice of a CMRxRecon cine, ``kspace_full``, ``kspace_sub04`` or ``kus`` of ``(x, y, coils, slices, frames)``.

    ``kspace_single_full`` and its like have one coil and no dimension for it.

    Args:
        path: the ``.mat`` file, version 7.3.
        slice_index: see :func:`read_raw_data`.

    Returns:
        The frames.

    Raises:
        ValueError: see :func:`read_raw_data`.

    References:
        CMRxRecon: an open cardiac MRI dataset for the competition of accelerated image reconstruction (Wang et al., 2023),
        https://arxiv.org/abs/2309.10836
    """
    path = Path(path)
    names = [name for name in _names(path) if name.startswith("kspace") or name == "kus"]
    if len(names) != 1:
        raise ValueError(f"{path}: expected one variable kspace_... or kus, got {', '.join(_names(path)) or 'none'}")
    one_coil = "_single_" in names[0]
    try:
        with h5py.File(path, "r") as file:
            data = file[names[0]]
            # h5py counts MATLAB's dimensions from the last
            if data.ndim != 5 - one_coil or data.dtype.names != ("real", "imag"):
                raise ValueError(
                    f"{path}: {names[0]} is {data.dtype} of the shape {data.shape[::-1]}; expected complex (x, y, "
                    f"{'' if one_coil else 'coils, '}slices, frames)"
                )
            n_slices = data.shape[1]
            index = n_slices // 2 if slice_index is None else slice_index
            if slice_index is None and n_slices > 1:
                logger.warning("%s: has %d slices, slice %d is taken", path, n_slices, index)
            if not 0 <= index < n_slices:
                raise ValueError(f"{path}: has no slice {index}, but slices 0 to {n_slices - 1}")
            parts = data[:, index][:, None] if one_coil else data[:, index]
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    # (frames, coils, y, x) to (frames, coils, x, y, 1)
    kspace = (parts["real"] + 1j * parts["imag"]).astype(np.complex64).transpose(0, 1, 3, 2)[..., None]
    check_samples(path, kspace, 1)
    logger.warning(_NO_GEOMETRY, path)
    sampled = (kspace != 0).any((1, 2))
    support = _support(kspace, sampled)
    return RawData(np.ascontiguousarray(kspace), sampled, _centred(np.eye(4), kspace.shape), support=support)


def read_bart(path: str | Path) -> RawData:
    """Read k-space of BART: a volume ``(x, y, z, coils)``, or frames along dimension 10.

    Args:
        path: see :func:`memnet.datasets.bart.read_cfl`.

    Returns:
        The data; x is the readout.

    Raises:
        ValueError: see :func:`read_raw_data`.
    """
    path = Path(path)
    values = read_cfl(path)
    values = values.reshape(*values.shape, *[1] * max(0, 11 - values.ndim), order="F")
    other = [d for d in range(values.ndim) if d not in _BART_DIMENSIONS and values.shape[d] > 1]
    if other:
        raise ValueError(
            f"{path}: has {values.shape[other[0]]} values along BART's dimension {other[0]}; expected x, y, z, coils (3) and "
            "frames (10) alone"
        )
    # what is between is of size 1
    five = values.reshape([values.shape[d] for d in _BART_DIMENSIONS], order="F")
    kspace = np.ascontiguousarray(five.transpose(4, 3, 0, 1, 2))
    check_samples(path, kspace, 1)
    logger.warning(_NO_GEOMETRY, path)
    sampled = (kspace != 0).any((1, 2))
    support = _support(kspace, sampled)
    if support is not None and kspace.shape[4] > 1:
        raise ValueError(
            f"{path}: of its readouts along x samples are missing in between; a volume is undersampled along y and z"
        )
    return RawData(kspace, sampled, _centred(np.eye(4), kspace.shape), support=support)


def slices_of(path: str | Path) -> list[int]:
    """Return which slices a file of movies has, those that :func:`read_raw_data` takes as ``slice_index``.

    Args:
        path: see :func:`read_raw_data`; what of the file is damaged otherwise is not looked at.

    Returns:
        Their numbers; none of a format that holds one slice a file.

    Raises:
        ValueError: the file is no HDF5, or damaged.
    """
    path = Path(path)
    if path.suffix == ".mat":
        names = [name for name in _names(path) if name.startswith("kspace") or name == "kus"]
        with h5py.File(path, "r") as file:
            shape: tuple[int, ...] = tuple(file[names[0]].shape) if len(names) == 1 else ()
        return list(range(shape[1])) if len(shape) > 3 else []
    if path.suffix != ".h5" or "dataset" not in _names(path):
        return []
    return slices_of_ismrmrd(path)


def _support(kspace: np.ndarray, sampled: np.ndarray) -> np.ndarray | None:
    """Tell which samples of readouts were taken where a mask in the plane leaves some out, of formats that do not say.

    Args:
        kspace: complex ``(frames, coils, x, y, z)``, zero where nothing was sampled.
        sampled: bool ``(frames, y, z)``.

    Returns:
        Bool ``(frames, x, y, z)``; ``None`` where few samples are zero, as some are by chance, or at the ends of all readouts
        alike, as where these are padded.
    """
    support = (kspace != 0).any(1)
    lines = np.broadcast_to(sampled[:, None], support.shape)
    if support.sum() >= _LEAST_TAKEN * lines.sum():
        return None
    common = np.flatnonzero(support.any((0, 2, 3)))
    within = support[:, common[0] : common[-1] + 1], lines[:, common[0] : common[-1] + 1]
    return None if within[0].sum() >= _LEAST_TAKEN * within[1].sum() else support


def _names(path: Path) -> list[str]:
    try:
        with h5py.File(path, "r") as file:
            return list(file)
    except (OSError, RuntimeError) as error:
        hint = "; a .mat file must be saved as version 7.3" if path.suffix == ".mat" else ""
        raise ValueError(f"{path}: not an HDF5 file, or damaged ({error}){hint}") from error


def _fastmri_lines(path: Path, mask: np.ndarray | None, kspace: np.ndarray) -> np.ndarray:
    """Return which lines along y were sampled, bool ``(y,)``: those that hold something, and that the file's mask names."""
    lines = (kspace != 0).any((0, 1, 2, 3))
    if mask is None:
        return lines
    mask = np.squeeze(mask)
    if np.shape(mask) != lines.shape:
        raise ValueError(
            f"{path}: its mask has the shape {np.shape(mask)}, its kspace {len(lines)} lines ({kspace.shape[2]} slices, "
            f"{kspace.shape[1]} coils, {kspace.shape[3]} x {len(lines)} samples); expected a mask of {lines.shape}"
        )
    return lines & (mask != 0)


def _fastmri_header(path: Path, xml: bytes | None, shape: tuple[int, ...]) -> tuple[list[float], float]:
    """Return the sides of a voxel along slices, x and y, mm, and the share of the readout's field of view that is wanted."""
    try:
        encoding = ElementTree.fromstring(xml or b"").find(f"{_NAMESPACE}encoding")

        def field_of_view(space: str, axis: str) -> float:
            names = (space, "fieldOfView_mm", axis)
            return float("" if encoding is None else encoding.findtext("/".join(_NAMESPACE + n for n in names)) or "")

        x, y = (field_of_view("encodedSpace", axis) for axis in "xy")
        thickness, wanted = field_of_view("reconSpace", "z"), field_of_view("reconSpace", "x")
    except (ElementTree.ParseError, ValueError):
        logger.warning("%s: its header says nothing of voxels; the image gets voxels of 1 mm", path)
        return [1.0, 1.0, 1.0], 1.0
    return [thickness, x / shape[3], y / shape[4]], min(1.0, wanted / x)


def _centred(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the affine that puts the voxel ``n // 2`` at the origin."""
    affine[:3, 3] = -affine[:3, :3] @ [n // 2 for n in shape[2:]]
    return affine
