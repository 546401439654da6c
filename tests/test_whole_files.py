"""A file is there as a whole, the old or the new one, whatever happens while it is written."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from memnet.whole_files import NotWrittenError, remove_partial_files, whole_file


def test_written_file_takes_the_old_ones_place(tmp_path: Path) -> None:
    target = tmp_path / "Größe 1.nii.gz"
    target.write_text("old")
    with whole_file(target) as partial:
        partial.write_text("new")
        assert partial.parent == tmp_path and partial.name.endswith(target.name) and target.read_text() == "old"
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (KeyError("a bug"), KeyError),
        (OSError(28, "No space left on device"), NotWrittenError),
        (KeyboardInterrupt(), None),
    ],
)
def test_error_leaves_the_old_file_and_nothing_else(
    error: BaseException, seen: type[BaseException] | None, tmp_path: Path
) -> None:
    target = tmp_path / "a.csv"
    target.write_text("old")
    with pytest.raises(seen or KeyboardInterrupt) as raised, whole_file(target) as partial:
        partial.write_text("half a fi")
        raise error
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    if seen is NotWrittenError:
        assert str(raised.value) == f"{target}: cannot be written (No space left on device)"
        assert isinstance(raised.value, ValueError)


def test_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(NotWrittenError, match="absent.*No such file or directory"),
        whole_file(tmp_path / "absent" / "a") as file,
    ):
        file.write_text("")


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    target, lengths = tmp_path / "a.txt", (10, 100_000)
    target.write_text("x" * 10)

    def write(length: int) -> None:
        for _ in range(50):
            with whole_file(target) as partial:
                partial.write_text("x" * length)

    writers = [threading.Thread(target=write, args=(length,)) for length in lengths]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(len(target.read_text()))
    for writer in writers:
        writer.join()
    assert seen <= set(lengths) and list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    target, other = tmp_path / "last.pt", tmp_path / ".partial-01234567-the-last.pt"
    with whole_file(target) as partial:
        partial.touch()
    partial.touch()
    other.touch()
    remove_partial_files(target)
    assert set(tmp_path.iterdir()) == {target, other}
