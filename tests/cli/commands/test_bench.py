from pathlib import Path
from typing import Any

import pytest

from bncli.errors import BncliError
from tests.conftest import Bncli


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize(
    ("command", "measurement", "options"),
    [
        ("train", "bench_training_step", ()),
        ("scale", "bench_scale", ("--sizes", "1000")),
        ("accuracy", "bench_accuracy", ("--target", "0.5")),
    ],
)
def test_emulated_bfloat16_is_named_before_anything_is_measured(
    bncli: Bncli,
    tiny_config: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    measurement: str,
    options: tuple[str, ...],
    is_fast: bool,
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise BncliError("here it would begin")

    monkeypatch.setattr("bncli.hardware._cpu_capabilities", lambda: {"avx2": True, "avx512_bf16": is_fast})
    monkeypatch.setattr(f"bncli.bench.{measurement}", stop)
    outcome = bncli("bench", command, tiny_config, *options, "--set", "runtime.precision=bfloat16")
    assert outcome.code == 2
    *warnings, end = outcome.err.splitlines()
    assert end == "bncli: error: here it would begin"
    assert len(warnings) == (not is_fast)
    assert all("runtime.precision: bfloat16 is emulated" in line for line in warnings)
