"""Mutated and truncated files of every format: always exit code 0, 1 or 2, soon and in little memory."""

import io
import json
import random
import resource
import signal
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.conftest import Bncli

MAX_GROWTH = 2**30  # bytes of address space beyond what the process has before
MAX_SECONDS = 20
INTERESTING = [b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"\x80" * 4, struct.pack("<Q", 2**40), b"."]


def originals(finished_run: Path) -> dict[str, bytes]:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm1d(5)))
    state = model.state_dict()
    contents = {"state": state, "module": model, "nested": {"epoch": 1, "ema": model, "model": state}}
    found = {"own": (finished_run / "last.pt").read_bytes(), "safetensors": safetensors.torch.save(state)}
    for name, content in contents.items():
        for as_zip in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=as_zip)
            found[f"{name}, {'zip' if as_zip else 'legacy'}"] = buffer.getvalue()
    found["index"] = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, "shard")}).encode()
    return found


def mutate(data: bytes, randomness: random.Random) -> bytes:
    """One to four damages of any kind."""
    changed = bytearray(data)
    for _ in range(randomness.randint(1, 4)):
        size = len(changed)
        if not size:
            break
        place, length = randomness.randrange(size), randomness.randint(1, 64)
        match randomness.randrange(8):
            case 0:
                del changed[place:]
            case 1:
                del changed[place : place + length]
            case 2:
                changed[place] ^= 1 << randomness.randrange(8)
            case 3:
                changed[place] = randomness.randrange(256)
            case 4:
                changed[place : place + length] = randomness.randbytes(length)
            case 5:
                other = randomness.randrange(size)
                changed[place:place] = changed[other : other + length]
            case 6:
                some = randomness.choice(INTERESTING)
                changed[place : place + len(some)] = some
            case 7:  # a digit, a number or a name becomes another
                other = randomness.randrange(size)
                changed[place], changed[other] = changed[other], changed[place]
    return bytes(changed)


def mutate_inside(data: bytes, randomness: random.Random) -> bytes:
    """Damage behind the checksums: one entry of a zip archive, which is packed again."""
    source = zipfile.ZipFile(io.BytesIO(data))
    hit = randomness.choice([name for name in source.namelist() if "data" in name])
    if randomness.random() < 0.7:
        hit = next(name for name in source.namelist() if name.endswith("data.pkl"))
    buffer = io.BytesIO()
    with zipfile.ZipFile(
        buffer, "w", randomness.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    ) as packed:
        for name in source.namelist():
            content = source.read(name)
            packed.writestr(name, mutate(content, randomness) if name == hit else content)
    return buffer.getvalue()


@contextmanager
def limits() -> Iterator[None]:
    """Fail on hanging; more memory than allowed becomes a MemoryError."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"more than {MAX_SECONDS} s")

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    former = signal.signal(signal.SIGALRM, give_up)
    resource.setrlimit(resource.RLIMIT_AS, (now + MAX_GROWTH, hard))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def damage_and_inspect(bncli: Bncli, finished_run: Path, directory: Path, count: int, seed: int) -> set[int]:
    randomness = random.Random(seed)
    files = originals(finished_run)
    (directory / "shard").write_bytes(files["safetensors"])
    path = directory / "damaged"
    codes = set()
    for name, data in files.items():  # they are read before they are damaged
        path.write_bytes(data)
        assert bncli("inspect-stats", path, "--json").code in (0, 1), name
    with limits():
        for number in range(count):
            name = randomness.choice(list(files))
            inside = files[name][:2] == b"PK" and randomness.random() < 0.6
            damaged = (mutate_inside if inside else mutate)(files[name], randomness)
            path.write_bytes(damaged)
            signal.alarm(MAX_SECONDS)
            outcome = bncli("inspect-stats", path, *["--json"] * randomness.randint(0, 1))
            signal.alarm(0)
            codes.add(outcome.code)
            where = f"seed {seed}, number {number}, {name}: {outcome.err}"
            assert outcome.code in (0, 1, 2), where
            assert "bug in bncli" not in outcome.err, where
            assert "out of memory" not in outcome.err, where
            assert "Traceback" not in outcome.err, where
            assert (outcome.code == 2) == ("error" in outcome.err), where
            assert outcome.code != 2 or outcome.err.count("\n") <= 2, where  # a note and the error
    return codes


def test_damaged_files_are_read_or_refused(bncli: Bncli, finished_run: Path, tmp_path: Path) -> None:
    assert damage_and_inspect(bncli, finished_run, tmp_path, count=100, seed=0) >= {0, 2}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_five_thousand_damaged_files_are_read_or_refused(
    bncli: Bncli, finished_run: Path, tmp_path: Path, seed: int
) -> None:
    assert damage_and_inspect(bncli, finished_run, tmp_path, count=500, seed=seed) >= {0, 2}
