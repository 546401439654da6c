"""MONAI Label serves the segmentation bundles; run by `make test-label`, since it wants an environment of its own."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests
import torch
from conftest import BUNDLES, phantom

TISSUE, TUMOR = "brain_mri_tissue_invres", "brain_mri_tumor_invres"
CPU = {"device": "cpu"}
SHAPE = (40, 44, 36)


@dataclass(frozen=True)
class Server:
    """A running server, its folder of scans and that of its bundles."""

    url: str
    studies: Path
    models: Path

    def call(self, method: str, path: str, **request: Any) -> requests.Response:
        response = requests.request(method, self.url + path, timeout=1200, **request)
        assert response.ok, f"{path}: {response.status_code} {response.text}"
        return response

    def infer(self, model: str, image: str, **params: Any) -> np.ndarray:
        form = {"params": (None, json.dumps({**CPU, **params}))}
        content = self.call("POST", f"/infer/{model}?image={image}&output=image", files=form).content
        return np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(content)).dataobj)


def _save(path: Path, values: np.ndarray) -> Path:
    affine = np.array([[-1.1, 0, 0, 20], [0, 1, 0, -18], [0, 0, 1.2, 4], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server as `make label-server` starts it, with two T1 scans and a patient's four modalities in one file."""
    folder = tmp_path_factory.mktemp("monai label")  # a space, as folders of scans have
    studies, app = folder / "studies", folder / "app"
    studies.mkdir()
    for number in range(2):
        _save(studies / f"sub-{number}_T1w.nii.gz", phantom(SHAPE, number)[0])
    t1, t2, _ = phantom(SHAPE, 2)
    _save(studies / "patient.nii.gz", np.stack([t1, 2 * t1, t2, t2[::-1]], -1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["make", "label-server", f"STUDIES={studies}", f"LABEL_APP={app}", f"LABEL_PORT={port}"]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=BUNDLES.parent, stdout=log, stderr=log, start_new_session=True)
        try:
            started = Server(f"http://127.0.0.1:{port}", studies, app / "monaibundle" / "model")
            _wait_for(started, process, folder / "log")
            yield started
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait_for(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        try:
            server.call("GET", "/info/")
            return
        except requests.ConnectionError:
            time.sleep(1)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-3000:]}")


def _segment(bundle: str, image: Path, folder: Path, *options: str) -> np.ndarray:
    """Segment a scan on the command line."""
    command = [
        sys.executable,
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        str(BUNDLES / bundle / "configs/inference.json"),
    ]
    command += ["--image", str(image), "--output_dir", str(folder), "--device", "cpu", *options]
    subprocess.run(command, check=True, capture_output=True)
    return np.asarray(nib.load(next(folder.glob("*.nii.gz"))).dataobj)


def test_offers_both_bundles_for_inference_and_training(server: Server) -> None:
    info = server.call("GET", "/info/").json()
    assert info["models"][TISSUE]["labels"] == {"csf": 1, "gm": 2, "wm": 3}
    assert info["models"][TUMOR]["labels"] == {"necrotic core": 1, "oedema": 2, "enhancing tumour": 3}
    assert set(info["trainers"]) == {TISSUE, TUMOR}


def test_segments_as_the_command_line_does(server: Server, tmp_path: Path) -> None:
    expected = _segment(TISSUE, server.studies / "sub-0_T1w.nii.gz", tmp_path)
    assert set(np.unique(expected)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(server.infer(TISSUE, "sub-0_T1w"), expected)


@pytest.mark.parametrize(("bundle", "image"), [(TISSUE, "sub-0_T1w"), (TUMOR, "patient")])
def test_trains_on_a_saved_label(server: Server, tmp_path: Path, bundle: str, image: str) -> None:
    shipped = BUNDLES / bundle / "models" / "model.pt"
    before = shipped.read_bytes()
    label = _save(tmp_path / "label.nii.gz", phantom(SHAPE, 0)[2])
    with label.open("rb") as file:
        server.call("PUT", f"/datastore/label?image={image}", files={"label": file})
    untrained = server.infer(bundle, image)
    server.call("POST", f"/train/{bundle}?run_sync=true", json={**CPU, "max_epochs": 1})

    models = server.models / bundle / "models"
    assert shipped.read_bytes() == (models / "model.pt").read_bytes() == before
    trained = torch.load(models / "model_last.pt", weights_only=True)["model"]
    # the training began with the shipped weights: an epoch moves them a little
    for key, start in torch.load(shipped, weights_only=True).items():
        assert (trained[key] - start).norm() < 0.1 * start.norm() + 0.1, key
    assert "model_last.pt" in server.call("GET", "/info/").json()["trainers"][bundle]["config"]["model_filename"]
    segmented = server.infer(bundle, image, model_filename="model_last.pt")
    assert (segmented != untrained).any()
    np.testing.assert_array_equal(server.infer(bundle, image), untrained)


def test_segments_all_unlabelled_scans(server: Server) -> None:
    server.call("POST", f"/batch/infer/{TISSUE}?images=unlabeled&run_sync=true", json={**CPU, "multi_gpu": False})
    saved = nib.load(server.studies / "labels" / "original" / "sub-1_T1w.nii.gz")
    np.testing.assert_array_equal(np.asarray(saved.dataobj), server.infer(TISSUE, "sub-1_T1w"))


def test_segments_four_modalities_in_one_file(server: Server, tmp_path: Path) -> None:
    expected = _segment(TUMOR, server.studies / "patient.nii.gz", tmp_path, "--enhancing_label", "3")
    assert expected.any() and expected.max() <= 3
    np.testing.assert_array_equal(server.infer(TUMOR, "patient"), expected)
