"""The command line python -m memnet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BUNDLES

from memnet import __version__
from memnet.cli import main


def test_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert __version__ in capsys.readouterr().out


def test_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "score-tissue" in capsys.readouterr().out


def test_help_says_what_a_command_does_and_what_options_are_by_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    told = {}
    for command in ("memory", "unrolled", "score-reconstruction"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told[command] = capsys.readouterr().out
    assert "\nMeasure memory and time of a training step of each network.\n" in told["memory"]
    assert "timed steps of each; 0 measures memory alone (default: 3)" in told["memory"]
    # options without words of their own, lists, every choice, nothing, and words that tell the default already
    assert "(default: 8)" in told["unrolled"] and "(default: 24 64 192)" in told["unrolled"]
    assert "(default: all)" in told["unrolled"] and "None" not in told["unrolled"]
    assert "BART LLR; all by default\n" in told["score-reconstruction"]


@pytest.mark.parametrize("arguments", [[], ["unknown"]])
def test_wants_a_command(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_input_error_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score-tissue", "--dataset_dir", str(tmp_path / "absent"), "--output_dir", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert "absent" in message


def test_a_file_in_the_way_of_the_outputs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    bundle = str(BUNDLES / "brain_mri_tissue_invres")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        assert main(["pack", "--bundle", bundle, "--output_dir", str(folder)]) == 1
        message = capsys.readouterr().err
        assert message.startswith(f"error: {folder}") and message.count("\n") == 1


@pytest.mark.parametrize("content", [b"no JSON", b"[1, 2]", b'{"a": 1, "a": 2}', b"\xff\xfe{}", None])
def test_a_config_that_cannot_be_read_is_named(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "train.json"
    if content is not None:
        config.write_bytes(content)
    assert main(["plan", "--config_file", str(config)]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: {config}: no ") and message.count("\n") == 1


def test_programming_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: object) -> None:
        raise ValueError("raised outside the package")

    monkeypatch.setattr("memnet.workflow.scoring._run", broken)
    with pytest.raises(ValueError, match="outside"):
        main(["score-tissue", "--dataset_dir", "anywhere"])


def test_a_reader_that_has_read_enough_is_no_error(tmp_path: Path) -> None:
    config = tmp_path / "train.json"
    config.write_text(
        '{"network_def": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 1, "kernel_size": 3}}'
    )
    command = [sys.executable, "-m", "memnet", "plan", "--config_file", str(config), "--precision", "float32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
