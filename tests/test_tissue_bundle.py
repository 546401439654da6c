"""What brain_mri_tissue_invres does beyond what all bundles do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from bundle_cases import SMALL, SMALL_TRAINING, TISSUE, WARNINGS, run
from conftest import phantom
from monai.bundle import ConfigParser

pytestmark = WARNINGS


def test_trains_from_a_datalist_with_a_missing_modality(datalist: Path, tmp_path: Path) -> None:
    options = {**SMALL_TRAINING, "datalist": str(datalist), "epochs": 1, "output_dir": str(tmp_path / "t")}
    run(TISSUE.folder, "run", "train.json", **options)
    assert (tmp_path / "t" / "model_best.pt").is_file()


def test_trains_from_label_maps_alone(label_maps: Path, tmp_path: Path) -> None:
    options = {**SMALL, "patch_size": [16, 16, 16], "patches_per_map": 2, "num_workers": 0, "epochs": 1}
    options.pop("roi_size")
    options |= {"dataset_dir": str(label_maps), "output_dir": str(tmp_path)}
    run(TISSUE.folder, "training", "train_synthetic.json", **options)
    assert all(torch.isfinite(v).all() for v in torch.load(tmp_path / "model_best.pt", weights_only=True).values())


def test_an_earlier_training_is_kept(iseg_folder: Path, tmp_path: Path) -> None:
    options = {**SMALL_TRAINING, "dataset_dir": str(iseg_folder), "epochs": 1, "output_dir": str(tmp_path)}
    run(TISSUE.folder, "run", "train.json", **options)
    first = (tmp_path / "model_best.pt").read_bytes()
    run(TISSUE.folder, "run", "train.json", **options, seed=1)
    assert (tmp_path / "model_best.previous.pt").read_bytes() == first


def test_t2_alone_and_both_modalities(
    random_weights: Callable[..., Path], write_nifti: Callable[..., Path], tmp_path: Path
) -> None:
    t1, t2, _ = phantom()
    first, second = write_nifti("a_T1.nii.gz", t1), write_nifti("a_T2.nii.gz", t2[::2], np.diag([2.0, 1, 1, 1]))
    options = {**SMALL, "ckpt_path": str(random_weights(TISSUE.folder, **SMALL))}

    def segment(name: str, **files: Path) -> Path:
        given = {flag: str(file) for flag, file in files.items()}
        run(TISSUE.folder, "run", "inference.json", **options, **given, output_dir=str(tmp_path / name))
        return next((tmp_path / name).glob("*_tissue.nii.gz"))

    assert nib.load(segment("t2", t2=second)).shape == t2[::2].shape
    both, alone = segment("both", t1=first, t2=second), segment("t1", image=first)
    assert both.name == "a_T1_tissue.nii.gz" and nib.load(both).shape == t1.shape
    assert (np.asarray(nib.load(both).dataobj) != np.asarray(nib.load(alone).dataobj)).any()


def test_weights_with_the_variational_branch_serve_inference(
    random_weights: Callable[..., Path], write_nifti: Callable[..., Path], tmp_path: Path
) -> None:
    scan = write_nifti("scan.nii.gz", phantom()[0])
    options = {**SMALL, "image": str(scan), "ckpt_path": str(random_weights(TISSUE.folder, **SMALL, vae=True))}
    run(TISSUE.folder, "run", "inference.json", **options, output_dir=str(tmp_path))
    assert (tmp_path / "scan_tissue.nii.gz").is_file()


def test_hosts_may_hand_over_a_plain_file_name(write_nifti: Callable[..., Path]) -> None:
    # MONAI Label and the Deploy SDK call preprocessing with {"image": path} and no run around it
    parser = ConfigParser()
    parser.read_config(str(TISSUE.folder / "configs" / "inference.json"))
    scan = write_nifti("scan.nii.gz", phantom()[0])
    data = parser.get_parsed_content("preprocessing")({"image": str(scan), "image_path": str(scan)})
    assert data["image"].shape[0] == 2
    assert not data["image"][1].any()
