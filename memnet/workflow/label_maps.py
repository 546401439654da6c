"""Finds anatomical label maps and draws the fixed images that a training on synthetic data is validated with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.transforms import Compose

from memnet.datasets import existing_folder

__all__ = ["draw_examples", "find_label_maps"]


def find_label_maps(dataset_dir: str | Path | None, n_validation: int = 2) -> dict[str, list[dict[str, str]]]:
    """Find the label maps in a folder and keep the last ones for validation.

    Args:
        dataset_dir: folder of NIfTI files with FreeSurfer's values; subfolders are not searched.
        n_validation: how many maps, last in the order of their names, training does not see.

    Returns:
        ``{"training": cases, "validation": cases}``, a case being ``{"label": file}``.

    Raises:
        ValueError: if the folder is missing or holds too few files.
    """
    if dataset_dir is None:
        raise ValueError("dataset_dir is None, expected a folder of label maps: give --dataset_dir FOLDER")
    folder = existing_folder(dataset_dir, "a folder of label maps: give --dataset_dir FOLDER")
    files = [f for f in sorted(folder.iterdir()) if f.name.endswith((".nii", ".nii.gz")) and not f.name.startswith(".")]
    if n_validation < 1 or len(files) <= n_validation:
        raise ValueError(
            f"{dataset_dir}: {len(files)} NIfTI files found, {n_validation} of them for validation (--n_validation); "
            "expected at least one for each of training and validation"
        )
    cases = [{"label": str(f)} for f in files]
    return {"training": cases[:-n_validation], "validation": cases[-n_validation:]}


def draw_examples(cases: Sequence[Any], transform: Compose, n_draws: int = 4, seed: int = 0) -> list[Any]:
    """Apply a random transform several times to each case, with draws that depend on the seed alone.

    Args:
        cases: what the transform takes.
        transform: random transforms; their random state is set.
        n_draws: draws of each case.
        seed: seed of the draws.

    Returns:
        ``n_draws`` results for each case, in the order of the cases.
    """
    transform.set_random_state(seed=seed)
    return [transform(dict(case)) for case in cases for _ in range(n_draws)]
