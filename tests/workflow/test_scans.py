"""Which scans are one subject's, and what their names tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memnet.datasets import find_training_cases
from memnet.workflow.scans import find_scans, list_scans, tell_modality

FOUR = ("T1", "T1c", "T2", "FLAIR")


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("sub-01_ses-T2_T1w", "T1"),
        ("sub-01_ses-T1_FLAIR", "FLAIR"),
        ("sub-01_space-T1w_FLAIR", "FLAIR"),
        ("sub-01_space-T1w_desc-preproc_T2w", "T2"),
        ("sub-01_acq-T1sel_T2w", "T2"),
        ("sub-01_acq-T1_FLAIR", "FLAIR"),
        ("sub-01_acq-FLAIR_T2w", "FLAIR"),
        ("sub-01_ses-gd_T1w", "T1"),
        ("sub-01-T1", "T1"),
        ("sub-01-T2-ce", "T2"),
        ("FLAIR_to_T1", "FLAIR"),
        ("T2_space-T1w", "T2"),
        ("sub-01_ses-T1", None),
        ("sub-01_desc-gd_T1w", "T1c"),
        ("sub-T1", "T1"),
    ],
)
def test_sessions_and_spaces_are_no_modalities(stem: str, expected: str | None) -> None:
    """A second session's T1 went into the channel of the T2, without a word."""
    assert tell_modality(f"{stem}.nii.gz", FOUR) == expected


def test_sessions_are_subjects_of_their_own(tmp_path: Path) -> None:
    names = [f"sub-01_ses-{session}_{kind}.nii.gz" for session in ("T1", "T2") for kind in ("T1w", "T2w")]
    touch(tmp_path, *names)
    found = [[Path(file).name for file in case["image"]] for case in find_scans(dataset_dir=tmp_path)]
    assert found == [names[:2], names[2:]]


def test_label_files_of_bids_are_no_scans(tmp_path: Path) -> None:
    """They were segmented as further subjects."""
    others = [
        "dseg",
        "label-GM_probseg",
        "desc-aseg_dseg",
        "desc-aparcaseg_dseg",
        "desc-brain_mask",
        "desc-brain_dseg",
        "brainmask",
    ]
    others += ["aparc+aseg", "aparc.a2009s+aseg", "aseg"]
    touch(tmp_path, "sub-01_T1w.nii.gz", *(f"sub-01_{name}.nii.gz" for name in others))
    (found,) = find_scans(dataset_dir=tmp_path)
    assert Path(found["image"][0]).name == "sub-01_T1w.nii.gz"


def test_of_one_scan_in_two_formats_one_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a_T1.nrrd", "a_T1.mha", "a_T1.nii.gz", "b_T1_roi.nii.gz")
    found = [Path(case["image"][0]).name for case in find_scans(dataset_dir=tmp_path)]
    assert found == ["a_T1.nii.gz", "b_T1_roi.nii.gz"] and caplog.text.count("in another format") == 2


def test_freesurfers_files_are_named_one_by_one(tmp_path: Path) -> None:
    touch(tmp_path, "orig.mgz", "aseg.mgz")
    with pytest.raises(ValueError, match="no scan found .*; of files such as aseg.mgz name the scan: --image"):
        find_scans(dataset_dir=tmp_path)


def test_a_datalist_of_volumes_and_series_serves_training_too(tmp_path: Path) -> None:
    """Of the Decathlon's files, which hold all modalities, it is what a datalist must be; training refused it."""
    touch(tmp_path, *(f"{k}.nii.gz" for k in range(4)), *(f"{k}_seg.nii.gz" for k in range(4)))
    (tmp_path / "study").mkdir()
    cases = [{"image": [f"{k}.nii.gz:{v}" for v in (1, 2, 3, 0)], "label": f"{k}_seg.nii.gz"} for k in range(3)]
    cases.append({"image": ["study:1.2.3", None, None, None], "label": "3_seg.nii.gz"})
    datalist = tmp_path / "list.json"
    datalist.write_text(json.dumps({"training": cases}))
    split = find_training_cases(datalist=datalist, n_folds=4)
    assert [len(part) for part in split.values()] == [3, 1]
    listed = list_scans(dict.fromkeys(FOUR), datalist=datalist)
    assert [case["image"] for case in split["training"]] == [case["image"] for case in listed[:3]]
    datalist.write_text(
        json.dumps({"training": [*cases, {"image": ["no.nii.gz:1", None, None, None], "label": "0_seg.nii.gz"}]})
    )
    with pytest.raises(ValueError, match=r"no\.nii\.gz:1, which does not exist"):
        find_training_cases(datalist=datalist)
