"""The scoring command of tumours: what it compares, what it writes, what it refuses."""

import csv

import nibabel as nib
import numpy as np
import pytest

from memnet.cli import main
from memnet.workflow import tumor_scoring
from memnet.workflow.tumor_scoring import find_scored_tumors, region_scores, score_tumor

# MONAI's metric calls what MONAI has deprecated
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:monai")
SHAPE = (16, 12, 10)


def tumour() -> np.ndarray:
    """Necrosis in a rim of enhancing tumour in oedema, in the values of BraTS 2015; 3 is core that does not enhance."""
    label = np.zeros(SHAPE, np.uint8)
    label[2:12, 2:10, 2:8] = 2
    label[4:10, 4:8, 3:7] = 4
    label[5:7, 5:7, 4:6], label[7:9, 5:7, 4:6] = 1, 3
    return label


@pytest.fixture
def folder(tmp_path):
    """Two cases of BraTS 2015 with two modalities, a folder down."""
    for split, name in (("train", "pat1"), ("test", "pat2")):
        case = tmp_path / "data" / split / name
        case.mkdir(parents=True)
        for file, content in {
            "T1c_subtrMeanDivStd": np.ones(SHAPE, np.float32),
            "Flair_subtrMeanDivStd": np.ones(SHAPE, np.float32),
            "OTMultiClass": tumour(),
        }.items():
            nib.save(nib.Nifti1Image(content, np.eye(4)), case / f"{file}.nii.gz")
    return tmp_path / "data"


def segmenting(monkeypatch, prediction: np.ndarray) -> list[dict[str, str]]:
    """Let the bundle predict this, and return the list that gets the inputs it is given."""
    given = []

    def segment(inputs, bundle, **overrides):
        for files in inputs:
            given.append(files)
            yield prediction

    monkeypatch.setattr(tumor_scoring, "segment_with_bundle", segment)
    return given


def test_regions_are_nested_and_absent_ones_score_as_in_brats():
    reference = np.zeros(SHAPE, np.uint8)
    reference[2:10, 2:10, 2:8] = 2
    reference[4:8, 4:8, 3:7] = 1
    assert region_scores(reference, reference) == {"WT": (1.0, 0.0), "TC": (1.0, 0.0), "ET": (1.0, 0.0)}
    prediction = np.where(reference == 1, 3, reference)
    assert region_scores(prediction, reference) == {
        "WT": (1.0, 0.0),
        "TC": (1.0, 0.0),
        "ET": (0.0, pytest.approx(373.13)),
    }
    moved = np.roll(reference, 2, axis=0)
    overlap, distance = region_scores(moved, reference)["WT"]
    assert overlap == pytest.approx(6 / 8) and distance == pytest.approx(2)
    assert region_scores(np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8))["WT"] == (1.0, 0.0)


def test_table_maps_labels_and_gives_unseen_cases_apart(folder, tmp_path, monkeypatch):
    prediction = tumour()
    prediction[prediction == 3] = 1
    given = segmenting(monkeypatch, prediction)
    empty = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), np.eye(4))
    nib.save(empty, folder / "train" / "pat1" / "OTMultiClass.nii.gz")
    score_tumor(folder, "some_bundle", tmp_path / "out", seen=["pat1"])
    assert [sorted(files) for files in given] == [["flair", "t1c"]] * 2
    assert given[0]["flair"].endswith("pat1/Flair_subtrMeanDivStd.nii.gz")
    with open(tmp_path / "out" / "scores.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["seen"], float(row["dice"])) for row in rows] == [("pat1", "True", 0.0)] * 3 + [
        ("pat2", "False", 1.0)
    ] * 3
    table = (tmp_path / "out" / "scores.md").read_text(encoding="utf-8")
    assert "| mean of 2 | 0.500 (186.6) |" in table
    assert "| mean of the 1 that no choice was made on | 1.000 (0.0) |" in table


def test_brats_folders_are_read_with_the_modalities_they_have(tmp_path):
    case = tmp_path / "BraTS20_Training_001"
    case.mkdir()
    for ending in ("t1", "t2", "seg"):
        nib.save(nib.Nifti1Image(tumour(), np.eye(4)), case / f"{case.name}_{ending}.nii.gz")
    found = find_scored_tumors(tmp_path)
    assert list(found) == [case.name]
    assert sorted(found[case.name]["files"]) == ["t1", "t2"] and found[case.name]["label_map"] == "brats"


def test_what_cannot_be_scored_is_named(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such folder"):
        find_scored_tumors(folder / "nowhere")
    with pytest.raises(ValueError, match="holds no case pat9; it has pat2, pat1"):
        find_scored_tumors(folder, ["pat9"])
    with pytest.raises(ValueError, match="seen names pat9"):
        score_tumor(folder, "some_bundle", tmp_path / "out", seen=["pat9"])
    segmenting(monkeypatch, np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"pat1.*\(2, 2, 2\)"):
        score_tumor(folder, "some_bundle", tmp_path / "out")
    segmenting(monkeypatch, np.full(SHAPE, 9, np.uint8))
    with pytest.raises(ValueError, match=r"pat1: holds label values that the map does not know: 9"):
        score_tumor(folder, "some_bundle", tmp_path / "out")
    case = folder / "train" / "pat1"
    flipped = np.diag([-1.0, 1, 1, 1])
    flipped[0, 3] = SHAPE[0] - 1  # the same places, the other way round
    nib.save(nib.Nifti1Image(tumour()[::-1], flipped), case / "OTMultiClass.nii.gz")
    with pytest.raises(ValueError, match=r"OTMultiClass.nii.gz: its grid .*LAS.* differs .*scores are of voxels"):
        score_tumor(folder, "some_bundle", tmp_path / "out")
    for file in case.iterdir():
        nib.save(nib.Nifti1Image(tumour(), np.diag([2.0, 1, 1, 1])), file)
    with pytest.raises(ValueError, match=r"pat1.*2.*expected 1 mm"):
        score_tumor(folder, "some_bundle", tmp_path / "out")
    (folder / "test" / "pat2" / "T1c_subtrMeanDivStd.nii.gz").unlink()
    with pytest.raises(ValueError, match="pat2.*no such file"):
        find_scored_tumors(folder)


def test_a_resection_cavity_is_no_enhancing_tumour(tmp_path, monkeypatch):
    treated = tumour()
    treated[treated == 4] = 9
    treated[treated == 3] = 4  # the cavity
    treated[treated == 9] = 3
    case = tmp_path / "data" / "BraTS-GLI-00001-000"
    case.mkdir(parents=True)
    for ending, content in (("t1n", np.ones(SHAPE, np.float32)), ("seg", treated)):
        nib.save(nib.Nifti1Image(content, np.eye(4)), case / f"{case.name}-{ending}.nii.gz")
    segmenting(monkeypatch, np.where(treated == 4, 0, treated))
    with pytest.raises(ValueError, match="values 3 and 4 together; is it a .*--label_map brats2024"):
        score_tumor(tmp_path / "data", "some_bundle", tmp_path / "out")
    command = ["score-tumor", "--dataset_dir", str(tmp_path / "data"), "--label_map", "brats2024"]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    with open(tmp_path / "out" / "scores.csv", encoding="utf-8") as file:
        assert [(row["dice"], row["hd95"]) for row in csv.DictReader(file)] == [("1.0", "0.0")] * 3


def test_cases_of_one_name_are_all_scored(folder):
    """BraTS 2015 has brats_2013_pat0001_1 among both its high and its low grades."""
    (folder / "test" / "pat2").rename(folder / "test" / "pat1")
    assert list(find_scored_tumors(folder)) == ["test_pat1", "train_pat1"]
