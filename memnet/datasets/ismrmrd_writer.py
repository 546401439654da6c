"""Writes Cartesian raw data as ISMRMRD."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import h5py
import numpy as np

from memnet.whole_files import whole_file

__all__ = ["write_ismrmrd"]

_COUNTERS = "kspace_encode_step_1 kspace_encode_step_2 average slice contrast phase repetition set segment".split()
_INDEX = np.dtype([(name, "<u2") for name in _COUNTERS] + [("user", "<u2", 8)])
_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("flags", "<u8"),
        ("measurement_uid", "<u4"),
        ("scan_counter", "<u4"),
        ("acquisition_time_stamp", "<u4"),
        ("physiology_time_stamp", "<u4", 3),
        ("number_of_samples", "<u2"),
        ("available_channels", "<u2"),
        ("active_channels", "<u2"),
        ("channel_mask", "<u8", 16),
        ("discard_pre", "<u2"),
        ("discard_post", "<u2"),
        ("center_sample", "<u2"),
        ("encoding_space_ref", "<u2"),
        ("trajectory_dimensions", "<u2"),
        ("sample_time_us", "<f4"),
        ("position", "<f4", 3),
        ("read_dir", "<f4", 3),
        ("phase_dir", "<f4", 3),
        ("slice_dir", "<f4", 3),
        ("patient_table_position", "<f4", 3),
        ("idx", _INDEX),
        ("user_int", "<i4", 8),
        ("user_float", "<f4", 8),
    ]
)


def write_ismrmrd(
    path: str | Path, kspace: np.ndarray, sampled: np.ndarray, affine: np.ndarray, note: str = ""
) -> None:
    """Write Cartesian k-space as ISMRMRD, completely or not at all.

    Args:
        path: the ``.h5`` file.
        kspace: see :class:`memnet.datasets.ismrmrd.RawData`.
        sampled: see :class:`memnet.datasets.ismrmrd.RawData`; what is false is not written.
        affine: see :class:`memnet.datasets.ismrmrd.RawData`; its axes must be orthogonal, and right-handed ones are kept.
        note: how the data came to be, for the header.
    """
    path = Path(path)
    n_frames, n_coils, *matrix = kspace.shape
    axes = np.diag([-1.0, -1, 1, 1]) @ affine  # ISMRMRD counts to the left and to the back
    voxel = np.linalg.norm(axes[:3, :3], axis=0)
    frames, y, z = np.nonzero(sampled)
    rows = np.zeros(
        len(frames), dtype=[("head", _HEADER), ("traj", h5py.vlen_dtype("<f4")), ("data", h5py.vlen_dtype("<f4"))]
    )
    heads = rows["head"]
    heads["version"], heads["number_of_samples"], heads["center_sample"] = 1, matrix[0], matrix[0] // 2
    heads["available_channels"] = heads["active_channels"] = n_coils
    heads["position"] = (axes @ [*(n // 2 for n in matrix), 1])[:3]
    for name, axis in zip(("read_dir", "phase_dir", "slice_dir"), (axes[:3, :3] / voxel).T, strict=True):
        heads[name] = axis
    heads["scan_counter"] = np.arange(len(frames))
    heads["idx"]["kspace_encode_step_1"], heads["idx"]["kspace_encode_step_2"] = y, z
    heads["idx"]["phase"] = frames
    for i, place in enumerate(zip(frames, y, z, strict=True)):
        readout = np.ascontiguousarray(kspace[place[0], :, :, place[1], place[2]], dtype=np.complex64)
        rows["data"][i], rows["traj"][i] = readout.view(np.float32).ravel(), np.zeros(0, np.float32)

    def space(name: str) -> str:
        def block(tag: str, values: Any) -> str:
            return f"<{tag}>" + "".join(f"<{a}>{v}</{a}>" for a, v in zip("xyz", values, strict=True)) + f"</{tag}>"

        fov = [float(n * v) for n, v in zip(matrix, voxel, strict=True)]
        return f"<{name}>{block('matrixSize', matrix)}{block('fieldOfView_mm', fov)}</{name}>"

    def limit(name: str, n: int) -> str:
        return f"<{name}><minimum>0</minimum><maximum>{n - 1}</maximum><center>{n // 2}</center></{name}>"

    xml = (
        '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
        f"<studyInformation><studyDescription>{escape(note)}</studyDescription></studyInformation>"
        "<experimentalConditions><H1resonanceFrequency_Hz>123000000</H1resonanceFrequency_Hz></experimentalConditions>"
        f"<encoding>{space('encodedSpace')}{space('reconSpace')}<encodingLimits>"
        f"{limit('kspace_encoding_step_1', matrix[1])}{limit('kspace_encoding_step_2', matrix[2])}"
        f"{limit('phase', n_frames)}</encodingLimits><trajectory>cartesian</trajectory></encoding></ismrmrdHeader>"
    )
    # in memory first: HDF5 that finds the disk full leaves objects behind that cannot be closed
    content = BytesIO()
    with h5py.File(content, "w") as file:
        file.create_dataset("dataset/xml", data=[xml.encode()], dtype=h5py.string_dtype())
        file["dataset"].create_dataset("data", data=rows, maxshape=(None,), chunks=True)
    with whole_file(path) as partial:
        partial.write_bytes(content.getbuffer())
