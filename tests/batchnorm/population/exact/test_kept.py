"""What is kept of batches: given back as it was, or not at all."""

import errno
from collections.abc import Callable, Iterator
from math import inf

import pytest
import torch
from torch import Tensor

from bncli.batchnorm.population.exact import kept, spill
from bncli.batchnorm.population.exact.dataflow import Cut, Value
from bncli.batchnorm.population.exact.kept import KeptOutputs

SHORTCUT, FIRST, SECOND = (Value(name, 0, 400.0) for name in ("shortcut", "first", "second"))
ONE = Cut("first", 0, (SHORTCUT, FIRST), (0.9, 0.2), 0, 0.2)
TWO = Cut("second", 0, (SHORTCUT, SECOND), (0.9, 0.5), 1, 0.5)


@pytest.fixture(params=["in memory", "on disk"])
def outputs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeptOutputs]:
    monkeypatch.setattr(kept, "MAX_BYTES", 2**20 if request.param == "in memory" else 0)
    monkeypatch.setattr(spill, "usable_bytes", lambda: 2**20)
    found = KeptOutputs(torch.device("cpu"))
    yield found
    found.close()


def test_ranks_share_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "usable_bytes", lambda: 1000)
    assert KeptOutputs(None).disk_bytes == 1000
    assert KeptOutputs(None, num_ranks=3).disk_bytes == 333


def put(outputs: KeptOutputs, digest: bytes, cut: Cut, number: float) -> None:
    values = {value: torch.full((100,), float(number + index)) for index, value in enumerate(cut.values)}
    outputs.put(digest, cut, values, on_disk=True)


def got(
    outputs: KeptOutputs, digest: bytes, until: float = inf, following: bytes | None = None
) -> dict[str, float] | None:
    found = outputs.get(digest, until, following)
    return None if found is None else {value.module: float(one[99]) for value, one in found[1].items()}


def test_values_that_stay_are_not_taken_again_and_only_those_needed_are_given(outputs: KeptOutputs) -> None:
    put(outputs, b"a", ONE, 1)
    assert got(outputs, b"a") == {"shortcut": 1, "first": 2}
    assert got(outputs, b"a", 0.5) == {"first": 2}
    put(outputs, b"a", TWO, 10)
    assert got(outputs, b"a") == {"shortcut": 1, "second": 11}
    assert got(outputs, b"b") is None
    assert (len(outputs), b"a" in outputs, b"b" in outputs) == (1, True, False)


def test_what_is_read_ahead_is_given_to_its_own_batch_only(outputs: KeptOutputs) -> None:
    for number, digest in enumerate((b"a", b"b", b"c")):
        put(outputs, digest, ONE, number * 10)
    assert got(outputs, b"a", following=b"b") == {"shortcut": 0, "first": 1}
    assert got(outputs, b"c", following=b"b") == {"shortcut": 20, "first": 21}
    put(outputs, b"b", TWO, 30)  # after it was read ahead
    assert got(outputs, b"b") == {"shortcut": 10, "second": 31}


def test_what_is_given_may_be_written_to(outputs: KeptOutputs) -> None:
    put(outputs, b"a", ONE, 1)
    found = outputs.get(b"a", inf)
    assert found is not None
    found[1][FIRST].zero_()
    assert got(outputs, b"a") == {"shortcut": 1, "first": 2}


@pytest.mark.parametrize("settles", [False, True])
def test_what_could_not_be_written_is_not_kept(settles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MAX_BYTES", 0)
    monkeypatch.setattr(spill, "usable_bytes", lambda: 2**20)
    transfer = spill.SpillFile._transfer

    def full(
        self: spill.SpillFile, place: spill.Place, memory: Tensor, move: Callable[[memoryview], int | None]
    ) -> None:
        if move.__name__ == "write" and place.offset >= 3 * 4096:
            raise OSError(errno.ENOSPC, "no space left on device")
        transfer(self, place, memory, move)

    monkeypatch.setattr(spill.SpillFile, "_transfer", full)
    outputs = KeptOutputs(torch.device("cpu"))
    put(outputs, b"a", ONE, 1)
    put(outputs, b"b", ONE, 10)
    if settles:
        outputs.settle()
        assert b"b" not in outputs
    assert got(outputs, b"b") is None
    assert b"b" not in outputs
    assert got(outputs, b"a") == {"shortcut": 1, "first": 2}
    put(outputs, b"c", ONE, 20)  # nothing more is tried on this disk
    assert b"c" not in outputs
    outputs.close()


def test_without_room_for_all_values_none_is_kept_and_the_room_is_free_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept, "MAX_BYTES", 1000)  # of 800 a batch
    monkeypatch.setattr(spill, "usable_bytes", lambda: 0)
    outputs = KeptOutputs(torch.device("cpu"))
    put(outputs, b"a", ONE, 1)
    put(outputs, b"b", ONE, 1)
    assert (b"a" in outputs, b"b" in outputs) == (True, False)
    outputs.clear()
    put(outputs, b"b", ONE, 1)
    assert b"b" in outputs
    outputs.close()
