"""Ctrl-C and SIGTERM while runs are under way: the first may ask a run to stop, the second stops it."""

import signal
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Inside the `with` block the two signals are ours; at its end the former handlers are back.

    Before `defer` is called there is nothing to save, and the first signal already interrupts. A signal that
    the process was started to ignore, as `nohup` and shell scripts in the background do, stays ignored.
    """

    def __init__(self, *, only_first: bool = False) -> None:
        """`only_first`: later signals are the same: torchrun passes Ctrl-C on to who has it already."""
        self._only_first = only_first
        self.received: int | None = None  # the first signal
        self._deferring = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        """Take the signals. Only possible in the main thread, where Python handles them."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the signals back."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on somebody asks `stop_requested` often, so the first signal need not interrupt."""
        self._deferring = True

    def stop_requested(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """As a shell reports the signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.received or signal.SIGINT)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        first, self.received = self.received is None, self.received or number
        if not first and self._only_first and self._deferring:
            return
        if not first or not self._deferring:
            raise KeyboardInterrupt
