"""Finding the files of iSeg, of folders of scans and of datalists."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memnet.datasets import (
    find_brats,
    find_evaluation_cases,
    find_iseg,
    find_training_cases,
    read_datalist,
    require_cases,
    split_folds,
)
from memnet.workflow.scans import find_scans, list_scans, tell_modality


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


def test_a_name_says_what_a_scan_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a_T1w.nii", "a_T2w.nii", "b_FLAIR.nii", "b_T1c.nii", "c.nii")
    assert names(find_scans(image=str(tmp_path / "a_T2w.nii"))) == [[None, "a_T2w.nii"]]
    assert names(find_scans(image=str(tmp_path / "a_T1w.nii"), modality="T2")) == [["a_T1w.nii", None]]
    assert caplog.text == ""
    assert names(find_scans(image=str(tmp_path / "b_FLAIR.nii"))) == [["b_FLAIR.nii", None]]
    assert "b_FLAIR.nii: taken for a T1, though its name tells FLAIR" in caplog.text
    assert names(find_scans(dataset_dir=tmp_path)) == [["a_T1w.nii", "a_T2w.nii"], ["c.nii", None]]
    assert "b_T1c.nii: left out, its name tells T1c, which is none of T1, T2" in caplog.text
    assert "b_FLAIR.nii: left out" in caplog.text


def test_label_maps_beside_scans_are_none(tmp_path: Path) -> None:
    touch(
        tmp_path, "a.nii", "a_labels.nii", "a_classified.nii", "a-segmentation.nii", "a_seg.nii", "b.nii", "b_mask.nii"
    )
    assert names(find_scans(dataset_dir=tmp_path)) == [["a.nii", None], ["b.nii", None]]


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


def test_an_argument_without_a_value_is_refused() -> None:
    """As ``--t1 $SCAN`` is where the variable is empty."""
    for arguments in ({"t1": True}, {"image": True}):
        with pytest.raises(ValueError, match="is a variable empty"):
            find_scans(**arguments)


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


BRATS = {
    "BraTS20_Training": ("_t1", "_t1ce", "_t2", "_flair", "_seg"),
    "BraTS-GLI": ("-t1n", "-t1c", "-t2w", "-t2f", "-seg"),
}


def touch_brats(folder: Path, *cases: str, suffix: str = ".nii.gz", without: str = "") -> None:
    for case in cases:
        endings = next(e for prefix, e in BRATS.items() if case.startswith(prefix))
        touch(folder, *(f"{case}/{case}{e}{suffix}" for e in endings if f"{case}{e}" != without))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("case", "endings"),
    [("BraTS20_Training_001", BRATS["BraTS20_Training"]), ("BraTS-GLI-00000-000", BRATS["BraTS-GLI"])],
)
def test_brats_channels_come_in_order(tmp_path: Path, case: str, endings: tuple[str, ...], suffix: str) -> None:
    touch_brats(tmp_path / "MICCAI_TrainingData" / "HGG", case, suffix=suffix)
    touch(tmp_path, "MICCAI_TrainingData/name_mapping.csv")
    (found,) = find_brats(tmp_path)
    assert names([found]) == [[f"{case}{ending}{suffix}" for ending in endings[:4]]]
    assert Path(found["label"]).name == f"{case}{endings[4]}{suffix}"


def test_brats_names_may_be_in_capitals(tmp_path: Path) -> None:
    endings = ("_T1", "_T1CE", "_T2", "_FLAIR", "_SEG")
    touch(tmp_path, *(f"Case_1/CASE_1{ending}.NII.gz" for ending in endings))
    (found,) = find_brats(tmp_path)
    assert names([found]) == [[f"CASE_1{ending}.NII.gz" for ending in endings[:4]]]
    assert Path(found["label"]).name == "CASE_1_SEG.NII.gz"


def test_brats_labels_under_another_name(tmp_path: Path) -> None:
    case = "BraTS20_Training_355"
    touch_brats(tmp_path, case, suffix=".nii", without=f"{case}_seg")
    touch(tmp_path, f"{case}/W39_1998.09.19_Segm.nii")
    assert Path(find_brats(tmp_path)[0]["label"]).name == "W39_1998.09.19_Segm.nii"


def test_brats_case_without_labels_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch_brats(tmp_path, "BraTS20_Training_001")
    touch_brats(tmp_path, "BraTS20_Training_002", without="BraTS20_Training_002_seg")
    assert len(find_brats(tmp_path)) == 1
    assert "BraTS20_Training_002" in caplog.text


def test_brats_names_case_and_missing_file(tmp_path: Path) -> None:
    touch_brats(tmp_path, "BraTS20_Training_001", "BraTS20_Training_002", without="BraTS20_Training_002_t1ce")
    with pytest.raises(ValueError, match=r"T1c of case BraTS20_Training_002 .*BraTS20_Training_002_t1ce\.nii\.gz"):
        find_brats(tmp_path)
    found = find_brats(tmp_path, allow_missing=True)
    assert found[1]["image"][1] is None and found[1]["image"][0] is not None


@pytest.mark.parametrize("kind", ["absent", "empty", "without labels"])
def test_brats_folder_without_cases(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "brats"
    if kind != "absent":
        folder.mkdir()
    if kind == "without labels":
        touch_brats(folder, "BraTS20_Training_001", without="BraTS20_Training_001_seg")
    with pytest.raises(ValueError, match="but 1 without labels" if kind == "without labels" else "BraTS"):
        find_training_cases(folder, layout="brats")


def test_brats_split_is_fixed_and_eighty_to_twenty(tmp_path: Path) -> None:
    touch_brats(tmp_path, *(f"BraTS20_Training_{k:03d}" for k in range(1, 31)))
    split = find_training_cases(tmp_path, n_folds=5, layout="brats", seed=0)
    assert [len(split["training"]), len(split["validation"])] == [24, 6]
    assert split == find_training_cases(tmp_path, n_folds=5, layout="brats", seed=0)
    assert split["validation"] == find_evaluation_cases(tmp_path, n_folds=5, layout="brats", seed=0)
    assert split["validation"] != find_training_cases(tmp_path, n_folds=5, layout="brats", seed=1)["validation"]
    folds = [find_evaluation_cases(tmp_path, n_folds=5, fold=k, layout="brats", seed=0) for k in range(5)]
    assert len({case["label"] for fold in folds for case in fold}) == 30
    assert set(split["training"][0]) == {"image", "label"}


def test_time_points_of_a_patient_stay_together(tmp_path: Path) -> None:
    touch_brats(tmp_path, *(f"BraTS-GLI-{k:05d}-{t:03d}" for k in range(10) for t in range(3)))
    split = find_training_cases(tmp_path, n_folds=5, layout="brats", seed=0)
    patients = {k: {Path(case["label"]).name[:15] for case in cases} for k, cases in split.items()}
    assert len(patients["training"]) == 8 and len(patients["validation"]) == 2
    assert not patients["training"] & patients["validation"]
    touch_brats(tmp_path / "one", "BraTS-GLI-00000-000", "BraTS-GLI-00000-001")
    with pytest.raises(ValueError, match="2 labelled cases of 1 patient found.*at least 2"):
        find_training_cases(tmp_path / "one", layout="brats")


def test_time_points_of_a_patient_stay_together_in_a_datalist(tmp_path: Path) -> None:
    """Those that a label's name or folder tells, or the entry itself."""
    touch_brats(tmp_path, *(f"BraTS-GLI-{k:05d}-{t:03d}" for k in range(10) for t in range(2)))
    touch(tmp_path, *(f"own{k}.nii" for k in range(6)))
    folders = sorted(f.name for f in tmp_path.glob("BraTS*"))
    cases = [{"image": [f"{n}/{n}-t1n.nii.gz", *[None] * 3], "label": f"{n}/{n}-seg.nii.gz"} for n in folders]
    cases += [{"image": f"own{k}.nii", "label": f"own{k}.nii", "patient": k // 2} for k in range(6)]
    (tmp_path / "list.json").write_text(json.dumps({"training": cases}))
    for fold in range(5):
        split = find_training_cases(datalist=tmp_path / "list.json", n_folds=5, fold=fold, layout="brats", seed=fold)
        told = [
            {name[:15] if name.startswith("BraTS") else f"own{int(name[3]) // 2}" for name in map(label_name, cases)}
            for cases in split.values()
        ]
        assert not told[0] & told[1] and len(told[0] | told[1]) == 13
        assert set(split["training"][0]) == {"image", "label"}


def label_name(case: dict[str, Any]) -> str:
    return Path(case["label"]).name


FOUR = ("T1", "T1c", "T2", "FLAIR")


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        *[(s, "T1c") for s in (
            "sub-01_ce-gadolinium_run-1_T1w", "sub-01_ce-gd_rec-norm_T1w", "p_T1_postGd", "p_T1_MPRAGE_post", "p_T1+C",
            "p_T1_contrast", "T1_gadolinium", "sub-01_acq-postcontrast_T1w", "p_T1_KM", "AX T1 POST", "p_T1_CE", "x_T1_C_2")],
        *[(s, "FLAIR") for s in ("p_T2_AX_FLAIR", "p_T2.FLAIR", "p T2 FLAIR", "t2_tse_dark-fluid_FLAIR")],
        *[(s, "T1") for s in (
            "p_T1_pre-contrast", "p_T1_precontrast", "sub-1_ses-post_T1w", "p_T1_post_op", "c_T1", "T1_no_contrast")],
        ("sub-01_ce-gd_T2w", "T2"),
        ("contrast", None),
    ],
)  # fmt: skip
def test_words_apart_tell_a_modality(stem: str, expected: str | None) -> None:
    assert tell_modality(f"{stem}.nii.gz", FOUR) == expected


def test_words_of_a_modality_are_not_the_subject_s(tmp_path: Path) -> None:
    files = ["sub-1_run-1_T1w.nii", "sub-1_ce-gd_run-1_T1w.nii", "sub-1_run-1_T2w.nii", "sub-1_run-1_T2w_FLAIR.nii"]
    touch(tmp_path, *files)
    assert names(list_scans(dict.fromkeys(FOUR), dataset_dir=tmp_path)) == [files]


@pytest.mark.parametrize(
    "files",
    [
        ["BraTS20_Training_001_t1.nii", "BraTS20_Training_001_t1ce.nii", "BraTS20_Training_001_t2.nii",
         "BraTS20_Training_001_flair.nii"],
        ["BraTS-GLI-00000-000-t1n.nii.gz", "BraTS-GLI-00000-000-t1c.nii.gz", "BraTS-GLI-00000-000-t2w.nii.gz",
         "BraTS-GLI-00000-000-t2f.nii.gz"],
        ["sub-01_T1w.nii.gz", "sub-01_ce-gadolinium_T1w.nii.gz", "sub-01_T2w.nii.gz", "sub-01_FLAIR.nii.gz"],
        ["T1.nii", "T1Gd.nii", "T2.nii", "T2_FLAIR.nii"],
        ["p_T1.nii", "p_T1_post-contrast.nii", "p_T2w.nii", "p_T2w_FLAIR.nii"],
        ["P-T1W.nii", "P-T1W-CE.nii", "P-T2W.nii", "P-T2W-FLAIR.nii"],
    ],
    ids=["BraTS 2020", "BraTS-GLI", "BIDS", "plain", "post-contrast", "hyphens"],
)  # fmt: skip
def test_four_modalities_are_told_by_their_names(tmp_path: Path, files: list[str]) -> None:
    touch(tmp_path, *files, "x_seg.nii.gz", "W39_1998.09.19_Segm.nii", f"{files[3].split('.')[0]}_tumor.nii.gz")
    assert names(list_scans(dict.fromkeys(FOUR), dataset_dir=tmp_path)) == [files]


def test_scans_in_a_folder_a_case(tmp_path: Path) -> None:
    touch_brats(tmp_path, "BraTS20_Training_001", "BraTS20_Training_002", without="BraTS20_Training_002_t1")
    found = list_scans(dict.fromkeys(FOUR), dataset_dir=tmp_path, subfolders=True)
    assert [row[0] for row in names(found)] == ["BraTS20_Training_001_t1.nii.gz", None]
    with pytest.raises(ValueError, match="subfolders are not searched"):
        list_scans(dict.fromkeys(FOUR), dataset_dir=tmp_path)
    touch(tmp_path / "bids", *(f"sub-{n}/anat/sub-{n}_{kind}.nii" for n in (1, 2) for kind in ("T2w", "FLAIR")))
    found = list_scans(dict.fromkeys(FOUR), dataset_dir=tmp_path / "bids", subfolders=True)
    assert names(found) == [[None, None, f"sub-{n}_T2w.nii", f"sub-{n}_FLAIR.nii"] for n in (1, 2)]


def test_unnamed_modality_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a_flair.nii", "brain.nii")
    assert names(list_scans(dict.fromkeys(FOUR), dataset_dir=tmp_path)) == [[None, None, None, "a_flair.nii"]]
    assert "brain.nii" in caplog.text
    with pytest.raises(ValueError, match="--modality"):
        list_scans(dict.fromkeys(FOUR), image=tmp_path / "brain.nii")
    assert names(list_scans(dict.fromkeys(FOUR), image=tmp_path / "brain.nii", modality="T2"))[0][2] == "brain.nii"
    datalist = tmp_path / "d.json"
    datalist.write_text('{"test": [["a_flair.nii", "brain.nii"]]}')
    with pytest.raises(ValueError, match=r"the 4 modalities \[T1, T1c, T2, FLAIR\], got 2"):
        list_scans(dict.fromkeys(FOUR), datalist=datalist)


def test_flags_put_modalities_together(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "b.nii", "c.nii")
    a, b, c = (str(tmp_path / f"{x}.nii") for x in "abc")
    assert names(list_scans({**dict.fromkeys(FOUR), "T1c": a, "FLAIR": b})) == [[None, "a.nii", None, "b.nii"]]
    with pytest.raises(ValueError, match="t1c names 1 files and flair names 2"):
        list_scans({**dict.fromkeys(FOUR), "T1c": a, "FLAIR": [b, c]})


def test_datalist_of_files_that_hold_all_modalities_is_refused(tmp_path: Path) -> None:
    declared = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"modality": declared, "training": [{"image": "a.nii.gz", "label": "b.nii.gz"}]}))
    with pytest.raises(ValueError, match="a.nii.gz:0 is FLAIR, a.nii.gz:1 is T1w"):
        read_datalist(path)
    volumes = ["a.nii.gz:1", "a.nii.gz:2", "a.nii.gz:3", "a.nii.gz:0"]
    path.write_text(json.dumps({"modality": declared, "training": [{"image": volumes, "label": "b.nii.gz"}]}))
    assert read_datalist(path)["training"][0]["image"] == [str(tmp_path / volume) for volume in volumes]


def test_image_of_four_volumes_is_one_subject(write_nifti: Callable[..., Path]) -> None:
    modalities = dict.fromkeys(("T1", "T1c", "T2", "FLAIR"))
    path = write_nifti("patient_T1.nii.gz", np.ones((3, 4, 5, 4), np.float32))
    assert list_scans(modalities, image=path) == [{"image": [path], "output_name": "patient_T1"}]
    # where a modality is named the file is of one, the one its name tells first, which the reader then refuses
    assert list_scans(modalities, image=path, modality="T2")[0]["image"] == [path, None, None, None]
    volumes = list_scans({**modalities, "T1": f"{path}:1", "FLAIR": f"{path}:0"})
    assert volumes == [{"image": [f"{path}:1", None, None, f"{path}:0"], "output_name": "patient_T1"}]
    with pytest.raises(ValueError, match="absent.nii:0: no such file"):
        list_scans({**modalities, "T1": "absent.nii:0"})
