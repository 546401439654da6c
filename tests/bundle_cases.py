"""What the tests that run bundles share: small settings, the run itself, and the few words in which bundles differ."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
from conftest import BUNDLES

# MONAI on its own deprecations, and on tiny volumes that miss a class
WARNINGS = [
    pytest.mark.filterwarnings("ignore::FutureWarning:monai"),
    pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning"),
    pytest.mark.filterwarnings("ignore:No hash value provided:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*(ground truth|prediction) of class.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Num foregrounds.*unable to generate class balanced samples:UserWarning"),
]

# a run of seconds
SMALL: dict[str, Any] = {
    "network_def#channels": 8,
    "network_def#n_levels": 2,
    "roi_size": [16, 16, 16],
    "device": "cpu",
}
SMALL_TRAINING = {**SMALL, "patch_size": [16, 16, 16], "patches_per_volume": 2, "num_workers": 0, "val_interval": 1}


@dataclass(frozen=True)
class BundleCase:
    """How a bundle that trains on a folder of scans and labels is run on a small one of its kind."""

    name: str
    data: str  # fixture: a folder of three labelled subjects as its data set is distributed
    scans: Sequence[str]  # the files after which the outputs of that folder are named
    postfix: str
    table: str
    metric: str
    flag: str  # the override that names one scan
    values: Sequence[int]  # what the label map of classes 0 to 3 holds
    columns: Sequence[str]  # what the metrics' classes or regions are called
    levels: Sequence[float]  # what intensities 0, 250 (most of the brain), 550 and 1000 are scaled to

    @property
    def folder(self) -> Path:
        return BUNDLES / self.name


TISSUE = BundleCase(
    name="brain_mri_tissue_invres",
    data="iseg_folder",
    scans=[f"subject-{k}-T1.hdr" for k in (1, 2, 10)],
    postfix="tissue",
    table="tissue_volumes.csv",
    metric="val_hausdorff_gm",
    flag="image",
    values=[0, 1, 2, 3],
    columns=["CSF", "GM", "WM"],
    levels=[0, 0.25, 0.55, 1],
)
TUMOR = BundleCase(
    name="brain_mri_tumor_invres",
    data="brats_folder",
    scans=[f"BraTS20_Training_{k:03d}_t1.nii.gz" for k in (1, 2, 3)],
    postfix="tumor",
    table="tumor_volumes.csv",
    metric="val_hausdorff95_et",
    flag="t1",
    values=[0, 1, 2, 4],
    columns=["TC", "WT", "ET"],
    levels=[0, 1 / 3, 0.735, 1],
)
cases = pytest.mark.parametrize("case", [TISSUE, TUMOR], ids=lambda case: case.postfix)


def train_in_two_processes(bundle: Path, **overrides: Any) -> None:
    """Train a bundle by its multi_gpu_train.json in two processes on the CPU."""
    configs = [str(bundle / "configs" / name) for name in ("train.json", "multi_gpu_train.json")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "monai.bundle", "run", "training", "--config_file", str(configs)]
    command += [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "deprecated" not in done.stderr, done.stderr[-3000:]


def run(bundle: Path, run_id: str, *configs: str, **overrides: Any) -> None:
    """Run a bundle in this process as ``python -m monai.bundle run`` does."""
    files = [str(bundle / "configs" / config) for config in configs]
    monai.bundle.run(run_id, config_file=files, logging_file=False, **overrides)  # type: ignore[arg-type]
