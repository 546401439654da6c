"""What the XML header of an ISMRMRD file says of its encoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

__all__ = ["Encoding", "read_encoding"]

_NAMESPACE = "{http://www.ismrm.org/ISMRMRD}"
_THINNEST, _THICKEST = 1e-3, 1e3  # sides of a voxel, mm


@dataclass(frozen=True)
class Encoding:
    """What a file's header says.

    Attributes:
        matrix: encoded samples along x, y, z.
        fov: encoded field of view, mm.
        recon_x: samples of the reconstructed readout.
        recon_fov_x: their field of view, mm.
        centres: the central steps along y and z.
        separate: whether calibration readouts are a scan of their own, whose contrast may be another one.
        chopped: whether the sign alternates from step to step along y and z, as in files of GE's scanners.
        has_pilot_tone: whether a navigator's tone lies in each readout's first three samples and its last one, as OCMR tells.
    """

    matrix: list[int]
    fov: list[float]
    recon_x: int
    recon_fov_x: float
    centres: list[int]
    separate: bool
    chopped: tuple[bool, bool]
    has_pilot_tone: bool


def read_encoding(path: Path, xml: bytes, space: int) -> Encoding:
    """Read one encoding space of a file's header.

    Args:
        path: the file, for messages.
        xml: the header.
        space: number of the encoding space, counted from 0.

    Raises:
        ValueError: the header is damaged or lacks a field, or its data are not Cartesian.
    """
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: its header is no XML ({error})") from error
    encoding = next(iter(root.findall(f"{_NAMESPACE}encoding")[space:]), None)
    numbers = root.iterfind(f"{_NAMESPACE}userParameters/{_NAMESPACE}userParameterLong")
    told = {p.findtext(f"{_NAMESPACE}name"): p.findtext(f"{_NAMESPACE}value") for p in numbers}

    def read(*names: str, default: str | None = None) -> str:
        found = None if encoding is None else encoding.findtext("/".join(_NAMESPACE + name for name in names))
        if found is None and default is None:
            raise ValueError(f"{path}: its header lacks encoding/{'/'.join(names)}")
        return str(default if found is None else found)

    trajectory = read("trajectory").strip()
    if trajectory.lower() != "cartesian":
        raise ValueError(f"{path}: its trajectory is {trajectory}; only cartesian data can be reconstructed")
    mode = read("parallelImaging", "calibrationMode", default="")
    recon = ("reconSpace", "matrixSize", "x"), ("reconSpace", "fieldOfView_mm", "x")
    try:
        matrix = [int(read("encodedSpace", "matrixSize", axis)) for axis in "xyz"]
        fov = [float(read("encodedSpace", "fieldOfView_mm", axis)) for axis in "xyz"]
        centres = []
        for i, n in enumerate(matrix[1:], 1):
            limits = [
                int(read("encodingLimits", f"kspace_encoding_step_{i}", name, default=str(default)))
                for name, default in (("minimum", 0), ("center", n // 2), ("maximum", n - 1))
            ]
            least, centre, most = limits
            if least < centre <= most:
                matrix[i] = min(n, 2 * max(centre - least, most + 1 - centre))
            else:  # as converters write that leave limits out
                centre = n // 2
            centres.append(centre)
        recon_x, recon_fov_x = int(read(*recon[0], default=str(matrix[0]))), float(read(*recon[1], default=str(fov[0])))
    except ValueError as error:
        raise ValueError(
            str(error) if str(path) in str(error) else f"{path}: its header is damaged ({error})"
        ) from None
    sides = [length / n if n else 0 for length, n in zip((*fov, recon_fov_x), (*matrix, recon_x), strict=True)]
    if not all(_THINNEST <= side <= _THICKEST for side in sides) or min(matrix) < 1:
        raise ValueError(
            f"{path}: its header has a matrix of {matrix} (readout reconstructed to {recon_x}) and a field of view of {fov} "
            f"mm ({recon_fov_x}), so that voxels have sides of {', '.join(f'{side:.3g}' for side in sides)} mm"
        )
    chopped = told.get("ChopY") == "0", told.get("ChopZ") == "0"
    separate, has_pilot_tone = mode in ("separate", "external"), told.get("PilotTone") == "1"
    return Encoding(matrix, fov, recon_x, recon_fov_x, centres, separate, chopped, has_pilot_tone)
