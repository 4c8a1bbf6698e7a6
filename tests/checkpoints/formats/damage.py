"""Damage files and see that reading them ends soon, with a CheckpointError or a result and nothing else."""

import math
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bncli.checkpoints import open_checkpoint
from bncli.errors import CheckpointError

SECONDS = 10  # a sound file of the corpus takes a tenth of one


class TooSlowError(BaseException):
    """No Exception, so that no reader takes it for damage of the file."""


@contextmanager
def time_limit(seconds: int = SECONDS) -> Iterator[None]:
    """Raise where it takes longer."""

    def stop(*_: object) -> None:
        raise TooSlowError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_or_refuse(source: Path) -> str | None:
    """What is said instead of reading it; all else but a CheckpointError is a fault of ours."""
    with time_limit():
        try:
            with open_checkpoint(source) as checkpoint:
                for layer in checkpoint.layers():
                    assert layer.eps is None or math.isfinite(layer.eps)
        except CheckpointError as error:
            assert "\n" not in str(error)
            return str(error)
    return None


def is_refused(source: Path) -> bool:
    """Whether something is said instead of reading it."""
    return read_or_refuse(source) is not None


def is_read(path: Path, content: bytes) -> bool:
    """Whether a file with this content is read."""
    path.write_bytes(content)
    return not is_refused(path)


def cuts(content: bytes) -> Iterator[bytes]:
    """Every twentieth of it, from the beginning."""
    for part in range(20):
        yield content[: len(content) * part // 20]


def flips(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """With 1 to 8 other bytes, half of them among the first 4 KiB, where what describes the rest lies."""
    generator = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 8)):
            end = min(len(content), 4096) if generator.random() < 0.5 else len(content)
            damaged[generator.randrange(end)] = generator.choice(
                (0, 1, 127, 128, 255, generator.randrange(256))
            )
        yield bytes(damaged)


def damaged(content: bytes, num_flipped: int) -> Iterator[bytes]:
    """Cut off at every twentieth of it, and so often with other bytes."""
    yield from cuts(content)
    yield from flips(content, num_flipped, seed=0)


def truncated(source: Path, target: Path) -> Iterator[Path]:
    """A file cut off at every twentieth of its length."""
    for content in cuts(source.read_bytes()):
        target.write_bytes(content)
        yield target


def mutations(folder: Path, source: Path, count: int) -> int:
    """Read so many mutations of a file, or of the files in a directory; how many of them were refused."""
    if source.is_file():
        return sum(not is_read(folder / source.name, data) for data in flips(source.read_bytes(), count, 0))
    target = folder / source.name
    shutil.copytree(source, target)
    files = sorted(path for path in target.rglob("*") if path.is_file() and path.stat().st_size)
    refused = 0
    for number in range(count):
        file = files[number % len(files)]
        whole = file.read_bytes()
        (changed,) = flips(whole, 1, seed=number)
        file.write_bytes(changed)
        refused += is_refused(target)
        file.write_bytes(whole)
    return refused
