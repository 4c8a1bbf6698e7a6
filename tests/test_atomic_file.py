import os
from pathlib import Path

import pytest

from bncli.atomic_file import atomic_file


def write(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content)


def test_the_file_is_there_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_file(path) as file:
        file.write(b"content")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"content"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full"), ValueError])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "file"
    write(path, b"old")
    with pytest.raises((KeyboardInterrupt, OSError, ValueError)), atomic_file(path) as file:
        file.write(b"half of the n")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_a_written_file_has_the_mode_that_open_gives(tmp_path: Path) -> None:
    write(tmp_path / "ours", b"x")
    (tmp_path / "usual").write_bytes(b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_where_nobody_named_it_a_pipe_or_link_is_replaced(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    other.write_bytes(b"untouched")
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(other)
    write(path, b"new")
    assert path.is_file()
    assert not path.is_symlink()
    assert path.read_bytes() == b"new"
    assert other.read_bytes() == b"untouched"


def test_a_pipe_is_written_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with atomic_file(pipe, follows=True) as file:
            file.write(b"new")
        assert os.read(reader, 10) == b"new"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_symbolic_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "file").write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to(folder / "file")
    with atomic_file(link, follows=True) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert (folder / "file").read_bytes() == b"new"
    assert list(folder.iterdir()) == [folder / "file"]
