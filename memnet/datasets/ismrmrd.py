"""Reads Cartesian raw data in ISMRMRD, the format of mridata.org and OCMR."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import prod
from pathlib import Path

import h5py
import numpy as np

from memnet.datasets.ismrmrd_header import Encoding, read_encoding

__all__ = ["RawData", "check_samples", "crop_field_of_view", "read_ismrmrd", "slices_of_ismrmrd"]

logger = logging.getLogger("memnet")

_MOST_COILS = 256  # twice those of the largest arrays that are built
_WHOLE = 0.98  # of the samples of readouts: one at an end may be missing
_MOST_UNDERSAMPLED = 256  # times as many samples in the matrix as in the file
# readouts that are no image data: noise, navigators, phase correction, feedback, dummies, surface coil correction
_NOT_IMAGE = sum(1 << (flag - 1) for flag in (19, 23, 24, 26, 27, 28, 29, 30, 31))
_CALIBRATION_ALONE = 1 << (20 - 1)
_REVERSED = 1 << (22 - 1)


@dataclass(frozen=True)
class RawData:
    """Cartesian k-space with what an image needs to be placed in space.

    Attributes:
        kspace: complex64 ``(frames, coils, x, y, z)``, x along the readout; zero where nothing was sampled; the zero
            frequency lies at index ``n // 2``.
        sampled: bool ``(frames, y, z)``.
        affine: of the image ``(x, y, z)``, ``(4, 4)``, mm, RAS+.
        is_stack: whether x counts the slices of a 2D scan, which need no transform, rather than samples of the readout.
        calibration: complex64 ``(coils, x, y, z)``, a reference scan of its own that coil maps may come of, zero where nothing
            was sampled; ``None`` where there is none.
        support: bool ``(frames, x, y, z)``, which samples of the readouts were taken; ``None`` where they are whole.
    """

    kspace: np.ndarray
    sampled: np.ndarray
    affine: np.ndarray
    is_stack: bool = False
    calibration: np.ndarray | None = None
    support: np.ndarray | None = None


def read_ismrmrd(path: str | Path, slice_index: int | None = None) -> RawData:
    """Read an ISMRMRD file of one Cartesian 3D volume, or of the frames of a 2D slice.

    Readouts of the same place, as averages, are averaged. Cardiac phases, or else repetitions, are the frames. Of several
    contrasts or sets, and of repetitions of cardiac phases, the first is taken. Readout oversampling is removed, and so is what
    the header's limits leave of the matrix on both sides. Calibration lines are part of the image, unless they are a scan of
    their own. Noise scans, navigators and their like are left out.

    Args:
        path: the ``.h5`` file.
        slice_index: which slice of several; the middle one if ``None``.

    Returns:
        The data.

    Raises:
        ValueError: the file is missing, damaged, no ISMRMRD, not Cartesian, lacks header fields, holds samples that are not
            finite or coils that are all zero, or has no such slice.

    References:
        ISMRM Raw data format: a proposed standard for MRI raw datasets (Inati et al., 2017),
        https://doi.org/10.1002/mrm.26089
    """
    path = Path(path)
    xml, heads, data = _read_hdf5(path)
    chosen = (heads["flags"] & np.uint64(_NOT_IMAGE)) == 0
    if not chosen.any():
        raise ValueError(f"{path}: holds no readout of image data")
    space = _space_of_image(heads, chosen)
    chosen &= heads["encoding_space_ref"] == space
    encoding = read_encoding(path, xml, space)
    matrix, fov = encoding.matrix, encoding.fov
    for name in ("contrast", "set"):
        chosen &= _first(path, heads["idx"], chosen, name)
    chosen &= _of_slice(path, heads["idx"]["slice"], chosen, slice_index)
    if len(np.unique(heads["idx"]["phase"][chosen])) > 1:
        chosen &= _first(path, heads["idx"], chosen, "repetition")
    heads, data = heads[chosen], data[chosen]
    is_reference = (heads["flags"] & np.uint64(_CALIBRATION_ALONE)) != 0
    if not encoding.separate:
        is_reference[:] = False
    reference, heads, data = (heads[is_reference], data[is_reference]), heads[~is_reference], data[~is_reference]
    if not len(heads):
        raise ValueError(f"{path}: holds no readout of image data")
    frames = _frames(heads["idx"])
    for name, values, n in zip("yz", _places(heads, encoding), matrix[1:], strict=True):
        if values.min() < 0 or values.max() >= n:
            raise ValueError(
                f"{path}: phase encoding along {name} reaches from {values.min()} to {values.max()} where its header has "
                f"{n} steps; is the order of the dimensions another one?"
            )
    n_coils = int(heads["active_channels"][0])
    if (heads["active_channels"] != n_coils).any():
        raise ValueError(f"{path}: the number of coils changes between readouts")
    n_wanted = int(frames.max() + 1) * n_coils * prod(matrix)
    n_there = int(heads["number_of_samples"].astype(np.int64).sum()) * n_coils
    if not 0 < n_wanted <= _MOST_UNDERSAMPLED * n_there:
        raise ValueError(
            f"{path}: holds {n_there} samples, its header a matrix of {matrix} for {n_coils} coils and {frames.max() + 1} "
            "frames; is it damaged?"
        )
    kspace, sampled, support = _gridded(path, heads, data, frames, encoding)
    check_samples(path, kspace, 1)
    calibration = _calibration(path, *reference, n_coils, encoding)
    wanted = round(matrix[0] * encoding.recon_fov_x / fov[0])
    if 0 < wanted < matrix[0]:
        # the samples of the smaller field of view are those of the larger one that lie farther apart
        taken = np.rint((np.arange(wanted) - wanted // 2) * matrix[0] / wanted).astype(int) + matrix[0] // 2
        support = None if support is None else support[:, taken.clip(0, matrix[0] - 1)]
        kspace, fov[0] = crop_field_of_view(kspace, wanted, 2), encoding.recon_fov_x
        calibration = None if calibration is None else crop_field_of_view(calibration, wanted, 1)
    affine = _affine(path, heads[0], kspace.shape[2:], fov)
    return RawData(kspace, sampled, affine, calibration=calibration, support=support)


def slices_of_ismrmrd(path: str | Path) -> list[int]:
    """Return which slices of the image a file has, those that :func:`read_ismrmrd` takes.

    Raises:
        ValueError: the file is damaged, or no ISMRMRD.
    """
    try:
        with h5py.File(path, "r") as file:
            heads = file["dataset/data"].fields("head")[()]
        chosen = (heads["flags"] & np.uint64(_NOT_IMAGE | _CALIBRATION_ALONE)) == 0
        if not chosen.any():
            return []
        chosen &= heads["encoding_space_ref"] == _space_of_image(heads, chosen)
        return [int(number) for number in np.unique(heads["idx"]["slice"][chosen])]
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no ISMRMRD file, or damaged ({error})") from error


def check_samples(path: Path, kspace: np.ndarray, coil_axis: int) -> None:
    """Refuse samples that are not finite, coils that are all zero, and more coils than there are in the world.

    Args:
        path: the file, for the error.
        kspace: complex, of any shape.
        coil_axis: which dimension is the coils.

    Raises:
        ValueError: naming the file.
    """
    if not np.isfinite(kspace).all():
        raise ValueError(f"{path}: holds samples that are not finite numbers")
    n_coils = kspace.shape[coil_axis]
    if n_coils > _MOST_COILS:
        raise ValueError(f"{path}: has {n_coils} values along its coils; is the order of the dimensions another one?")
    dead = np.flatnonzero(~(kspace != 0).any(tuple(a for a in range(kspace.ndim) if a != coil_axis)))
    if len(dead):
        raise ValueError(f"{path}: coil {dead[0]} of {n_coils} is zero throughout; leave it out of the file")


def crop_field_of_view(kspace: np.ndarray, wanted: int, axis: int) -> np.ndarray:
    """Cut the field of view along an encoded dimension to its central part.

    Args:
        kspace: complex, of any shape.
        wanted: samples that are left.
        axis: the dimension.

    Returns:
        Complex64.
    """
    shifted = np.fft.ifftshift(kspace, axis)
    image = np.fft.fftshift(np.fft.ifft(shifted, axis=axis, norm="ortho"), axis)
    start = kspace.shape[axis] // 2 - wanted // 2
    image = np.fft.ifftshift(np.take(image, range(start, start + wanted), axis), axis)
    return np.fft.fftshift(np.fft.fft(image, axis=axis, norm="ortho"), axis).astype(np.complex64)


def _read_hdf5(path: Path) -> tuple[bytes, np.ndarray, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            if "dataset" not in file or not {"xml", "data"} <= set(file["dataset"]):
                raise ValueError(
                    f"{path}: an HDF5 file, but no ISMRMRD (it has {', '.join(file) or 'nothing'}, expected dataset/xml and "
                    "dataset/data)"
                )
            xml, rows = np.ravel(file["dataset/xml"][()])[0], file["dataset/data"][()]
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an HDF5 file, or damaged ({error})") from error
    if rows.dtype.names is None or not {"head", "data"} <= set(rows.dtype.names):
        raise ValueError(f"{path}: dataset/data holds no ISMRMRD readouts")
    return xml if isinstance(xml, bytes) else str(xml).encode(), rows["head"], rows["data"]


def _space_of_image(heads: np.ndarray, chosen: np.ndarray) -> int:
    """Return the image's encoding space: a reference scan may have another one, and more readouts than the image."""
    of_image = chosen & ((heads["flags"] & np.uint64(_CALIBRATION_ALONE)) == 0)
    return int(np.bincount(heads["encoding_space_ref"][of_image if of_image.any() else chosen]).argmax())


def _first(path: Path, counters: np.ndarray, chosen: np.ndarray, name: str) -> np.ndarray:
    values = np.unique(counters[name][chosen])
    if len(values) > 1:
        logger.warning("%s: has %d values of %s, the first is taken", path, len(values), name)
    return counters[name] == values[0] if len(values) else chosen


def _of_slice(path: Path, slices: np.ndarray, chosen: np.ndarray, index: int | None) -> np.ndarray:
    there = np.unique(slices[chosen])
    if index is None:
        index = int(there[len(there) // 2]) if len(there) else 0
        if len(there) > 1:
            logger.warning("%s: has %d slices, slice %d is taken", path, len(there), index)
    elif len(there) and index not in there:
        raise ValueError(f"{path}: has no slice {index}; its slices are {', '.join(map(str, there))}")
    return slices == index


def _frames(counters: np.ndarray) -> np.ndarray:
    """Return the frame of each readout, counted from 0; counters may begin late and leave some out."""
    has_phases = len(np.unique(counters["phase"])) > 1
    return np.unique(counters["phase" if has_phases else "repetition"], return_inverse=True)[1]


def _places(heads: np.ndarray, encoding: Encoding) -> list[np.ndarray]:
    """Return where the readouts lie along y and z, the zero frequency being at index ``n // 2``."""
    return [
        heads["idx"][f"kspace_encode_step_{i}"].astype(int) - centre + n // 2
        for i, centre, n in zip((1, 2), encoding.centres, encoding.matrix[1:], strict=True)
    ]


def _gridded(
    path: Path, heads: np.ndarray, data: np.ndarray, frames: np.ndarray, encoding: Encoding
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return k-space ``(frames, coils, x, y, z)``, averaged where readouts repeat, and what was sampled, ``(frames, y, z)``.

    And which samples were, ``(frames, x, y, z)``, or ``None`` where all readouts are whole.
    """
    n_coils, (n_x, *steps) = int(heads["active_channels"][0]), encoding.matrix
    kspace = np.zeros((frames.max() + 1, *steps, n_coils, n_x), dtype=np.complex64)
    count = np.zeros(kspace.shape[:3], dtype=np.uint16)
    signs = [
        1 - 2 * (heads["idx"][f"kspace_encode_step_{i}"] % 2 * encoding.chopped[i - 1]).astype(int) for i in (1, 2)
    ]
    places = zip(frames, *_places(heads, encoding), signs[0] * signs[1], strict=True)
    support = np.zeros((*kspace.shape[:3], n_x), dtype=bool)
    for head, values, (frame, y, z, sign) in zip(heads, data, places, strict=True):
        readout, taken = _readout(path, head, values, n_coils, n_x, encoding.has_pilot_tone)
        kspace[frame, y, z] += sign * readout
        support[frame, y, z, taken] = True
        count[frame, y, z] += 1
    kspace /= np.maximum(count, 1)[..., None, None]
    sampled = count > 0
    is_whole = support[sampled].mean() >= _WHOLE
    return (
        np.ascontiguousarray(kspace.transpose(0, 3, 4, 1, 2)),
        sampled,
        None if is_whole else np.ascontiguousarray(support.transpose(0, 3, 1, 2)),
    )


def _calibration(
    path: Path, heads: np.ndarray, data: np.ndarray, n_coils: int, encoding: Encoding
) -> np.ndarray | None:
    """Return the k-space of a reference scan, as far as it lies in the image's, or ``None`` where there is none."""
    inside = heads["active_channels"] == n_coils
    for place, n in zip(_places(heads, encoding), encoding.matrix[1:], strict=True):
        inside &= (place >= 0) & (place < n)
    if not inside.any():
        return None
    kspace = _gridded(path, heads[inside], data[inside], np.zeros(int(inside.sum()), dtype=int), encoding)[0][0]
    if not np.isfinite(kspace).all():
        raise ValueError(f"{path}: holds samples that are not finite numbers")
    return kspace


def _readout(
    path: Path, head: np.void, values: np.ndarray, n_coils: int, n: int, has_pilot_tone: bool
) -> tuple[np.ndarray, slice]:
    """Return the samples ``(coils, n)`` of one readout with its centre at index ``n // 2``, and which of them it took."""
    n_samples = int(head["number_of_samples"])
    if len(values) != 2 * n_coils * n_samples:
        raise ValueError(
            f"{path}: a readout holds {len(values)} numbers, expected {2 * n_coils * n_samples} of {n_coils} coils and "
            f"{n_samples} complex samples"
        )
    samples = np.ascontiguousarray(values).view(np.complex64).reshape(n_coils, n_samples)
    if has_pilot_tone:
        samples = samples.copy()
        samples[:, [0, 1, 2, -1]] = 0
    centre = int(head["center_sample"]) or n_samples // 2  # 0 says nothing: no image begins at its centre
    unused = int(head["discard_pre"]), int(head["discard_post"])  # as they were acquired
    if int(head["flags"]) & _REVERSED:
        samples, centre, unused = samples[:, ::-1], n_samples - 1 - centre, unused[::-1]
    taken = slice(unused[0], n_samples - unused[1])
    start = n // 2 - centre + taken.start
    samples = samples[:, taken]
    # the centre of an even number of samples lies on either side of its middle, and reversal takes it to the other
    before, behind = max(0, -start), max(0, start + samples.shape[1] - n)
    samples, start = samples[:, before : samples.shape[1] - behind], start + before
    if before + behind > 1:
        raise ValueError(
            f"{path}: a readout of {n_samples} samples with its centre at {centre} does not fit the {n} of the header; is the "
            "order of the dimensions another one?"
        )
    readout = np.zeros((n_coils, n), dtype=np.complex64)
    taken = slice(start, start + samples.shape[1])
    readout[:, taken] = samples
    return readout, taken


def _affine(path: Path, head: np.void, matrix: tuple[int, ...], fov: list[float]) -> np.ndarray:
    """Return the affine, RAS+, of the image whose voxel ``n // 2`` lies at the header's position."""
    axes = np.stack([head[name] for name in ("read_dir", "phase_dir", "slice_dir")], 1).astype(float)
    affine = np.eye(4)
    if not np.isfinite(axes).all() or abs(np.linalg.det(axes)) < 0.5:
        logger.warning("%s: has no directions of the axes; the image gets those of the scanner", path)
        axes = np.eye(3)
    affine[:3, :3] = axes * (np.array(fov) / matrix)
    affine[:3, 3] = head["position"] - affine[:3, :3] @ [n // 2 for n in matrix]
    return np.diag([-1.0, -1, 1, 1]) @ affine
