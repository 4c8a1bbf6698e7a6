"""Progress through several passes over images: one line on a terminal, a line for each pass otherwise."""

import sys
import time
from types import TracebackType

from bncli.cli.messages import one_line, print_note


class PhaseReporter:
    """Shows which pass is running and how many images of it are done, on stderr."""

    def __init__(self) -> None:
        self._phase: str | None = None
        self._num_images = 0
        self._shown = 0.0
        self._is_terminal = sys.stderr.isatty()

    def __enter__(self) -> "PhaseReporter":
        """Nothing is shown before the first pass."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finish the last line; of a pass that broke off nothing is said."""
        self._finish(is_whole=kind is None)

    def __call__(self, phase: str, num_images: int) -> None:
        """Take note of the images done in a pass."""
        if phase != self._phase:
            self._finish(is_whole=True)
            self._phase = phase
        self._num_images = num_images
        now = time.monotonic()
        if self._is_terminal and now - self._shown > 0.1:
            self._shown = now
            self._write(f"\r\x1b[K{self._line()}")

    def note(self, message: str) -> None:
        """Say something between two passes."""
        self._finish(is_whole=True)
        self._phase = None
        print_note(message)

    def _finish(self, *, is_whole: bool) -> None:
        if self._is_terminal:
            self._write("\r\x1b[K")
        elif self._phase is not None and is_whole:
            self._write(f"{self._line()}\n")

    def _line(self) -> str:
        line = f"{one_line(self._phase or '')}: {self._num_images:,}"
        return line[:79] if self._is_terminal else line

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
