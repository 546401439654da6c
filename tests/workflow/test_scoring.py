"""The scoring command: what it compares, what it writes, what it refuses."""

import csv
import logging
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import BUNDLES

from memnet.workflow import scoring
from memnet.workflow.scoring import dice, find_scored_cases, score_tissue


@pytest.fixture
def folder(tmp_path):
    """Two subjects of 4 x 4 x 4 voxels: a mask of 3 slices, labels in 2 of them."""
    label = np.zeros((4, 4, 4), np.uint8)
    label[1], label[2] = 2, 3
    mask = np.zeros((4, 4, 4), np.uint8)
    mask[:3] = 1
    for subject in ("01", "02"):
        for suffix, content in {"SS": label * 100, "classified": label, "mask": mask}.items():
            nib.save(nib.Nifti1Image(content, np.eye(4)), tmp_path / f"{subject}_{suffix}.nii.gz")
    return tmp_path


def test_a_scored_run_tells_of_no_files_that_will_be_gone(folder, monkeypatch, caplog):
    class Workflow:
        def __init__(self, config_file, workflow_type, output_dir, image, report):
            assert Path(config_file).name == "inference.json" and report is False
            self.pairs = image, Path(output_dir) / "labels.nii.gz"

        def initialize(self):
            logging.getLogger("memnet").info("label map: %s", self.pairs[1])
            logging.getLogger("memnet").warning("no tissue was found")

        def run(self):
            shutil.copy(*self.pairs)

        def finalize(self):
            pass

    monkeypatch.setattr("monai.bundle.ConfigWorkflow", Workflow)
    caplog.set_level(logging.INFO, "memnet")
    images = [{"image": str(folder / f"{subject}_classified.nii.gz")} for subject in ("01", "02")]
    found = list(scoring.segment_with_bundle(images, BUNDLES / "brain_mri_tissue_invres"))
    assert [labels.max() for labels in found] == [3, 3]
    assert caplog.messages == ["no tissue was found"] * 2
    assert logging.getLogger("memnet").level == logging.INFO


def test_dice_of_equal_half_and_absent_labels():
    reference = np.array([1, 1, 2, 2])
    assert dice(reference, reference, 1) == 1
    assert dice(np.array([1, 3, 3, 3]), reference, 1) == pytest.approx(2 / 3)
    assert dice(reference, reference, 3) == 1


def test_table_scores_unlabelled_voxels_of_the_mask_as_fluid(folder, tmp_path, monkeypatch):
    prediction = np.zeros((4, 4, 4), np.uint8)
    prediction[0], prediction[1], prediction[2:] = 1, 2, 3
    monkeypatch.setattr(scoring, "segment_with_bundle", lambda inputs, _: (prediction for _ in inputs))
    score_tissue(folder, "bundles/some_bundle", tmp_path / "out", hmrf=False)
    with open(tmp_path / "out" / "scores.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3
    assert {(row["method"], row["tissue"], float(row["dice"])) for row in rows} == {
        ("some_bundle", tissue, 1.0) for tissue in ("CSF", "GM", "WM")
    }
    assert "| some_bundle | 1.000 ± 0.000 |" in (tmp_path / "out" / "scores.md").read_text(encoding="utf-8")


def test_missing_files_are_named(folder):
    assert list(find_scored_cases(folder)) == ["01", "02"]
    (folder / "02_mask.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"02_mask\.nii\.gz"):
        find_scored_cases(folder)
    with pytest.raises(ValueError, match="no such folder"):
        find_scored_cases(folder / "nowhere")
    with pytest.raises(ValueError, match="03_SS"):
        find_scored_cases(folder, ["03"])


def test_a_prediction_on_another_grid_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "segment_with_bundle", lambda inputs, _: (np.zeros((2, 2, 2)) for _ in inputs))
    with pytest.raises(ValueError, match=r"\(2, 2, 2\)"):
        score_tissue(folder, "some_bundle", tmp_path / "out", hmrf=False)


@pytest.mark.parametrize("kind", ["classified", "mask"])
def test_a_reference_on_another_grid_is_refused(folder, tmp_path, kind):
    flipped = np.diag([-1.0, 1, 1, 1])
    flipped[0, 3] = 3
    file = folder / f"02_{kind}.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(nib.load(file).dataobj)[::-1], flipped), file)
    with pytest.raises(ValueError, match=rf"02_{kind}.nii.gz: its grid .*scores are of voxels"):
        score_tissue(folder, "some_bundle", tmp_path / "out", hmrf=False)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_labels_that_a_file_scales_are_read_as_they_were(dtype, tmp_path):
    labels = np.arange(4, dtype=np.float32).repeat(16).reshape(4, 4, 4)
    image = nib.Nifti1Image(labels, np.eye(4))
    image.set_data_dtype(dtype)
    nib.save(image, tmp_path / "labels.nii.gz")
    assert not np.array_equal(nib.load(tmp_path / "labels.nii.gz").dataobj, labels)  # but for rounding
    assert np.array_equal(scoring.read_labels(tmp_path / "labels.nii.gz"), labels)


@pytest.mark.parametrize("value", [0.5, -1.0, 1024.0, np.nan])
def test_what_is_no_label_is_refused(value, tmp_path):
    nib.save(nib.Nifti1Image(np.full((2, 2, 2), value, np.float32), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match="a.nii.gz: holds other values"):
        scoring.read_labels(tmp_path / "a.nii.gz")
