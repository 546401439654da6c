"""How subjects of diffusion series are split, and that a broken split is told."""

from __future__ import annotations

import shutil

import pytest
from diffusion_cases import write_hcp, write_series
from ignite.engine import Engine

from memnet.datasets.diffusion import find_series, find_tensor_cases
from memnet.datasets.diffusion_split import SPLIT_FILE, require_split, split_subjects, tell_seen
from memnet.workflow.split_keeper import SplitKeeper


def test_sessions_of_a_subject_stay_together(tmp_path):
    for patient in range(6):
        for session in range(2):
            file = tmp_path / f"sub-{patient}" / f"ses-{session}" / "dwi" / f"sub-{patient}_ses-{session}_dwi.nii.gz"
            file.parent.mkdir(parents=True)
            file.touch()
    sections = split_subjects(find_series(tmp_path), 2, 1, 2)
    patients = {section: {case["subject"][:5] for case in cases} for section, cases in sections.items()}
    assert [len(cases) for cases in sections.values()] == [4, 2, 4]
    assert [len(some) for some in patients.values()] == [2, 1, 2] and len(set.union(*patients.values())) == 5


def test_test_subjects_do_not_depend_on_how_many_train():
    cases = [{"subject": str(i)} for i in range(12)]
    few, many = (split_subjects(cases, n, 2, 3, seed=4) for n in (2, None))
    assert few["test"] == many["test"] and few["validation"] == many["validation"]
    assert [len(few[s]) for s in ("training", "validation", "test")] == [2, 2, 3] and len(many["training"]) == 7
    names = [case["subject"] for section in many.values() for case in section]
    assert sorted(names, key=int) == [str(i) for i in range(12)]
    with pytest.raises(ValueError, match="12 subjects are there; .* need 14"):
        split_subjects(cases, 8, 3, 3)


@pytest.mark.parametrize("layout", ["flat", "folders", "hcp"])
def test_names_tell_the_patient(layout, tmp_path):
    for patient in range(6):
        for session in (1, 2):
            bids, hcp = f"sub-{patient}_ses-{session}", f"10030{patient}" + ("_Retest" if session == 2 else "")
            file = {
                "flat": tmp_path / f"{bids}_dwi.nii.gz",
                "folders": tmp_path / bids / "dwi.nii.gz",
                "hcp": tmp_path / hcp / "T1w" / "Diffusion" / "data.nii.gz",
            }[layout]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            file.with_name(file.name.replace(".nii.gz", ".bval")).write_text("0 " + "1000 " * 6)
    sections = split_subjects(find_series(tmp_path), None, 1, 2)
    patients = [{case["subject"][:6] for case in cases} for cases in sections.values()]
    assert [len(cases) for cases in sections.values()] == [6, 2, 4]
    assert [len(some) for some in patients] == [3, 1, 2] and len(set.union(*patients)) == 6


def test_a_training_goes_on_with_the_subjects_that_it_had(tmp_path, caplog):
    data, file = write_hcp(tmp_path / "hcp", 4, shape=(7, 6, 6)), tmp_path / "run" / SPLIT_FILE
    cases = find_tensor_cases(str(data), tmp_path / "cache", split_seed=1)
    keep_split(cases, file)
    assert require_split(cases, file) == cases == require_split(cases, file, resume=True)
    moved = find_tensor_cases(str(shutil.copytree(data, tmp_path / "moved")), tmp_path / "moved_cache", split_seed=1)
    assert require_split(moved, file, resume=True) == moved
    assert tell_seen(cases, "test", file.with_name("model_best.pt")) == cases and not caplog.text
    other = find_tensor_cases(str(data), tmp_path / "cache", split_seed=2)
    with pytest.raises(ValueError, match="had other subjects for training"):
        require_split(other, file, resume=True)
    seen = {"training": [], "validation": [], "test": cases["training"] + cases["test"]}
    tell_seen(seen, "test", tmp_path / "elsewhere" / "model.pt")
    assert not caplog.text
    tell_seen(seen, "test", file.with_name("model_best.pt"))
    assert "2 of 3 test series were trained on" in caplog.text
    caplog.clear()
    file.replace(file.with_suffix(".previous.json"))  # another training in the folder, see TrainingCheckpoint
    keep_split(other, file)
    tell_seen(seen, "test", file.with_name("model_best.previous.pt"))
    assert "2 of 3 test series were trained on" in caplog.text and "split.previous.json" in caplog.text
    file.write_text("[")
    with pytest.raises(ValueError, match="split.json: is no split that a training has written"):
        require_split(cases, file, resume=True)


def keep_split(cases, file):
    """Begin a training."""
    file.parent.mkdir(exist_ok=True)
    engine = Engine(lambda engine, batch: None)
    SplitKeeper(cases, file).attach(engine)
    engine.run([0])


def test_folders_of_sections(tmp_path, caplog):
    for section, patients in {"training": "123", "validation": "4", "test": "51"}.items():
        for patient in patients:
            names = [f"sub-{patient}_dwi{suffix}" for suffix in (".nii.gz", ".bval", ".bvec", "_mask.nii.gz")]
            write_series(tmp_path / "data" / section, (7, 6, 6), names=names)
    cases = find_tensor_cases(str(tmp_path / "data"), tmp_path / "cache", n_training=2)
    assert [case["subject"] for case in cases["training"]] == ["sub-1_dwi", "sub-2_dwi"]
    assert not (tmp_path / "cache" / "training" / "sub-3_dwi").exists()  # what is left out is not prepared
    assert "sub-1 is in training and in test" in caplog.text and "sub-5 is in" not in caplog.text
    for wrong in (0, 4, -1):
        with pytest.raises(ValueError, match=f"n_training is {wrong}; .* has 3 subjects"):
            find_tensor_cases(str(tmp_path / "data"), tmp_path / "cache", n_training=wrong)
