"""What was found on a machine that may be taken away at any moment: one JSON line each, written at once."""

import json
import platform
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bncli.hardware import describe_machine
from bncli.serialization import to_plain


class Results:
    """The file of one part, such as `correctness`, and the seconds that the part may take."""

    def __init__(self, folder: Path, part: str, seconds: float) -> None:
        """Begin the file with what the machine is."""
        folder.mkdir(parents=True, exist_ok=True)
        self.part, self.num_failed = part, 0
        self._file = (folder / f"{part}.jsonl").open("a", buffering=1)
        self._start = time.perf_counter()
        self._seconds = seconds
        self.add("machine", **machine())

    def seconds_left(self) -> float:
        """Until the part should end."""
        return self._seconds - (time.perf_counter() - self._start)

    def add(self, name: str, **facts: Any) -> None:
        """Write one line, and print it in words."""
        at = round(time.perf_counter() - self._start, 1)
        self._file.write(json.dumps({"part": self.part, "name": name, "at": at, **to_plain(facts)}) + "\n")
        words = ", ".join(f"{key} {_short(value)}" for key, value in facts.items())
        print(f"[{at:6.1f} s] {name}: {words}", flush=True)

    def check(self, name: str, measure: Callable[[], dict[str, Any]], *, needs: float = 0) -> None:
        """Add what `measure` returns, of which `ok` says whether it is as designed; or what it raised.

        It is left out, and that is written, where fewer seconds are left than it `needs`.
        """
        if self.seconds_left() < needs:
            self.add(name, left_out=f"needs {needs:.0f} s, {self.seconds_left():.0f} s are left")
            return
        start = time.perf_counter()
        try:
            found = measure()
        except Exception as error:  # the others are wanted all the same
            found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
            found["where"] = traceback.format_exc().splitlines()[-7:]
        self.num_failed += not found.get("ok", True)
        self.add(name, **found, took=round(time.perf_counter() - start, 2))


def machine() -> dict[str, Any]:
    """Card, driver and versions."""
    found = describe_machine() | {"cudnn": torch.backends.cudnn.version(), "kernel": platform.release()}
    if shutil.which("nvidia-smi"):
        question = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        answer = subprocess.run(question, capture_output=True, text=True, check=False)
        found["nvidia_smi"] = answer.stdout.strip()
    return found


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
