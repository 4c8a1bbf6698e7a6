"""The temporary file: what is written comes back with every bit, and nothing stays behind."""

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bncli.batchnorm.bits import bitwise_equal
from bncli.batchnorm.population.exact import spill
from bncli.batchnorm.population.exact.spill import Layout, Place, SpillFile


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)  # where the first answer is remembered
    return tmp_path


TENSORS = [
    torch.randn(3, 5, 7, 2),
    torch.randn(3, 5, 7, 2).to(memory_format=torch.channels_last),
    torch.randn(40, 30)[::2, 1:],  # with gaps
    torch.tensor([0.0, -0.0, float("nan"), float("inf")], dtype=torch.float64),
    torch.randn(9000).bfloat16(),
    torch.randint(0, 2, (5,)).bool(),
    torch.randn(4, dtype=torch.complex64),
    torch.empty(0, 3),
    torch.tensor(2.5),
]


def test_every_bit_and_the_strides_come_back(temporary_folder: Path) -> None:
    file = SpillFile()
    layouts = [Layout.of(tensor) for tensor in TENSORS]
    places = [file.allocate(layout.num_bytes, 2**30) for layout in layouts]
    assert all(places)
    for place, layout, tensor in zip(places, layouts, TENSORS, strict=True):
        assert place is not None
        file.write(place, layout, tensor)
    assert list(temporary_folder.iterdir()) == []  # it has no name from the start
    for place, layout, tensor in zip(places, layouts, TENSORS, strict=True):
        assert place is not None
        found = file.read(place, layout).result()
        assert bitwise_equal(found, tensor)
        assert found.stride() == tensor.clone().stride()
    file.close()


def test_what_is_written_is_the_tensor_as_it_was() -> None:
    file, tensor = SpillFile(), torch.ones(10)
    place, layout = Place(0, 4096), Layout.of(tensor)
    written = file.write(place, layout, tensor)
    tensor.zero_()
    written.result()
    assert file.read(place, layout).result().sum() == 10
    file.close()


def test_places_are_used_again_and_joined() -> None:
    file = SpillFile()
    page, limit = 4096, 4 * 4096
    first, second = file.allocate(page, limit), file.allocate(2 * page, limit)
    assert (first, second) == (Place(0, page), Place(page, 2 * page))
    assert file.allocate(2 * page, limit) is None
    assert file.allocate(1, limit) == Place(3 * page, page)
    assert file.allocate(1, limit) is None
    assert first is not None
    assert second is not None
    file.free(second)
    file.free(first)
    assert file.allocate(2 * page + 1, limit) == Place(0, 3 * page)
    file.free(Place(3 * page, page))
    # the last gap and what lies behind it
    assert file.allocate(3 * page, 6 * page) == Place(3 * page, 3 * page)
    assert file.allocate(1, 6 * page) is None
    file.close()


def test_a_file_system_that_needs_the_page_cache_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    change = fcntl.fcntl

    def refuse(file: object, command: int, flags: int = 0) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "not here")
        return change(file, command, flags)  # type: ignore[arg-type]

    monkeypatch.setattr("fcntl.fcntl", refuse)
    test_what_is_written_is_the_tensor_as_it_was()


def test_an_error_is_the_futures_own() -> None:
    class Full:
        def seek(self, _offset: int) -> None:
            raise OSError(errno.ENOSPC, "no space left on device")

        def close(self) -> None:
            pass

    file, tensor = SpillFile(), torch.ones(10)
    file._file.close()
    file._file = Full()
    Full.write = Full.readinto = lambda _self, _view: 0  # type: ignore[attr-defined]
    assert isinstance(file.write(Place(0, 4096), Layout.of(tensor), tensor).exception(), OSError)
    assert isinstance(file.read(Place(0, 4096), Layout.of(tensor)).exception(), OSError)
    file.close()


def test_reading_behind_the_end_is_an_error_and_no_endless_wait() -> None:
    file = SpillFile()
    layout = Layout.of(torch.ones(10))
    assert isinstance(file.read(Place(2**20, 4096), layout).exception(), OSError)
    file.close()


def test_it_lies_where_temporary_files_shall_go(
    temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert spill.folder() == temporary_folder
    monkeypatch.delenv("TMPDIR")
    assert spill.folder() == Path("/var/tmp")
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr("tempfile.tempdir", None)
    assert spill.folder().is_dir()
    assert spill.folder() != Path("/var/tmp")


def test_no_more_than_half_of_what_is_free_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(free: int) -> object:
        return type("usage", (), {"free": free})()

    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage(1001))
    assert spill.usable_bytes() == 500

    def fail(_path: Path) -> object:
        raise OSError

    monkeypatch.setattr("shutil.disk_usage", fail)
    assert spill.usable_bytes() == 0


def test_layouts_say_how_much_they_take() -> None:
    def check(tensor: Tensor) -> None:
        assert Layout.of(tensor).num_bytes == tensor.numel() * tensor.element_size()

    for tensor in TENSORS:
        check(tensor)
