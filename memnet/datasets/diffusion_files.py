"""Reads and writes diffusion series and tensor images."""

from __future__ import annotations

import json
import logging
import re
import warnings
import zlib
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from memnet.diffusion.tensors import (
    TENSOR_ORDERS,
    DiffusionSeries,
    as_matrices,
    has_tensor,
    is_unweighted,
    rotate_tensors,
    rotation_of,
)
from memnet.transforms.grids import same_grid
from memnet.transforms.volumes import require_real_numbers
from memnet.whole_files import whole_file

__all__ = [
    "RECORD",
    "count_negative",
    "files_beside",
    "read_bvals",
    "read_bvecs",
    "read_series",
    "read_tensors",
    "save_whole",
    "source_of",
    "stem_of",
    "write_series",
    "write_tensors",
]

logger = logging.getLogger("memnet")

RECORD = "made_from.json"
"""Lies beside tensors that :func:`memnet.datasets.diffusion.prepare` has made."""

_OWN_NAME = "tensor RAS mm2/s"  # of the intent of what write_tensors writes
_DIFFUSIVITIES = (1e-5, 0.02)  # mm^2/s, the 99th percentile of a brain's entries; free water at 37 degrees has 0.003
# shares of tensors with a negative eigenvalue
_NOISY = 0.1  # that noise makes at most
_WRONG = 0.5  # that a wrong order of entries makes at least
_ROUNDING = 1e-6  # mm^2/s, of an eigenvalue of 0
_MOST_JUDGED = 5000


def read_bvals(path: str | Path) -> np.ndarray:
    """Read b-values ``(n,)``, s/mm^2.

    Raises:
        ValueError: the file is missing or holds no numbers.
    """
    return _numbers(path).reshape(-1)


def read_bvecs(path: str | Path) -> np.ndarray:
    """Read directions ``(n, 3)`` from three rows (FSL, BIDS) or three columns.

    Raises:
        ValueError: the file is missing, holds no numbers, or neither three rows nor three columns.
    """
    values = _numbers(path)
    if 3 not in values.shape:
        raise ValueError(f"{path}: has {values.shape[0]} rows of {values.shape[1]} numbers, expected three rows")
    return values.T if values.shape[0] == 3 else values


def read_series(data: str | Path, mask: str | Path | None = None) -> DiffusionSeries:
    """Read a diffusion series with the ``bvals`` and ``bvecs`` beside it.

    Args:
        data: 4D NIfTI. FSL's and HCP's ``bvals`` and ``bvecs``, or files of its own name with the suffixes ``.bval`` and
            ``.bvec`` (BIDS) or ``.bvals`` and ``.bvecs``, must lie beside it, or further up as BIDS inherits them.
        mask: the brain on the same grid; where None HCP's ``nodif_brain_mask.nii.gz``, or a ``_mask`` or ``_brain_mask`` of
            the series' name beside it, is taken, else DIPY's median_otsu of the image of b = 0 decides, which is logged.

    Returns:
        The series, without the mean diffusion-weighted ("trace") images that some scanners add: weighted, with no direction.

    Raises:
        ValueError: naming the file that is missing, is no series of images, or does not belong to the others.
    """
    data = Path(data)
    image = _open(data)
    if len(_shape(image)) != 4:
        raise ValueError(f"{data}: has shape {image.shape}, expected a 4D series of diffusion-weighted images")
    beside = files_beside(data)
    for what, names in _names_beside(data).items():
        if what not in beside and what != "mask":
            raise ValueError(f"{data}: its {what} are missing; looked beside it for {', '.join(names)}")
    bvals, bvecs, signals = read_bvals(beside["b-values"]), read_bvecs(beside["directions"]), _values(image, data)
    mask = beside.get("mask") if mask is None else mask
    if mask is not None:
        image_mask = _open(Path(mask))
        if not same_grid((_shape(image_mask), image_mask.affine), (image.shape[:3], image.affine)):
            raise ValueError(
                f"{mask}: the mask's grid ({image_mask.shape}) is not that of {data} ({image.shape[:3]}); "
                "resample it to the series"
            )
        brain = _values(image_mask, Path(mask)) >= 0.5  # a resampled mask has small values around the brain
    else:
        logger.info("%s: no mask beside it; the brain is what median_otsu makes of the image of b = 0", data)
        brain = _find_brain(signals[..., bvals[: signals.shape[3]].argmin()])
    affine = np.asarray(image.affine, dtype=np.float64)
    if bvecs.shape == (*bvals.shape, 3) and bvals.shape == signals.shape[3:]:
        traces = ~is_unweighted(bvals) & ~bvecs.any(1)
        if traces.any():
            logger.warning("%s: %d weighted images without a direction are left out", data, int(traces.sum()))
            signals, bvals, bvecs = signals[..., ~traces], bvals[~traces], bvecs[~traces]
    return DiffusionSeries(signals, bvals, bvecs, affine, brain, str(data))


def files_beside(data: Path) -> dict[str, Path]:
    """Return the ``b-values``, ``directions`` and ``mask`` of a series as far as they are there, see :func:`read_series`."""
    found = {
        what: next((data.parent / name for name in names if (data.parent / name).is_file()), None)
        for what, names in _names_beside(data).items()
    }
    found = {"b-values": _inherited(data, "bval"), "directions": _inherited(data, "bvec")} | {
        what: file for what, file in found.items() if file is not None
    }
    return {what: file for what, file in found.items() if file is not None}


def _inherited(data: Path, suffix: str) -> Path | None:
    """Return the nearest file that BIDS lets a series inherit: all entities of its name are the series' own.

    References:
        https://bids-specification.readthedocs.io/en/stable/common-principles.html#the-inheritance-principle
    """
    entities = stem_of(data).split("_")
    data = data.absolute()
    subject = next((folder for folder in data.parents if folder.name == entities[0]), None)
    if subject is None or not entities[0].startswith("sub-") or entities[-1] != "dwi":
        return None
    for folder in [folder for folder in data.parents if subject in (folder, *folder.parents)] + [subject.parent]:
        names = {file: set(file.stem.split("_")) for file in sorted(folder.glob(f"*dwi.{suffix}"))}
        fitting = [file for file, own in names.items() if own <= set(entities)]
        if fitting:
            return max(fitting, key=lambda file: len(names[file]))
    return None


def _names_beside(data: Path) -> dict[str, list[str]]:
    stem = stem_of(data)
    base = stem.removesuffix("_dwi")
    undescribed = re.sub(r"_desc-[^_]+", "", base)  # sub-01_desc-preproc_dwi has sub-01_desc-brain_mask
    names = (f"{undescribed}_desc-brain", stem, base, f"{stem}_brain", f"{base}_brain", "nodif_brain")
    masks = [f"{name}_mask" for name in names]
    return {
        "b-values": [f"{stem}.bval", f"{stem}.bvals", "bvals"],
        "directions": [f"{stem}.bvec", f"{stem}.bvecs", "bvecs"],
        "mask": [f"{name}{suffix}" for name in masks for suffix in (".nii.gz", ".nii")],
    }


def read_tensors(
    path: str | Path,
    order: str = "nifti",
    axes: Literal["world", "voxel", "fsl"] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Read a tensor image.

    Args:
        path: NIfTI of six values a voxel, ``(D, H, W, 6)`` or, with NIfTI's own intent, ``(D, H, W, 1, 6)``, mm^2/s.
        order: how the values are ordered, see :data:`memnet.diffusion.tensors.TENSOR_ORDERS`; NIfTI's intent decides where set.
        axes: what x, y and z are: ``"world"`` (RAS+: this package, MRtrix), ``"voxel"`` (the grid's axes), or ``"fsl"`` (the
            grid's axes, the first reversed where the affine's determinant is positive, as dtifit writes); where None ``"fsl"``
            for values in FSL's order, else ``"world"``. A file of :func:`write_tensors` says itself that it is in the world's.

    Returns:
        ``(D, H, W, 6)`` float32 in NIfTI's order and world axes, mm^2/s, and the affine.

    Raises:
        ValueError: naming the file, if it is no such image, its values are no diffusivities in mm^2/s, or most make no tensors
            in this order.
    """
    path = Path(path)
    if order not in TENSOR_ORDERS:
        raise ValueError(f"tensor_order is {order!r}, expected one of {', '.join(TENSOR_ORDERS)}")
    if axes not in (None, "world", "voxel", "fsl"):
        raise ValueError(f"tensor_axes is {axes!r}, expected world, voxel or fsl")
    image = _open(path)
    shape = _shape(image)
    if len(shape) != 4 or shape[3] != 6:
        raise ValueError(f"{path}: has shape {image.shape}, expected a tensor image of six values a voxel")
    intent, _, intent_name = image.header.get_intent()
    if intent == "symmetric matrix":
        order = "nifti"
    if intent_name == _OWN_NAME:
        axes = "world"
    axes = axes or ("fsl" if order == "fsl" else "world")
    stored = _values(image, path)
    tensors = _in_order(stored, order)
    inside = has_tensor(tensors)
    large = float(np.percentile(np.abs(tensors[inside]), 99)) if inside.any() else float(np.abs(tensors).max())
    if not _DIFFUSIVITIES[0] <= large <= _DIFFUSIVITIES[1]:
        raise ValueError(
            f"{path}: its values are no diffusivities in mm^2/s (brain has about 0.001, these {large:.2g})"
        )
    is_prepared = (path.parent / RECORD).is_file()  # and was looked at when it was made
    if intent_name != _OWN_NAME:
        _require_order(path, stored, order)
    affine = np.asarray(image.affine, dtype=np.float64)
    if axes != "world":
        reverse = axes == "fsl" and np.linalg.det(affine[:3, :3]) > 0
        tensors = rotate_tensors(tensors, rotation_of(affine) @ np.diag([-1.0 if reverse else 1.0, 1, 1]))
    if not is_prepared:
        count_negative(tensors, path)
    return tensors, affine


def source_of(path: str | Path) -> str:
    """Return the series that tensors were fitted to, where :func:`memnet.datasets.diffusion.prepare` did, or else their file."""
    record = Path(path).with_name(RECORD)
    return str(json.loads(record.read_text(encoding="utf-8"))["data"]) if record.is_file() else str(path)


def write_tensors(path: str | Path, tensors: np.ndarray, affine: np.ndarray) -> None:
    """Write a tensor image as NIfTI defines it: ``(D, H, W, 1, 6)``, intent 1005 (symmetric matrix), world axes.

    Args:
        path: the target; complete or absent.
        tensors: ``(D, H, W, 6)`` in NIfTI's order, mm^2/s.
        affine: voxels to world (mm, RAS+).
    """
    image = nib.Nifti1Image(tensors.astype(np.float32)[..., None, :], affine)
    image.header.set_intent("symmetric matrix", (3,), name=_OWN_NAME)
    save_whole(image, path)


def write_series(path: str | Path, series: DiffusionSeries) -> None:
    """Write a diffusion series as :func:`read_series` reads it, the images last.

    Args:
        path: the images' ``.nii.gz``; ``.bval``, ``.bvec`` (FSL's) and ``_mask.nii.gz`` of the same name are put beside it.
        series: what to write.
    """
    path = Path(path)
    stem = stem_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path.with_name(f"{stem}.bval"), series.bvals[None], fmt="%g")
    np.savetxt(path.with_name(f"{stem}.bvec"), series.bvecs.T, fmt="%.8f")
    mask = nib.Nifti1Image(series.mask.astype(np.uint8), series.affine)
    save_whole(mask, path.with_name(f"{stem}_mask.nii.gz"))
    save_whole(nib.Nifti1Image(series.signals, series.affine), path)


def save_whole(image: Any, path: str | Path) -> None:
    """Write a NIfTI image with both of its affines set, complete or not at all."""
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1, strip_shears=True)
    image.header.set_xyzt_units("mm")
    with whole_file(path) as partial:
        nib.save(image, partial)


def stem_of(path: str | Path) -> str:
    """Return the name of a NIfTI file without its suffixes."""
    return Path(path).name.split(".nii")[0]


def count_negative(tensors: np.ndarray, name: str | Path) -> None:
    """Warn of tensors ``(..., 6)`` that have a negative eigenvalue, with their number and the name of their image."""
    inside = has_tensor(tensors)
    n_negative = int((np.linalg.eigvalsh(as_matrices(tensors[inside]))[..., 0] < 0).sum())
    if n_negative:
        logger.warning(
            "%s: %d of %d tensors have a negative eigenvalue; they stay as they are, maps count it as 0",
            name,
            n_negative,
            int(inside.sum()),
        )


def _find_brain(b0: np.ndarray) -> np.ndarray:
    from dipy.segment.mask import median_otsu

    # A background of 0 does not tell a stripped series: many scanners set air to 0 and leave the skull.
    return median_otsu(b0, median_radius=2, numpass=1)[1] & (b0 > 0)


def _in_order(stored: np.ndarray, order: str) -> np.ndarray:
    return stored[..., [TENSOR_ORDERS[order].index(entry) for entry in TENSOR_ORDERS["nifti"]]]


def _require_order(path: Path, stored: np.ndarray, order: str) -> None:
    """Refuse values that are no tensors in the order named, most having a negative eigenvalue."""
    voxels = stored[has_tensor(stored)]
    voxels = voxels[:: -(-len(voxels) // _MOST_JUDGED)]
    negative = {
        name: float((np.linalg.eigvalsh(as_matrices(_in_order(voxels, name)))[:, 0] < -_ROUNDING).mean())
        for name in TENSOR_ORDERS
    }
    best = min(negative, key=lambda name: negative[name])
    if negative[order] > _WRONG and negative[best] < _NOISY:
        raise ValueError(
            f"{path}: its values are no tensors in the order {order}, but in that of {best}; give --tensor_order {best}, and "
            "--tensor_axes where its axes are other than that program's"
        )
    if negative[order] > _WRONG:
        raise ValueError(
            f"{path}: {100 * negative[order]:.0f} % of its values make tensors with a negative eigenvalue, whatever their order"
        )


def _numbers(path: str | Path) -> np.ndarray:
    try:
        with Path(path).open(encoding="utf-8-sig") as lines, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a file without numbers, which is refused below
            values = np.loadtxt((line.replace(",", " ") for line in lines), dtype=np.float64, ndmin=2)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as numbers ({error})") from error
    if values.size == 0:
        raise ValueError(f"{path}: holds no numbers")
    return values


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        image = nib.load(path)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path}: not a NIfTI image, or damaged ({error})") from error
    if not isinstance(image, nib.Nifti1Pair):
        raise ValueError(f"{path}: not a NIfTI image, but {type(image).__name__}; convert it")
    try:
        require_real_numbers(image)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return image


def _shape(image: Any) -> tuple[int, ...]:
    """Return the shape without dimensions of size 1 beyond the third."""
    return (*image.shape[:3], *(n for n in image.shape[3:] if n != 1))


def _values(image: Any, path: Path) -> np.ndarray:
    try:
        values = np.asarray(image.dataobj, dtype=np.float32).reshape(_shape(image))
    except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read, cut short or damaged ({error})") from error
    if not np.isfinite(values).all():
        raise ValueError(f"{path}: {int((~np.isfinite(values)).sum())} values are NaN or infinite; replace them first")
    return values
