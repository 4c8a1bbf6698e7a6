"""Limits of the operating system on this process, for the while of a test's command."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def limited(which: int, value: int) -> Iterator[None]:
    """Set the soft limit `which` (one of `resource.RLIMIT_*`) to `value` within the block.

    Keep the block to the command under test: a limit of file size meets pytest's own report too where that is
    written to a file, and ends pytest without a word.
    """
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))
