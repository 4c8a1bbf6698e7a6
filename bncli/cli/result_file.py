"""A file that a command writes beside its output: whole or not at all, and an error in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from bncli.atomic_file import atomic_file
from bncli.errors import BncliError


@contextmanager
def result_file(path: Path, what: str) -> Iterator[IO[bytes]]:
    """Open `path` for what it is to hold, such as 'the plot'; see `atomic_file`.

    Raises BncliError for a file that cannot be written.
    """
    try:
        with atomic_file(path, follows=True) as file:
            yield file
    except OSError as error:
        raise BncliError(f"{path}: cannot write {what}: {error.strerror or error}") from error
