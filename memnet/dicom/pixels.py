"""Reads the voxels of a DICOM series."""

from __future__ import annotations

from typing import Any

import numpy as np
import pydicom
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
)

from memnet.dicom.reading import DicomError, guarded
from memnet.dicom.stack import Plane, Stack

__all__ = ["read_pixels"]

# pydicom 2 and 3 disagree on the name of the last
_LOSSLESS_JPEG = (JPEGLosslessSV1, "1.2.840.10008.1.2.4.57")
_DECODED_ELSEWHERE = (JPEGExtended12Bit, JPEGLSLossless, JPEGLSNearLossless, *_LOSSLESS_JPEG)


def read_pixels(stack: Stack) -> np.ndarray:
    """Read the voxels of a stack.

    Returns:
        ``(column, row, slice)``, float32, in the series' real values (rescale slope and intercept applied).

    Raises:
        ValueError: naming the file whose pixels cannot be read.
    """
    volume = np.empty(0, dtype=np.float32)
    file, frames = None, np.empty(0)
    for k, plane in enumerate(stack.planes):
        if plane.file != file:
            file, frames = plane.file, _frames(plane)
        if plane.frame >= len(frames) or frames[plane.frame].shape != stack.shape[1::-1]:
            raise DicomError(
                f"{plane.file}: its pixels are not the {stack.shape[1]} rows of {stack.shape[0]} that it announces"
            )
        if not volume.size:
            # only now, since a damaged header may announce any size
            volume = np.empty(stack.shape, dtype=np.float32)
        slope, intercept = plane.scale
        volume[:, :, k] = (frames[plane.frame] * slope + intercept).T
    return volume


def _frames(plane: Plane) -> np.ndarray:
    """Decode the pixels of a slice's file, ``(frame, row, column)``."""
    try:
        with guarded(plane.file):
            image = pydicom.dcmread(plane.file, force=True)
            if "TransferSyntaxUID" not in image.file_meta:  # as pydicom has found out
                kinds: dict[Any, UID] = {(True, True): ImplicitVRLittleEndian, (False, True): ExplicitVRLittleEndian}
                image.file_meta.TransferSyntaxUID = kinds.get(image.original_encoding, ExplicitVRBigEndian)
            pixels: Any = image.pixel_array
    except DicomError:
        pixels = _decoded_elsewhere(plane)
        if pixels is None:
            raise DicomError(
                f"{plane.file}: its pixels cannot be read, cut short or damaged, or coded in a way that no reader here knows"
            ) from None
    return pixels if pixels.ndim == 3 else pixels[None]


def _decoded_elsewhere(plane: Plane) -> np.ndarray | None:
    """Decode by SimpleITK what pydicom has no decoder for, such as lossless JPEG; ``None`` if it cannot either."""
    with guarded(plane.file):
        syntax = plane.header.file_meta.get("TransferSyntaxUID")
    # of slope and intercept, which it applies, it knows one pair a file
    if plane.in_one_file or syntax not in _DECODED_ELSEWHERE:
        return None
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        pixels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(plane.file), SimpleITK.sitkFloat64))
    except RuntimeError:
        return None
    slope, intercept = plane.scale
    return (pixels - intercept) / slope if slope else None
