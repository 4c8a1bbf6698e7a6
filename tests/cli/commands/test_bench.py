from pathlib import Path
from typing import Any

import pytest

from bncli.config import Config
from bncli.config_file import load_config
from bncli.errors import BncliError
from tests.conftest import Bncli


@pytest.mark.parametrize("is_fast", [False, True])
def test_emulated_bfloat16_is_named_before_anything_is_measured(
    bncli: Bncli,
    tiny_config: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_fast: bool,
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise BncliError("here it would begin")

    monkeypatch.setattr("bncli.hardware._cpu_capabilities", lambda: {"avx2": True, "avx512_bf16": is_fast})
    monkeypatch.setattr("bncli.bench.bench_training_step", stop)
    outcome = bncli("bench", "train", tiny_config, "--set", "runtime.precision=bfloat16")
    assert outcome.code == 2
    *warnings, end = outcome.err.splitlines()
    assert end == "bncli: error: here it would begin"
    assert len(warnings) == (not is_fast)
    assert all("runtime.precision: bfloat16 may take many times as long" in line for line in warnings)


def test_without_a_config_the_quickstart_is_timed_with_the_options_applied(
    bncli: Bncli, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []

    def stop(config: Config, **_: Any) -> None:
        timed.append(config)
        raise BncliError("here it would begin")

    monkeypatch.setattr("bncli.bench.bench_training_step", stop)
    outcome = bncli("bench", "train", "--set", "data.num_train=300", "--device", "cpu")
    assert outcome.err.endswith("bncli: error: here it would begin\n")
    assert timed == [load_config(None, ["data.num_train=300", "runtime.device=cpu"])]
