"""A folder of a DICOM series is as good an input to a segmentation bundle as a NIfTI file of the same volume."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundle_cases import SMALL, WARNINGS, BundleCase, cases, run
from conftest import phantom
from dicom_files import SECRETS, places, read_segments, segment_places, write_series

from memnet.workflow.legends import LEGENDS

pytestmark = WARNINGS

OBLIQUE = np.array([[-0.96, 0.28, 0, -10], [-0.28, -0.96, 0, 5], [0, 0, 1.5, 0], [0, 0, 0, 1.0]])


@cases
def test_dicom_gives_what_nifti_gives(
    case: BundleCase,
    random_weights: Callable[..., Path],
    write_nifti: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    values = np.rint(phantom((18, 16, 14))[0]).astype(np.int16)
    options = {**SMALL, "ckpt_path": str(random_weights(case.folder, **SMALL)), "overlay": True}
    inputs = {
        "nifti": write_nifti("a_T1.nii.gz", values, OBLIQUE),
        "dicom": f"{write_series(tmp_path / 'in' / 'a_T1', values, OBLIQUE)}:1.2.3.4",
    }
    for kind, scan in inputs.items():
        run(
            case.folder,
            "run",
            "inference.json",
            **options,
            **{case.flag: str(scan), "output_dir": str(tmp_path / kind)},
        )
    stem = f"a_T1_{case.postfix}"
    outputs = {f"{stem}.nii.gz", f"{stem}.png", case.table, "inference.html"}
    assert {file.name for file in (tmp_path / "nifti").iterdir()} == outputs
    with_uid = f"a_T1_1.2.3.4_{case.postfix}"
    of_dicom = {f"{with_uid}.nii.gz", f"{with_uid}.png", f"{with_uid}.dcm", case.table, "inference.html"}
    assert {file.name for file in (tmp_path / "dicom").iterdir()} == of_dicom
    files = tmp_path / "nifti" / f"{stem}.nii.gz", tmp_path / "dicom" / f"{with_uid}.nii.gz"
    expected, found = (nib.load(file) for file in files)
    labels = np.asarray(expected.dataobj)
    assert len(np.unique(labels)) > 1
    np.testing.assert_array_equal(found.dataobj, labels)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)
    tables = [(tmp_path / kind / case.table).read_text().splitlines()[1].split(",", 1) for kind in inputs]
    assert tables[0][1] == tables[1][1]

    segments, ds = read_segments(tmp_path / "dicom" / f"{with_uid}.dcm")
    for label, (of_class, _) in LEGENDS[case.postfix].classes.items():
        at = places(np.isin(labels, of_class), OBLIQUE)
        np.testing.assert_allclose(segment_places(segments[label], ds), at, atol=1e-4)

    assert f"{with_uid}.dcm" in caplog.text
    printed = caplog.text + "".join(capfd.readouterr())
    for file in (tmp_path / "dicom").iterdir():
        if file.suffix != ".dcm":
            content = file.read_bytes()
            printed += (gzip.decompress(content) if file.suffix == ".gz" else content).decode("latin-1")
    assert not any(secret in printed for secret in SECRETS)
