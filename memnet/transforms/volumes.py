"""Reads single volumes from files and refuses what no later step could use."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping
from math import inf, prod
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from nibabel.spatialimages import SpatialImage

from memnet.datasets import ITK_SUFFIXES
from memnet.dicom import holds_dicom, read_pixels, read_stack, split_uid
from memnet.transforms.grids import file_grid, require_one_grid

__all__ = ["LoadVolumed", "check_volume", "read_volume", "require_real_numbers"]

_SIDES, _FARTHEST = (1e-3, 1e3), 1e5  # of voxels, and of the first one from the origin, mm
# how many times smaller a file may be than what it holds; 1100 is what gzip makes of zeros, and a little more
_MOST_COMPRESSED = {".nii": 1, ".img": 1, ".mgh": 1, ".gz": 1100, ".mgz": 1100}


def read_volume(path: str | Path, constant: bool = False) -> MetaTensor:
    """Read a 3D volume and refuse what no later step could use.

    Args:
        path: NIfTI (.nii, .nii.gz), Analyze (.hdr or .img) or another single-volume format of nibabel; ``file:2`` for one
            volume of a 4D file, counted from 0; NRRD (.nrrd, .nhdr) or MetaImage (.mha, .mhd); or a DICOM series: its folder,
            ``folder:UID``, or its only file, see :func:`memnet.dicom.read_stack`.
        constant: take a volume whose voxels are all the same, such as the label map of a healthy brain.

    Returns:
        ``(1, D, H, W)`` float32 with the file's affine (mm, RAS+); of a NIfTI file the metadata's ``space_code`` is its code of
        the space that the affine is of, 0 where the file tells no orientation and the affine is nibabel's guess.

    Raises:
        ValueError: naming the file, if it is missing, no such image, cut short, not 3D, not finite, or constant.
    """
    read = _read_nifti
    if Path(path).is_dir() or holds_dicom(path):
        read = _read_dicom
    elif Path(path).name.lower().endswith(ITK_SUFFIXES):
        read = _read_by_itk
    values, affine, space_code = read(path)
    volume = check_volume(path, values, affine, constant)
    if space_code is not None:
        volume.meta["space_code"] = space_code
    return volume


def check_volume(path: str | Path, values: np.ndarray, affine: np.ndarray, constant: bool = False) -> MetaTensor:
    """Make a volume of values read elsewhere, with the checks of :func:`read_volume`.

    Args:
        path: what the messages and the metadata call it.
        values: ``(D, H, W)`` float32.
        affine: ``(4, 4)``, mm, RAS+.
        constant: see :func:`read_volume`.

    Returns:
        ``(1, D, H, W)`` with the affine.

    Raises:
        ValueError: naming it, if it is not finite, constant, or its affine is that of no scan.
    """
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


def _read_dicom(path: str | Path) -> tuple[np.ndarray, np.ndarray, int | None]:
    stack = read_stack(path)
    return read_pixels(stack), stack.affine, None


def _read_by_itk(path: str | Path) -> tuple[np.ndarray, np.ndarray, int | None]:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        image = SimpleITK.ReadImage(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: not an NRRD or MetaImage file, or damaged ({_reason_of_itk(error)})") from error
    shape, n_channels = image.GetSize(), image.GetNumberOfComponentsPerPixel()
    if len(shape) != 3 or n_channels > 1:
        raise ValueError(f"{path}: has shape {shape} of {n_channels} values each, expected a 3D volume")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    values = SimpleITK.GetArrayFromImage(image).transpose().astype(np.float32)
    return values, np.diag([-1.0, -1, 1, 1]) @ affine, None  # ITK counts to the left and to the back


def _reason_of_itk(error: RuntimeError) -> str:
    """Return the last line of an error, in which ITK says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _read_nifti(path: str | Path) -> tuple[np.ndarray, np.ndarray, int | None]:
    file, volume = split_uid(path)
    if not file.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        image = nib.load(file)
        require_real_numbers(image)
        shape = tuple(image.shape)
        stored = Path(image.file_map["image"].filename or file)
        n_bytes = prod(shape) * image.get_data_dtype().itemsize
        if n_bytes > stored.stat().st_size * _MOST_COMPRESSED.get(stored.suffix.lower(), inf):
            raise ValueError(f"its header speaks of {n_bytes} bytes, {stored.name} is cut short")
    except Exception as error:  # nibabel's readers of a dozen formats have errors of their own
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
    header, space_code = image.header, None
    if isinstance(header, nib.Nifti1Header):
        space_code = int(header["sform_code"]) or int(header["qform_code"])
    return values, np.asarray(image.affine, dtype=np.float64), space_code


def require_real_numbers(image: SpatialImage) -> None:
    """Refuse complex values, of which a reader would keep the real part, and colours.

    Raises:
        ValueError: the image holds such values.
    """
    kind = image.get_data_dtype()
    if kind.kind not in "biuf":
        raise ValueError(f"it holds {'complex values' if kind.kind == 'c' else 'colours'}, expected real numbers")


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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
