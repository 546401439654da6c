"""Finds diffusion series, and prepares tensors of two resolutions from them."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from memnet.datasets.cases import Case, as_list, existing_folder
from memnet.datasets.diffusion_files import (
    RECORD,
    count_negative,
    files_beside,
    read_bvals,
    read_series,
    save_whole,
    stem_of,
    write_tensors,
)
from memnet.datasets.diffusion_split import SECTIONS, Split, by_patient, split_subjects, tell_shared
from memnet.diffusion.tensors import fit_tensors, is_unweighted
from memnet.whole_files import whole_file

__all__ = ["find_inputs", "find_series", "find_tensor_cases", "prepare", "repeat"]

logger = logging.getLogger("memnet")

_HCP = (Path("T1w", "Diffusion", "data.nii.gz"), Path("T1w", "Diffusion_7T", "data.nii.gz"))
_VERSION = 3  # of what a prepared folder holds


def find_series(dataset_dir: str | Path) -> list[Case]:
    """Find the diffusion series of a folder.

    Args:
        dataset_dir: HCP's layout (``<subject>/T1w/Diffusion/data.nii.gz``, or ``Diffusion_7T``, or one such subject), BIDS
            (``sub-*/[ses-*/]dwi/*_dwi.nii.gz``, or else of the one pipeline in ``derivatives``), a folder of series with their
            bvals and bvecs beside them, or one of such folders. Series of fewer than six weighted images, such as those of the
            reversed phase encoding, of which b-values are missing, and phase images are left out with a warning.

    Returns:
        ``{"subject": name, "data": file}`` of each, in the order of their names; where the name or the folder tells that a
        subject may have several, with the ``patient`` it is of.

    Raises:
        ValueError: nothing is found, or the series of several pipelines.
    """
    folder = existing_folder(dataset_dir, "diffusion series in HCP's or BIDS layout")
    for hcp in _HCP:
        if (folder / hcp).is_file():
            return [_named(folder.resolve().name, folder / hcp)]
        if found := [_named(file.parents[2].name, file) for file in sorted(folder.glob(f"*/{hcp}"))]:
            return found
    pipelines = "*/sub-*" if folder.resolve().name == "derivatives" else "derivatives/*/sub-*"
    found = _bids(folder, "sub-*") or _bids(folder, pipelines)
    if not found:
        found = [_named(stem_of(file), file) for file in _with_bvals(folder.glob("*.nii*"))]
    if not found:
        files = _with_bvals(folder.glob("*/*.nii*"))
        per_folder = Counter(file.parent for file in files)
        for file in files:
            name = file.parent.name
            found.append(_named(name if per_folder[file.parent] == 1 else f"{name}_{stem_of(file)}", file))
            found[-1].setdefault("patient", name)
    if not found:
        raise ValueError(
            f"{folder}: no diffusion series found (looked for */{_HCP[0].as_posix()}, sub-*/dwi/*_dwi.nii.gz, and *.nii.gz "
            "with .bval and .bvec beside it, here and in the folders here)"
        )
    lacking = [_what_it_lacks(Path(one["data"])) for one in found]
    whole = [one for one, lack in zip(found, lacking, strict=True) if not lack]
    for one, lack in zip(found, lacking, strict=True):
        if whole and lack:
            logger.warning("%s: left out, %s", one["data"], lack)
    return whole or found


def _named(name: str, file: Path) -> Case:
    """Return a series, and the patient that a BIDS (``sub-01_ses-1``) or HCP (``103818_3T``) name says it is of."""
    told = re.match(r"(sub-[A-Za-z0-9]+|\d{6})(?=_|$)", name)
    return {"subject": name, "data": str(file)} | ({"patient": told[1]} if told else {})


def _bids(folder: Path, subjects: str) -> list[Case]:
    """Return the series of a BIDS data set whose subjects' folders have such names."""
    found: list[Case] = []
    pipelines: set[Path] = set()
    for subject in sorted(folder.glob(subjects)):
        for file in sorted({*subject.glob("dwi/*_dwi.nii*"), *subject.glob("ses-*/dwi/*_dwi.nii*")}):
            found.append({"subject": stem_of(file).removesuffix("_dwi"), "data": str(file), "patient": subject.name})
            pipelines.add(subject.parent)
    if len(pipelines) > 1:
        raise ValueError(
            f"{folder}: has series of several pipelines; name one of {', '.join(map(str, sorted(pipelines)))}"
        )
    return found


def _with_bvals(files: Iterable[Path]) -> list[Path]:
    """Return the files that have b-values beside them; the name ``bvals`` says whose only for ``data.nii.gz``."""
    beside = {file: files_beside(file).get("b-values") for file in files}
    return sorted(
        f for f, bvals in beside.items() if bvals is not None and (bvals.name != "bvals" or stem_of(f) == "data")
    )


def _what_it_lacks(data: Path) -> str:
    """Say why no tensors can be fitted to a series; nothing where they may, or where its reader has to say why not."""
    if re.search(r"_part-(phase|real|imag)_", data.name):
        return "it is one of phases or of complex parts"
    file = files_beside(data).get("b-values")
    if file is None:
        return "it has no .bval"
    try:
        bvals = read_bvals(file)
    except ValueError:
        return ""
    is_of_another_unit = 0 < bvals.max() < 50
    return "" if is_of_another_unit or (~is_unweighted(bvals)).sum() >= 6 else "it has fewer than six weighted images"


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
    the images themselves. What is there already, made from the same files by the same settings, is not made again.

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
        ValueError: see :func:`memnet.datasets.diffusion_files.read_series`.
    """
    from tqdm import tqdm

    cases = []
    for one in tqdm(series, "preparing subjects", disable=not progress or len(series) == 1, ncols=100):
        folder = Path(cache_dir) / one["subject"]
        resolutions = ["high"] if rate is None else ["low", "high", *(["interpolated"] if interpolated else [])]
        files = {
            f"{what}_{at}": str(folder / f"{what}_{at}.nii.gz") for at in resolutions for what in ("tensor", "mask")
        }
        made_from = _origin(one, shells, rate)
        record = folder / RECORD
        is_there = record.is_file() and json.loads(record.read_text(encoding="utf-8")) == made_from
        missing = [
            at for at in resolutions if not (is_there and _are_files(files[f"tensor_{at}"], files[f"mask_{at}"]))
        ]
        if missing:
            fine = read_series(one["data"], one.get("mask")).select(shells)
            made = {"high": fine} if rate is None else {"high": fine.cropped(rate), "low": fine.coarse(rate)}
            if rate is not None and interpolated:
                made["interpolated"] = replace(made["low"].fine(rate), mask=made["high"].mask)
            if not is_there:
                record.unlink(missing_ok=True)
                for what in ("tensor", "mask"):  # which may not be made this time
                    (folder / f"{what}_interpolated.nii.gz").unlink(missing_ok=True)
            for key in missing:
                at = made[key]
                tensors = fit_tensors(at, progress)
                count_negative(tensors, f"{one['data']} ({key} resolution)")
                folder.mkdir(parents=True, exist_ok=True)
                write_tensors(files[f"tensor_{key}"], tensors, at.affine)
                save_whole(nib.Nifti1Image(at.mask.astype(np.uint8), at.affine), files[f"mask_{key}"])
            with whole_file(record) as partial:
                partial.write_text(json.dumps(made_from, indent=1), encoding="utf-8")
        cases.append({"subject": one["subject"], **files})
    return cases


def _are_files(*files: str) -> bool:
    return all(Path(file).is_file() for file in files)


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
) -> Split:
    """Find a data set's series, prepare them and split the subjects; nothing where no data set is named.

    Args:
        dataset_dir: see :func:`find_series`; or a folder with ``training``, ``validation`` and ``test``, each of which is one. A
            subject or file that is in two of these is told in a warning.
        cache_dir: see :func:`prepare`.
        shells: see :func:`prepare`.
        n_training: see :func:`memnet.datasets.diffusion_split.split_subjects`; of a folder ``training`` the first so many, in the
            order of their names.
        n_validation: see :func:`memnet.datasets.diffusion_split.split_subjects`.
        n_test: see :func:`memnet.datasets.diffusion_split.split_subjects`.
        split_seed: see :func:`memnet.datasets.diffusion_split.split_subjects`.
        rate: see :func:`prepare`.
        interpolated: the section whose subjects get ``interpolated``, see :func:`prepare`.

    Returns:
        ``training``, ``validation`` and ``test``.

    Raises:
        ValueError: see :func:`memnet.datasets.diffusion_split.split_subjects`.
    """
    if not as_list(dataset_dir):
        return {section: [] for section in SECTIONS}
    folder = existing_folder(str(dataset_dir), "diffusion series in HCP's or BIDS layout")
    are_apart = all((folder / section).is_dir() for section in SECTIONS)
    if are_apart:
        split: Split = {section: find_series(folder / section) for section in SECTIONS}
        tell_shared(split)
        subjects = by_patient(split["training"])
        if n_training is not None and not 1 <= n_training <= len(subjects):
            raise ValueError(f"n_training is {n_training}; {folder / 'training'} has {len(subjects)} subjects")
        split["training"] = sum(subjects[:n_training], [])
    else:
        split = split_subjects(find_series(folder), n_training, n_validation, n_test, split_seed)
    caches = {section: Path(cache_dir) / section if are_apart else cache_dir for section in SECTIONS}
    return {
        section: prepare(split[section], caches[section], shells, rate, interpolated=section == interpolated)
        for section in SECTIONS
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
) -> list[Case]:
    """List what is to be refined: tensor images, or diffusion series whose tensors are to be fitted first.

    Args:
        image: one tensor image or several.
        mask: the brain on the grid of the one image, or of ``dwi``.
        dwi: one diffusion series.
        dataset_dir: a folder of diffusion series, see :func:`find_series`.
        reference: fine tensors of the one image, to draw beside the result.

    Returns:
        ``{"image", "output_name"}`` of each tensor image, and ``mask`` and ``reference`` where there are; of each series
        ``{"series", "output_name"}``, see :class:`memnet.transforms.tensors.FitTensorsd`. Nothing where nothing is given.

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
        cases: list[Case] = [{"image": str(path), "output_name": stem_of(path)} for path in as_list(image)]
    else:
        series = find_series(str(dataset_dir)) if dataset_dir else [{"data": str(dwi), "subject": stem_of(str(dwi))}]
        if dwi and mask:
            series[0]["mask"] = alone.pop("mask")
        cases = [{"series": one, "output_name": one["subject"]} for one in series]
    if alone and len(cases) > 1:
        raise ValueError(f"{' and '.join(alone)} belong to one image; {len(cases)} are given")
    cases[0] |= alone
    names = [case["output_name"] for case in cases]
    for case in cases:
        if names.count(case["output_name"]) > 1:
            raise ValueError(f"{case['output_name']}: several inputs would be written under this name; rename them")
        files = case | {key: value for key, value in case.get("series", {}).items() if key in ("data", "mask")}
        for key in {"image", "mask", "reference", "data"} & set(files):
            if not Path(files[key]).is_file():
                raise ValueError(f"{files[key]}: no such file")
    return cases


def _origin(one: Case, shells: Sequence[float] | None, rate: int | None) -> dict[str, Any]:
    data = Path(one["data"])
    if not data.is_file():
        raise ValueError(f"{data}: no such file")
    beside = files_beside(data) | ({"mask": Path(one["mask"])} if one.get("mask") else {})
    stamp = data.stat()
    return {
        "version": _VERSION,
        "data": str(data.absolute()),
        "size": stamp.st_size,
        "changed": stamp.st_mtime_ns,
        "beside": _digest([file for _, file in sorted(beside.items())]),
        "shells": None if shells is None else list(shells),
        "rate": rate,
    }


def _digest(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()
