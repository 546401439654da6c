"""Finding the files of iSeg, of folders of scans and of datalists."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memnet.datasets import (
    find_evaluation_cases,
    find_iseg,
    find_training_cases,
    read_datalist,
    require_cases,
    split_folds,
)
from memnet.scans import find_scans


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(cases: list[dict[str, object]]) -> list[list[str | None]]:
    return [[None if p is None else Path(p).name for p in case["image"]] for case in cases]  # type: ignore[attr-defined]


def test_iseg_subjects_come_in_the_order_of_their_numbers(iseg_folder: Path) -> None:
    cases = find_iseg(iseg_folder)
    assert names(cases) == [[f"subject-{k}-T1.hdr", f"subject-{k}-T2.hdr"] for k in (1, 2, 10)]
    assert Path(cases[0]["label"]).name == "subject-1-label.hdr"


def test_iseg_test_subjects_are_left_out(iseg_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(iseg_folder, tmp_path / "iseg")
    touch(tmp_path / "iseg", "subject-11-T1.hdr", "subject-11-T1.img", "subject-11-T2.hdr", "subject-11-T2.img")
    assert len(find_iseg(tmp_path / "iseg")) == 3


@pytest.mark.parametrize("missing", ["subject-2-T2.hdr", "subject-1-T1.img", "subject-10-label.img"])
def test_iseg_names_the_missing_file(iseg_folder: Path, tmp_path: Path, missing: str) -> None:
    shutil.copytree(iseg_folder, tmp_path / "iseg")
    (tmp_path / "iseg" / missing).unlink()
    with pytest.raises(ValueError, match=missing.removesuffix(".hdr")):
        find_iseg(tmp_path / "iseg")


def test_iseg_in_an_empty_or_absent_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no labelled iSeg subject"):
        find_iseg(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        find_iseg(tmp_path / "absent")


def test_folder_pairs_modalities_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01_T1w.nii.gz", "sub-01_T2w.nii.gz", "sub-02_T2w.nii.gz", "t1.nii", "t2.nii", "other.nii.gz")
    touch(tmp_path, "notes.txt", "sub-01_T1w_tissue.nii.gz", "deeper/scan.nii.gz")
    assert names(find_scans(dataset_dir=tmp_path)) == [
        ["other.nii.gz", None],
        ["sub-01_T1w.nii.gz", "sub-01_T2w.nii.gz"],
        [None, "sub-02_T2w.nii.gz"],
        ["t1.nii", "t2.nii"],
    ]


def test_folder_of_unnamed_modality(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b_SS.nii.gz")
    assert names(find_scans(dataset_dir=tmp_path, modality="T2")) == [[None, "a.nii.gz"], [None, "b_SS.nii.gz"]]
    assert names(find_scans(dataset_dir=tmp_path, pattern="*_SS.nii.gz")) == [["b_SS.nii.gz", None]]


def test_iseg_folder_can_be_segmented(iseg_folder: Path) -> None:
    assert len(find_scans(dataset_dir=iseg_folder)) == 3


def test_files_given_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "b.nii")
    a, b = str(tmp_path / "a.nii"), str(tmp_path / "b.nii")
    assert names(find_scans(image=a)) == [["a.nii", None]]
    assert names(find_scans(image=[a, b], modality="T2")) == [[None, "a.nii"], [None, "b.nii"]]
    assert names(find_scans(t1=a, t2=b)) == [["a.nii", "b.nii"]]
    assert names(find_scans(t1=[a, b])) == [["a.nii", None], ["b.nii", None]]


def test_outputs_of_equal_names_are_told_apart(tmp_path: Path) -> None:
    touch(tmp_path, "s1/t1.nii.gz", "s2/t1.nii.gz", "x/s1/t1.nii.gz")
    paths = [str(tmp_path / p) for p in ("s1/t1.nii.gz", "s2/t1.nii.gz", "x/s1/t1.nii.gz")]
    assert [c["output_name"] for c in find_scans(image=paths[:2])] == ["s1_t1", "s2_t1"]
    with pytest.raises(ValueError, match="s1_t1"):
        find_scans(image=paths)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": "absent.nii"}, "absent.nii"),
        ({"t1": ["a.nii", "b.nii"], "t2": "c.nii"}, "t1 names 2 files and t2 names 1"),
        ({"image": "a.nii", "datalist": "b.json"}, "give one of them"),
        ({"image": "a.nii", "modality": "T3"}, "T3"),
        ({"dataset_dir": "absent"}, "absent"),
        ({"datalist": "absent.json"}, "absent.json"),
    ],
)
def test_scans_that_cannot_be_found(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_scans(**arguments)  # type: ignore[arg-type]


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no scan found"):
        find_scans(dataset_dir=tmp_path)


def test_nothing_given_is_refused_when_it_is_to_run() -> None:
    assert find_scans() == [] and find_evaluation_cases() == []
    with pytest.raises(ValueError, match="--image"):
        require_cases([], "scans")
    with pytest.raises(ValueError, match="--datalist"):
        require_cases(find_training_cases()["training"], "labelled cases")


def test_ten_subjects_split_as_in_the_paper() -> None:
    cases = [{"image": k} for k in range(10)]
    training, validation = split_folds(cases)
    assert validation == cases[9:] and training == cases[:9]
    folds = [split_folds(cases, 3, fold)[1] for fold in range(3)]
    assert sorted(case["image"] for fold in folds for case in fold) == list(range(10))
    with pytest.raises(ValueError, match="fold is 3"):
        split_folds(cases, 3, 3)
    with pytest.raises(ValueError, match="at least 2"):
        split_folds(cases[:1])


def test_datalist(datalist: Path) -> None:
    cases = find_training_cases(datalist=datalist)
    assert [len(cases["training"]), len(cases["validation"])] == [2, 1]
    assert cases["training"][0]["image"][1] is None
    assert Path(cases["training"][0]["label"]).is_absolute()
    assert len(find_evaluation_cases(datalist=datalist, subset="all")) == 3
    assert find_evaluation_cases(datalist=datalist) == cases["validation"]
    with pytest.raises(ValueError, match="'some'"):
        find_evaluation_cases(datalist=datalist, subset="some")  # type: ignore[arg-type]


def test_datalist_with_its_own_validation(datalist: Path) -> None:
    content = json.loads(datalist.read_text())
    content["validation"] = [content["training"].pop()]
    datalist.write_text(json.dumps(content))
    cases = find_training_cases(datalist=datalist)
    assert len(cases["training"]) == 2 and "case2" in cases["validation"][0]["label"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "section 'training'"),
        ('{"training": [{"label": "a.nii"}]}', "names no image"),
        ('{"training": [{"image": "a.nii"}]}', "has no label"),
        ('{"training": [{"image": "a.nii", "label": "b.nii"}]}', "does not exist"),
        ('{"training": []}', "empty"),
    ],
)
def test_datalist_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "datalist.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        find_training_cases(datalist=path)


def test_datalist_entries_may_be_names(tmp_path: Path, write_nifti: Callable[..., Path]) -> None:
    write_nifti("a.nii", np.ones((2, 2, 2), np.uint8))
    (tmp_path / "d.json").write_text('{"test": ["a.nii"]}')
    assert read_datalist(tmp_path / "d.json")["test"] == [{"image": str(tmp_path / "a.nii")}]
    assert names(find_scans(datalist=tmp_path / "d.json")) == [["a.nii", None]]
