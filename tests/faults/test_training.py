"""A training survives being killed, keeps to its folder, runs no code of its files, and says what would fit."""

from __future__ import annotations

import fcntl
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_cases import SMALL, SMALL_TRAINING, TISSUE, WARNINGS, run
from monai.bundle import ConfigWorkflow
from torch._subclasses import FakeTensor

from memnet import FullyInvResUNet, bundle
from memnet.accounting.planner import TrainingStep
from memnet.bundle import _is_news, _print_input_error, input_error
from memnet.workflow import checkpoints, out_of_memory
from memnet.workflow.checkpoints import load_weights
from memnet.workflow.out_of_memory import is_out_of_memory, what_fits

pytestmark = WARNINGS

CONFIG = TISSUE.folder / "configs" / "train.json"


def train(data: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    options = {**SMALL_TRAINING, "dataset_dir": str(data), "epochs": 4, **overrides}
    run(TISSUE.folder, "training", "train.json", **options, output_dir=str(output))
    return torch.load(output / "model_last.pt", weights_only=True)


def test_an_interrupted_training_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: ConfigWorkflow) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ConfigWorkflow, "run", interrupted)
    workflow = ConfigWorkflow(str(CONFIG), run_id="training", logging_file=False, output_dir=str(tmp_path))
    with pytest.raises(KeyboardInterrupt) as raised:
        workflow.run()
    error = (raised.type, raised.value, raised.tb)
    assert not _is_news(logging.LogRecord("ignite", logging.ERROR, __file__, 1, "Exception", None, error))
    capsys.readouterr()
    codes: list[int] = []
    monkeypatch.setattr(bundle, "_exit_at_once", lambda code, patience: codes.append(code))
    _print_input_error(*error)
    (tmp_path / "model_last.pt").touch()  # of another training, or of one that is evaluated now
    _print_input_error(*error)
    checkpoints.written.add(tmp_path / "model_last.pt")
    _print_input_error(*error)
    checkpoints.written.clear()
    told = "interrupted\ninterrupted\ninterrupted; the same command with --resume true goes on from "
    assert capsys.readouterr().err == f"{told}{tmp_path / 'model_last.pt'}\n" and codes == [130] * 3


def test_killed_training_goes_on_to_the_same_weights(iseg_folder: Path, tmp_path: Path) -> None:
    overrides = {**SMALL_TRAINING, "dataset_dir": iseg_folder, "epochs": 4, "output_dir": tmp_path / "killed"}
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str(CONFIG)]
    command += [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    last = tmp_path / "killed" / "model_last.pt"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as training:
        while not last.exists():
            assert training.poll() is None, "the training ended before it had saved anything"
            time.sleep(0.005)
        training.send_signal(signal.SIGKILL)
    epoch = torch.load(last, weights_only=True)["epoch"]
    assert 1 <= epoch < 4
    # what one that is killed while it saves would leave
    (last.parent / ".partial-01234567-model_last.pt").write_bytes(b"half")
    resumed = train(iseg_folder, tmp_path / "killed", resume=True)
    whole = train(iseg_folder, tmp_path / "whole")
    assert resumed["epoch"] == 4 and resumed["best_metric"] == whole["best_metric"]
    assert [key for key, value in whole["model"].items() if not torch.equal(resumed["model"][key], value)] == []
    assert not list(last.parent.glob(".partial*"))


def test_folder_of_another_training_is_refused(iseg_folder: Path, tmp_path: Path) -> None:
    first = train(iseg_folder, tmp_path, epochs=1)
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(RuntimeError) as raised:
        train(iseg_folder, tmp_path, epochs=1)
    assert f"{tmp_path}: another training is writing here" in str(input_error(raised.value))
    os.close(other)
    left = torch.load(tmp_path / "model_last.pt", weights_only=True)
    assert all(torch.equal(left["model"][key], value) for key, value in first["model"].items())
    assert not (tmp_path / "model_last.previous.pt").exists()
    train(iseg_folder, tmp_path, epochs=1)
    assert (tmp_path / "model_last.previous.pt").exists()


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_resumed_training_of_another_length_is_refused(iseg_folder: Path, tmp_path: Path) -> None:
    last = tmp_path / "model_last.pt"
    train(iseg_folder, tmp_path, epochs=1, val_interval=2)
    before = last.read_bytes()
    with pytest.raises(RuntimeError) as raised:
        train(iseg_folder, tmp_path, epochs=2, resume=True)
    assert f"{last}: its learning rate ends at 1 (T_max)" in str(input_error(raised.value))
    assert last.read_bytes() == before
    # by itself it would have made a step of no length, and from then on risen again
    train(iseg_folder, tmp_path / "longer", epochs=1, pretrained=str(last))


@pytest.mark.parametrize("save", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content, 2))])
def test_code_in_weights_is_not_run(save: Any, iseg_folder: Path, tmp_path: Path) -> None:
    planted, last = tmp_path / "planted", tmp_path / "out" / "model_last.pt"
    last.parent.mkdir()
    save({"model": Planted(planted), "weight": Planted(planted)}, last)
    with pytest.raises(ValueError, match="not a file of weights"):
        load_weights(torch.nn.Linear(2, 2), last)
    scan = str(iseg_folder / "subject-1-T1.hdr")
    options = {**SMALL, "image": scan, "ckpt_path": str(last), "output_dir": str(tmp_path / "inferred")}
    for refused in (
        lambda: run(TISSUE.folder, "run", "inference.json", **options),
        lambda: train(iseg_folder, last.parent, resume=True),
    ):
        with pytest.raises(RuntimeError) as raised:
            refused()
        assert f"{last}: not a file of weights" in str(input_error(raised.value))
    assert not planted.exists()
    torch.load(last, weights_only=False) if save is torch.save else pickle.loads(last.read_bytes())
    assert planted.exists()  # what the file would have done


def test_out_of_memory_names_a_strategy_that_fits(
    iseg_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = TrainingStep(CONFIG, {**SMALL_TRAINING, "network_def#memory": "store"})
    plans = {memory: step.plan(memory) for memory in step.strategies}
    least, most = (choose(plan.total for plan in plans.values()) for choose in (min, max))
    budget = (least + most) // 2
    monkeypatch.setattr(out_of_memory, "_bytes_of", lambda device: int(budget / out_of_memory._SHARE) + 1)

    forward = FullyInvResUNet.forward

    def fail(network: FullyInvResUNet, x: torch.Tensor) -> Any:
        if isinstance(x, FakeTensor):  # of the dry run
            return forward(network, x)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")

    monkeypatch.setattr("memnet.FullyInvResUNet.forward", fail)
    with pytest.raises(RuntimeError) as raised:
        train(iseg_folder, tmp_path, memory="store")
    _print_input_error(type(raised.value), raised.value, raised.tb)
    lines = capsys.readouterr().err.strip().splitlines()  # progress of loading before it
    told = lines[-1]
    assert [line for line in lines if "out of memory" in line] == [told]
    assert (
        told.startswith("error: out of memory (CUDA out of memory. Tried to allocate 20.00 MiB.)") and "\n" not in told
    )
    found = re.search(r"it fits with --patch_size \"\[16, 16, 16\]\" --memory (\w+)", told)
    assert found, told
    assert plans[found[1]].total <= budget < plans["store"].total
    # a GPU's step is planned as such
    planned: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(out_of_memory, "TrainingStep", lambda config, device: planned.append(device) or step)
        for device in ("cuda:1", "cpu"):
            what_fits({**step._content, "device": device}, 2**40)
    assert planned == ["cuda", "cpu"]
    # where no strategy makes room for the patch, a smaller one
    config = {**step._content, **{key: value for key, value in SMALL_TRAINING.items() if "#" not in key}}
    config["patch_size"], config["network_def"] = [32, 32, 32], {**config["network_def"], "channels": 8, "n_levels": 2}
    found = re.search(
        r"--patch_size \"\[(16|24), ", what_fits(config, int(plans["invert"].total / out_of_memory._SHARE) + 2**20)
    )
    assert found, what_fits(config, int(plans["invert"].total / out_of_memory._SHARE) + 2**20)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        RuntimeError("CUDA driver error: out of memory"),
    ],
)
def test_out_of_memory_elsewhere_names_what_to_make_smaller(error: Exception) -> None:
    assert "out of memory" in str(input_error(error))
    inference = {"roi_size": [96, 96, 96], "sw_batch_size": 1, "device": "cuda"}
    assert (
        what_fits(inference)
        == "make --roi_size (now [96, 96, 96]) or --sw_batch_size (now 1) smaller, or give --device cpu"
    )


@pytest.mark.parametrize(
    "told", ["GET was unable to find an engine to execute this computation", "CUFFT_INTERNAL_ERROR"]
)
@pytest.mark.parametrize(("free", "is_memory"), [(1, True), (50, False)])
def test_error_of_many_causes_is_of_memory_where_a_gpu_is_nearly_full(
    monkeypatch: pytest.MonkeyPatch, told: str, free: int, is_memory: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not is_out_of_memory(RuntimeError(told))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert not is_out_of_memory(RuntimeError(told))  # a GPU that this process does not use
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 100))
    assert is_out_of_memory(RuntimeError(told)) == is_memory

    def fails() -> None:
        raise RuntimeError("CUDA error: device not ready")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    assert not is_out_of_memory(RuntimeError(told))


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "float32"), ((8, 0), "bfloat16")])
def test_a_gpu_without_bfloat16_is_planned_in_float32(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(out_of_memory, "_of_training", lambda step, budget, precision: planned.append(precision) or "")
    config = {**TrainingStep(CONFIG, SMALL_TRAINING)._content, "amp": True, "device": "cuda"}
    what_fits(config, 2**30)
    assert planned == [precision]
