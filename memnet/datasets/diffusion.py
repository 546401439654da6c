"""Finds diffusion series, prepares tensors of two resolutions from them, and splits the subjects."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from memnet.datasets.cases import Case, as_list, existing_folder
from memnet.diffusion.tensors import (
    TENSOR_ORDERS,
    DiffusionSeries,
    as_matrices,
    fit_tensors,
    rotate_tensors,
    rotation_of,
)
from memnet.transforms.grids import same_grid
from memnet.whole_files import whole_file

__all__ = [
    "find_inputs",
    "find_series",
    "find_tensor_cases",
    "prepare",
    "read_bvals",
    "read_bvecs",
    "read_series",
    "read_tensors",
    "repeat",
    "save_whole",
    "split_subjects",
    "write_series",
    "write_tensors",
]

logger = logging.getLogger("memnet")

_HCP = Path("T1w", "Diffusion", "data.nii.gz")
_VERSION = 2  # of what a prepared folder holds
_DIFFUSIVITY_LIMIT = 0.02  # mm^2/s; free water at 37 degrees has 0.003


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
            ``.bvec`` (BIDS) or ``.bvals`` and ``.bvecs``, must lie beside it.
        mask: the brain on the same grid; where None HCP's ``nodif_brain_mask.nii.gz`` or a BIDS ``_mask`` beside the
            series is taken, else DIPY's median_otsu of the image of b = 0 decides.

    Returns:
        The series.

    Raises:
        ValueError: naming the file that is missing, is no series of images, or does not belong to the others.
    """
    data = Path(data)
    image = _open(data)
    if len(image.shape) != 4 or image.shape[3] < 2:
        raise ValueError(f"{data}: has shape {image.shape}, expected a 4D series of diffusion-weighted images")
    stem = data.name.removesuffix(".gz").removesuffix(".nii")
    bvals = read_bvals(_beside(data, "b-values", f"{stem}.bval", f"{stem}.bvals", "bvals"))
    bvecs = read_bvecs(_beside(data, "directions", f"{stem}.bvec", f"{stem}.bvecs", "bvecs"))
    signals = _values(image, data)
    if mask is None:
        base = stem.removesuffix("_dwi")
        names = [
            "nodif_brain_mask.nii.gz",
            f"{base}_desc-brain_mask.nii.gz",
            f"{stem}_mask.nii.gz",
            f"{base}_mask.nii.gz",
        ]
        mask = next((data.parent / name for name in names if (data.parent / name).is_file()), None)
    if mask is not None:
        image_mask = _open(Path(mask))
        if len(image_mask.shape) != 3 or not same_grid(
            (image_mask.shape, image_mask.affine), (image.shape[:3], image.affine)
        ):
            raise ValueError(
                f"{mask}: the mask's grid ({image_mask.shape}) is not that of {data} ({image.shape[:3]}); "
                "resample it to the series"
            )
        brain = _values(image_mask, Path(mask)) > 0
    else:
        brain = _find_brain(signals[..., bvals[: signals.shape[3]].argmin()])
    return DiffusionSeries(signals, bvals, bvecs, np.asarray(image.affine, dtype=np.float64), brain, str(data))


def read_tensors(
    path: str | Path,
    order: str = "nifti",
    axes: Literal["world", "voxel", "fsl"] = "world",
) -> tuple[np.ndarray, np.ndarray]:
    """Read a tensor image.

    Args:
        path: NIfTI of six values a voxel, ``(D, H, W, 6)`` or, with NIfTI's own intent, ``(D, H, W, 1, 6)``, mm^2/s.
        order: how the values are ordered, see :data:`memnet.diffusion.tensors.TENSOR_ORDERS`; NIfTI's intent decides where set.
        axes: what x, y and z are: ``"world"`` (RAS+: this package, MRtrix), ``"voxel"`` (the grid's axes), or ``"fsl"`` (the
            grid's axes, the first reversed where the affine's determinant is positive, as dtifit writes).

    Returns:
        ``(D, H, W, 6)`` float32 in NIfTI's order and world axes, mm^2/s, and the affine.

    Raises:
        ValueError: naming the file, if it is no such image or its values are no diffusivities in mm^2/s.
    """
    path = Path(path)
    if order not in TENSOR_ORDERS:
        raise ValueError(f"tensor_order is {order!r}, expected one of {', '.join(TENSOR_ORDERS)}")
    if axes not in ("world", "voxel", "fsl"):
        raise ValueError(f"tensor_axes is {axes!r}, expected world, voxel or fsl")
    image = _open(path)
    shape = image.shape
    if len(shape) == 5 and shape[3] == 1:
        shape = (*shape[:3], shape[4])
    if len(shape) != 4 or shape[3] != 6:
        raise ValueError(f"{path}: has shape {image.shape}, expected a tensor image of six values a voxel")
    if image.header.get_intent()[0] == "symmetric matrix":
        order = "nifti"
    tensors = _values(image, path).reshape(shape)
    tensors = tensors[..., [TENSOR_ORDERS[order].index(entry) for entry in TENSOR_ORDERS["nifti"]]]
    if not tensors.any() or np.abs(np.percentile(tensors[tensors.any(-1)], 99)) > _DIFFUSIVITY_LIMIT:
        raise ValueError(f"{path}: its values are no diffusivities in mm^2/s (brain has about 0.001)")
    affine = np.asarray(image.affine, dtype=np.float64)
    if axes != "world":
        reverse = axes == "fsl" and np.linalg.det(affine[:3, :3]) > 0
        tensors = rotate_tensors(tensors, rotation_of(affine) @ np.diag([-1.0 if reverse else 1.0, 1, 1]))
    _count_negative(tensors, path)
    return tensors, affine


def write_tensors(path: str | Path, tensors: np.ndarray, affine: np.ndarray) -> None:
    """Write a tensor image as NIfTI defines it: ``(D, H, W, 1, 6)``, intent 1005 (symmetric matrix), world axes.

    Args:
        path: the target; complete or absent.
        tensors: ``(D, H, W, 6)`` in NIfTI's order, mm^2/s.
        affine: voxels to world (mm, RAS+).
    """
    image = nib.Nifti1Image(tensors.astype(np.float32)[..., None, :], affine)
    image.header.set_intent("symmetric matrix", (3,), name="tensor RAS mm2/s")
    save_whole(image, path)


def write_series(path: str | Path, series: DiffusionSeries) -> None:
    """Write a diffusion series as :func:`read_series` reads it, the images last.

    Args:
        path: the images' ``.nii.gz``; ``.bval``, ``.bvec`` (FSL's) and ``_mask.nii.gz`` of the same name are put beside it.
        series: what to write.
    """
    path = Path(path)
    stem = _stem(path)
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


def find_series(dataset_dir: str | Path) -> list[Case]:
    """Find the diffusion series of a folder.

    Args:
        dataset_dir: HCP's layout (``<subject>/T1w/Diffusion/data.nii.gz``, or one such subject), BIDS
            (``sub-*/[ses-*/]dwi/*_dwi.nii.gz``, also below ``derivatives``), or a folder of series with their bvals and bvecs
            beside them.

    Returns:
        ``{"subject": name, "data": file}`` of each, in the order of their names.

    Raises:
        ValueError: nothing is found.
    """
    folder = existing_folder(dataset_dir, "diffusion series in HCP's or BIDS layout")
    if (folder / _HCP).is_file():
        return [{"subject": folder.resolve().name, "data": str(folder / _HCP)}]
    found = [{"subject": file.parents[2].name, "data": str(file)} for file in sorted(folder.glob(f"*/{_HCP}"))]
    if not found:
        bids = sorted({*folder.glob("sub-*/dwi/*_dwi.nii*"), *folder.glob("sub-*/ses-*/dwi/*_dwi.nii*")})
        found = [{"subject": file.name.split(".nii")[0].removesuffix("_dwi"), "data": str(file)} for file in bids]
    if not found:
        for file in sorted(folder.glob("*.nii*")):
            stem = file.name.split(".nii")[0]
            if any((folder / name).is_file() for name in (f"{stem}.bval", f"{stem}.bvals")) or (
                stem == "data" and (folder / "bvals").is_file()
            ):
                found.append({"subject": stem, "data": str(file)})
    if not found:
        raise ValueError(
            f"{folder}: no diffusion series found (looked for */{_HCP.as_posix()}, sub-*/dwi/*_dwi.nii.gz, and *.nii.gz "
            "with .bval and .bvec beside it)"
        )
    return found


def prepare(
    series: Sequence[Case],
    cache_dir: str | Path,
    shells: Sequence[float] | None = None,
    rate: int | None = 2,
    progress: bool = True,
    interpolated: bool = False,
) -> list[Case]:
    """Make the tensors of both resolutions of each series, once.

    The low resolution is the mean of blocks of voxels of the diffusion-weighted images, to which tensors are fitted as to
    the images themselves. A subject that is there already, made from the same files by the same settings, is not made again.

    Args:
        series: see :func:`find_series`.
        cache_dir: a folder for each subject is made in it.
        shells: see :meth:`memnet.diffusion.tensors.DiffusionSeries.select`.
        rate: voxels a side of a block; None makes no low resolution.
        progress: show a progress bar.
        interpolated: also fit tensors to cubic interpolation of the low resolution's signals, to compare with.

    Returns:
        ``{"subject", "tensor_low", "tensor_high", "mask_low", "mask_high"}`` of each, the latter four files, and
        ``tensor_interpolated`` and ``mask_interpolated`` where asked for.

    Raises:
        ValueError: see :func:`read_series`.
    """
    from tqdm import tqdm

    cases = []
    for one in tqdm(series, "preparing subjects", disable=not progress, ncols=100):
        folder = Path(cache_dir) / one["subject"]
        resolutions = ["high"] if rate is None else ["low", "high", *(["interpolated"] if interpolated else [])]
        files = {
            f"{what}_{at}": str(folder / f"{what}_{at}.nii.gz") for at in resolutions for what in ("tensor", "mask")
        }
        made_from = _origin(one, shells, rate)
        record = folder / "made_from.json"
        is_there = record.is_file() and json.loads(record.read_text(encoding="utf-8")) == made_from
        if not is_there or not all(Path(file).is_file() for file in files.values()):
            fine = read_series(one["data"], one.get("mask")).select(shells)
            made = {"high": fine} if rate is None else {"high": fine.cropped(rate), "low": fine.coarse(rate)}
            if rate is not None and interpolated:
                made["interpolated"] = replace(made["low"].fine(rate), mask=made["high"].mask)
            record.unlink(missing_ok=True)
            for key, at in made.items():
                tensors = fit_tensors(at, progress)
                _count_negative(tensors, f"{one['data']} ({key} resolution)")
                folder.mkdir(parents=True, exist_ok=True)
                write_tensors(files[f"tensor_{key}"], tensors, at.affine)
                save_whole(nib.Nifti1Image(at.mask.astype(np.uint8), at.affine), files[f"mask_{key}"])
            with whole_file(record) as partial:
                partial.write_text(json.dumps(made_from, indent=1), encoding="utf-8")
        cases.append({"subject": one["subject"], **files})
    return cases


def split_subjects(
    cases: Sequence[Case], n_training: int | None, n_validation: int, n_test: int, seed: int = 0
) -> dict[Literal["training", "validation", "test"], list[Case]]:
    """Split subjects at random into those to train on, to validate and to test with.

    The test subjects, and the validation's, stay the same whatever the number of those to train on.

    Args:
        cases: see :func:`prepare`.
        n_training: how many to train on; all that are left where None.
        n_validation: how many to choose the best epoch by.
        n_test: how many to test with.
        seed: seed of the split.

    Raises:
        ValueError: there are not as many.
    """
    wanted = n_validation + n_test + (1 if n_training is None else n_training)
    if len(cases) < wanted or n_validation < 1 or (n_training is not None and n_training < 1):
        raise ValueError(
            f"{len(cases)} subjects are there; n_training={n_training}, n_validation={n_validation} and n_test={n_test} need "
            f"{wanted}, at least one to train on and one to validate with"
        )
    shuffled = list(cases)
    random.Random(seed).shuffle(shuffled)
    test, validation = shuffled[:n_test], shuffled[n_test : n_test + n_validation]
    training = shuffled[n_test + n_validation :]
    return {"training": training[:n_training], "validation": validation, "test": test}


def find_tensor_cases(
    dataset_dir: str | Path | Sequence[str] | None,
    cache_dir: str | Path,
    shells: Sequence[float] | None = None,
    n_training: int | None = None,
    n_validation: int = 1,
    n_test: int = 1,
    split_seed: int = 0,
    rate: int = 2,
    interpolated: str | None = None,
) -> dict[str, list[Case]]:
    """Find a data set's series, prepare them and split the subjects; nothing where no data set is named.

    Args:
        dataset_dir: see :func:`find_series`; or a folder with ``training``, ``validation`` and ``test``, each of which is one.
        cache_dir: see :func:`prepare`.
        shells: see :func:`prepare`.
        n_training: see :func:`split_subjects`.
        n_validation: see :func:`split_subjects`.
        n_test: see :func:`split_subjects`.
        split_seed: see :func:`split_subjects`.
        rate: see :func:`prepare`.
        interpolated: the section whose subjects get ``interpolated``, see :func:`prepare`.

    Returns:
        ``training``, ``validation`` and ``test``.
    """
    sections: tuple[Literal["training", "validation", "test"], ...] = ("training", "validation", "test")
    if not as_list(dataset_dir):
        return {section: [] for section in sections}
    folder = existing_folder(str(dataset_dir), "diffusion series in HCP's or BIDS layout")
    if all((folder / section).is_dir() for section in sections):
        return {
            section: prepare(
                find_series(folder / section),
                Path(cache_dir) / section,
                shells,
                rate,
                interpolated=section == interpolated,
            )[: n_training if section == "training" else None]
            for section in sections
        }
    split = split_subjects(find_series(folder), n_training, n_validation, n_test, split_seed)
    return {
        section: prepare(split[section], cache_dir, shells, rate, interpolated=section == interpolated)
        for section in sections
    }


def repeat(cases: Sequence[Case], n: int | None = None) -> list[Case]:
    """Name the entries of prepared subjects as transforms do, and repeat the subjects in turn up to ``n`` entries.

    Args:
        cases: see :func:`prepare`.
        n: how many entries, from each of which a patch is drawn; one a subject where None.
    """
    names = {"image": "tensor_low", "mask": "mask_low", "label": "tensor_high", "label_mask": "mask_high"}
    names |= {"signals": "tensor_interpolated", "signals_mask": "mask_interpolated"}
    entries = [{name: case[key] for name, key in names.items() if key in case} for case in cases]
    return [entries[i % len(entries)] for i in range(len(entries) if n is None else n)] if entries else []


def find_inputs(
    image: str | Path | Sequence[str] | None = None,
    mask: str | Path | None = None,
    dwi: str | Path | None = None,
    dataset_dir: str | Path | None = None,
    reference: str | Path | None = None,
    cache_dir: str | Path = ".",
    shells: Sequence[float] | None = None,
) -> list[Case]:
    """List what is to be refined: tensor images, or diffusion series whose tensors are fitted first.

    Args:
        image: one tensor image or several.
        mask: the brain on the grid of the one image, or of ``dwi``.
        dwi: one diffusion series.
        dataset_dir: a folder of diffusion series, see :func:`find_series`.
        reference: fine tensors of the one image, to draw beside the result.
        cache_dir: where fitted tensors are kept.
        shells: see :meth:`memnet.diffusion.tensors.DiffusionSeries.select`.

    Returns:
        ``{"image", "output_name"}`` of each, and ``mask`` and ``reference`` where there are; nothing where nothing is given.

    Raises:
        ValueError: a file is missing, inputs would be written under one name, or two arguments contradict each other.
    """
    given = [name for name, value in {"image": image, "dwi": dwi, "dataset_dir": dataset_dir}.items() if as_list(value)]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given together; give one of them")
    if not given:
        return []
    alone = {key: str(value) for key, value in {"mask": mask, "reference": reference}.items() if value}
    if image:
        cases: list[Case] = [
            {"image": str(path), "output_name": Path(path).name.split(".nii")[0]} for path in as_list(image)
        ]
    else:
        series = find_series(str(dataset_dir)) if dataset_dir else [{"data": str(dwi), "subject": _stem(dwi)}]
        if dwi and mask:
            series[0]["mask"] = alone.pop("mask")
        prepared = prepare(series, cache_dir, shells, None)
        cases = [
            {"image": case["tensor_high"], "mask": case["mask_high"], "output_name": case["subject"]}
            for case in prepared
        ]
    if alone and len(cases) > 1:
        raise ValueError(f"{' and '.join(alone)} belong to one image; {len(cases)} are given")
    cases[0] |= alone
    names = [case["output_name"] for case in cases]
    for case in cases:
        if names.count(case["output_name"]) > 1:
            raise ValueError(f"{case['output_name']}: several inputs would be written under this name; rename them")
        for key in {"image", "mask", "reference"} & set(case):
            if not Path(case[key]).is_file():
                raise ValueError(f"{case[key]}: no such file")
    return cases


def _stem(path: str | Path | None) -> str:
    return Path(str(path)).name.split(".nii")[0]


def _origin(one: Case, shells: Sequence[float] | None, rate: int | None) -> dict[str, Any]:
    data = Path(one["data"])
    neighbours = sorted(file for file in data.parent.iterdir() if file.is_file() and file.stat().st_size < 2**20)
    stamp = data.stat() if data.is_file() else None
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in neighbours)).hexdigest()
    return {
        "version": _VERSION,
        "data": str(data.absolute()),
        "size": stamp.st_size if stamp else 0,
        "changed": stamp.st_mtime_ns if stamp else 0,
        "beside": digest,
        "shells": None if shells is None else list(shells),
        "rate": rate,
    }


def _count_negative(tensors: np.ndarray, name: str | Path) -> None:
    inside = tensors.any(-1)
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


def _beside(data: Path, what: str, *names: str) -> Path:
    for name in names:
        if (data.parent / name).is_file():
            return data.parent / name
    raise ValueError(f"{data}: its {what} are missing; looked beside it for {', '.join(names)}")


def _numbers(path: str | Path) -> np.ndarray:
    try:
        values = np.loadtxt(path, dtype=np.float64, ndmin=2)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as numbers ({error})") from error
    if values.size == 0:
        raise ValueError(f"{path}: holds no numbers")
    return values


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return nib.load(path)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path}: not a NIfTI image, or damaged ({error})") from error


def _values(image: Any, path: Path) -> np.ndarray:
    try:
        values = np.asarray(image.dataobj, dtype=np.float32)
    except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read, cut short or damaged ({error})") from error
    if not np.isfinite(values).all():
        raise ValueError(f"{path}: {int((~np.isfinite(values)).sum())} values are NaN or infinite; replace them first")
    return values
