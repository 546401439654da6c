"""A full disk leaves the earlier file as it was, nothing beside it, and an error that names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_cases import SMALL, TISSUE, WARNINGS, run
from conftest import phantom
from dicom_files import write_series
from full_disk import full_disk
from ignite.engine import Engine, Events, State

from memnet.benchmarks.records import write_whole
from memnet.bundle import input_error
from memnet.datasets.diffusion import write_tensors
from memnet.datasets.ismrmrd_writer import write_ismrmrd
from memnet.dicom import read_stack, save_segmentation
from memnet.transforms.tensor_outputs import draw_tensors
from memnet.transforms.writing import AtomicNibabelWriter
from memnet.whole_files import NotWrittenError
from memnet.workflow.checkpoints import TrainingCheckpoint
from memnet.workflow.evaluation import MetricsSaver
from memnet.workflow.legends import LEGENDS
from memnet.workflow.overlay import draw_overlay
from memnet.workflow.reporting import LabelReport

pytestmark = WARNINGS

NOISE = np.random.default_rng(0).integers(0, 4, (16, 16, 16)).astype(np.uint8)  # which does not compress


def save_checkpoint(target: Path) -> None:
    network = torch.nn.Linear(30, 30)
    handler = TrainingCheckpoint(target.parent, network, torch.optim.Adam(network.parameters()))
    engine = Engine(lambda engine, batch: None)
    engine.state = State(epoch=1, iteration=1)
    handler._save(engine)


def save_label_map(target: Path) -> None:
    writer = AtomicNibabelWriter(output_dtype=np.uint8)
    writer.set_data_array(torch.from_numpy(NOISE)[None], channel_dim=0)
    writer.set_metadata({"affine": np.eye(4)})
    writer.write(target)


def save_segments(target: Path) -> None:
    pytest.importorskip("highdicom")
    folder = target.parent.parent / "series"
    stack = read_stack(folder if folder.exists() else write_series(folder, NOISE.astype(np.int16)))
    save_segmentation(NOISE, stack, LEGENDS["tissue"], target)


def save_volumes(target: Path) -> None:
    report = LabelReport(target.parent, "tissue")
    report.rows = [{"file": f"scan{k}", "CSF [ml]": 1.0} for k in range(200)]
    report._write_table(SimpleNamespace())  # type: ignore[arg-type]


def save_overlay(target: Path) -> None:
    scan, labels = (target.parent.parent / name for name in ("scan.nii", "labels.nii"))
    nib.save(nib.Nifti1Image(phantom()[0], np.eye(4)), scan)
    nib.save(nib.Nifti1Image(phantom()[2], np.eye(4)), labels)
    draw_overlay(scan, labels, target, LEGENDS["tissue"])


def save_raw_data(target: Path) -> None:
    kspace = np.random.default_rng(0).normal(size=(1, 2, 4, 8, 8)).astype(np.complex64)
    write_ismrmrd(target, kspace, np.ones((1, 8, 8), bool), np.eye(4))


WRITERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "checkpoint": ("model_last.pt", save_checkpoint),
    "label map": ("labels.nii.gz", save_label_map),
    "DICOM segmentation": ("labels.dcm", save_segments),
    "table of volumes": ("tissue_volumes.csv", save_volumes),
    "overlay": ("overlay.png", save_overlay),
    "tensors": ("tensor.nii.gz", lambda target: write_tensors(target, np.random.rand(6, 6, 6, 6), np.eye(4))),
    "panel of tensors": ("panel.png", lambda target: draw_tensors(target, {"a": np.random.rand(4, 4, 4, 6)})),
    "raw data": ("scan.h5", save_raw_data),
    "record": ("record.json", lambda target: write_whole(target, "x" * 10_000)),
}


@pytest.mark.parametrize("what", WRITERS)
def test_old_file_is_intact(what: str, tmp_path: Path) -> None:
    name, write = WRITERS[what]
    target = tmp_path / "out" / name
    target.parent.mkdir()
    write(target)
    before = target.read_bytes()
    with full_disk(len(before) // 2), pytest.raises(NotWrittenError) as raised:
        write(target)
    assert str(raised.value).startswith(f"{target}: cannot be written (File too large")
    assert target.read_bytes() == before and list(target.parent.iterdir()) == [target]
    write(target)  # and there is room again


def test_tables_are_all_of_one_evaluation(tmp_path: Path) -> None:
    def save(n_cases: int) -> None:
        saver = MetricsSaver(str(tmp_path / "out"), "*", ["dice"], lambda batch: batch, summary_ops="*")
        engine = Engine(lambda engine, batch: None)
        saver.attach(engine)

        @engine.on(Events.STARTED)
        def _(engine: Any) -> None:
            engine.state.metrics = {"dice": 1 / 3}
            engine.state.metric_details = {"dice": torch.rand(n_cases, 2)}

        engine.run([[{"filename_or_obj": f"case{k}.nii.gz"} for k in range(n_cases)]])

    save(3)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert set(before) == {"metrics.csv", "dice_raw.csv", "dice_summary.csv"}
    with full_disk(200), pytest.raises(NotWrittenError, match="out: its tables cannot be written"):
        save(100)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    save(100)
    assert (tmp_path / "out" / "dice_raw.csv").read_text().count("\n") == 101


def test_run_ends_in_a_word_about_the_file(
    random_weights: Callable[..., Path],
    write_nifti: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {**SMALL, "image": str(write_nifti("a.nii.gz", phantom()[0])), "output_dir": str(tmp_path / "out")}
    options["ckpt_path"] = str(random_weights(TISSUE.folder, **SMALL))
    save = nib.save

    def save_on_full_disk(*arguments: Any) -> None:
        with full_disk(100):  # not for the whole run, whose log has room
            save(*arguments)

    monkeypatch.setattr("nibabel.save", save_on_full_disk)
    with pytest.raises(RuntimeError) as raised:
        run(TISSUE.folder, "run", "inference.json", **options)
    assert f"{tmp_path / 'out' / 'a_tissue.nii.gz'}: cannot be written" in str(input_error(raised.value))
    assert not list((tmp_path / "out").iterdir())
