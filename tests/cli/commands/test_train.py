import itertools
import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from bncli.busy_cpus import CpuTimes, ShortageWatch
from bncli.checkpoints import load_checkpoint
from bncli.config import SyntheticConfig
from bncli.config_file import load_config
from bncli.usable_cpus import UsableCpus
from tests.conftest import Bncli, save_as_if_whole


def test_train_prints_its_contract_as_json_and_progress_on_stderr(
    bncli: Bncli, tiny_config: Path, tmp_path: Path
) -> None:
    outcome = bncli("train", tiny_config, "--run-dir", tmp_path / "run", "--json", "--set", "train.epochs=1")
    assert outcome.code == 0
    result = outcome.json
    assert result["run_dir"] == str(tmp_path / "run")
    assert Path(result["checkpoint"]).is_file()
    assert Path(result["best_checkpoint"]).is_file()
    assert 0 <= result["test_accuracy"] <= 1
    assert result["epochs"] == 1
    assert result["seconds"] > 0
    assert result["images_per_second"] == pytest.approx(500 / result["seconds"])
    lines = outcome.err.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["epoch", "1"]
    assert "\x1b" not in outcome.err


def test_the_table_on_stdout_names_the_accuracy_and_the_checkpoint(
    bncli: Bncli, tiny_config: Path, tmp_path: Path
) -> None:
    outcome = bncli("train", tiny_config, "--run-dir", tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{metrics['test_accuracy']:.2%}" in outcome.out
    assert str(tmp_path / "run" / "last.pt") in outcome.out


@pytest.mark.parametrize(("precision", "is_fast"), [("bfloat16", False), ("bfloat16", True), ("auto", False)])
def test_bfloat16_that_would_be_emulated_is_named_as_the_reason_of_a_wait(
    bncli: Bncli,
    tiny_config: Path,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    is_fast: bool,
) -> None:
    monkeypatch.setattr("bncli.hardware._cpu_capabilities", lambda: {"avx2": True, "avx512_bf16": is_fast})
    asked = ("--set", f"runtime.precision={precision}")
    few = ("--set", "data.num_train=100", "--set", "train.epochs=1")  # bfloat16 may be emulated here
    commands = [
        ("train", tiny_config, "--run-dir", tmp_path / "run", *few, *asked),
        ("eval", finished_run / "last.pt", "--num-images", 8, *asked),
    ]
    for command in commands:
        outcome = bncli(*command)
        assert outcome.code == 0
        warnings = [line for line in outcome.err.splitlines() if "warning" in line]
        assert len(warnings) == (precision == "bfloat16" and not is_fast)
        assert all("runtime.precision: bfloat16 may take many times as long" in line for line in warnings)


def test_each_epoch_shows_how_far_eval_mode_lags_behind_in_80_columns(
    bncli: Bncli, tiny_config: Path, tmp_path: Path
) -> None:
    few = ("--set", "train.learning_rate=1e-7", "--set", "train.evaluate_every=2")  # long numbers and none
    outcome = bncli("train", tiny_config, "--run-dir", tmp_path / "run", *few)
    meaning, above, head, *rows = outcome.err.splitlines()[-5:]
    assert meaning.startswith("eval lag: ")
    assert all(len(line) <= 80 for line in (meaning, above, head, *rows))
    words = [f"{first} {second}".strip() for first, second in zip(*map(_columns, (above, head)), strict=True)]
    assert words == [
        *("epoch", "train loss", "train accuracy", "test loss", "test accuracy"),
        *("eval lag", "learning rate", "images/s"),
    ]
    for row, line in zip(rows, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(), strict=True):
        layers = json.loads(line)["layers"]
        lag = max(math.hypot(layer["mean_shift"], math.log(layer["var_ratio"])) for layer in layers)
        assert row.split()[5] == f"{lag:.3f}"
        assert [match.end() for match in re.finditer(r"\S+", row)] == ENDS


# of the columns: numbers stand below the ends of their heads
ENDS = [5, 15, 25, 36, 46, 56, 66, 76]


def _columns(line: str) -> list[str]:
    return [line[start:end].strip() for start, end in zip([0, *ENDS], ENDS, strict=False)]


def test_without_running_statistics_there_is_no_lag(bncli: Bncli, tiny_config: Path, tmp_path: Path) -> None:
    without = ("--set", "model.batch_norm.track_running_stats=false", "--set", "train.epochs=1")
    outcome = bncli("train", tiny_config, "--run-dir", tmp_path / "run", *without)
    assert outcome.err.splitlines()[-1].split()[5] == "-"
    assert "Running statistics" not in outcome.out


@pytest.mark.parametrize("threads", [1, 2])
def test_busy_cores_are_named_once_with_what_to_type(
    bncli: Bncli, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr("bncli.busy_cpus.WINDOW", 0.0)
    seen = itertools.count()
    watch = partial(ShortageWatch, read=lambda: _one_cpu_taken(seen))
    monkeypatch.setattr("bncli.cli.progress.ShortageWatch", watch)
    few = ("--set", f"runtime.threads={threads}", "--set", "train.epochs=1", "--set", "data.num_train=200")
    outcome = bncli("train", tiny_config, "--run-dir", tmp_path / "run", *few)
    notes = [line for line in outcome.err.splitlines() if "other processes" in line]
    assert len(notes) == (threads == 2)
    assert all("use 1.1 of 2 cores: --set runtime.threads=1 would be faster" in line for line in notes)


def _one_cpu_taken(seen: "itertools.count[int]") -> CpuTimes:
    second = float(next(seen))
    return CpuTimes(now=second, busy=2.0 * second, own=0.9 * second, num_cpus=2)


def test_a_resumed_run_keeps_its_number_of_threads(
    bncli: Bncli, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = tmp_path / "auto.yaml"
    # few steps: two threads wait for each other where other processes take the cores
    few = tiny_config.read_text().replace("num_train: 500, num_test: 120", "num_train: 100, num_test: 20")
    recorded.write_text(few.replace("threads: 1, ", ""))
    for run in ("whole", "parts"):
        torch.set_num_threads(2)
        epochs = () if run == "whole" else ("--set", "train.epochs=1")
        flat = ("--set", "train.decay=none", "--set", "train.warmup=0")
        assert bncli("train", recorded, "--run-dir", tmp_path / run, *flat, *epochs).code == 0
    assert load_checkpoint(tmp_path / "parts" / "last.pt").runtime["threads"] == 2
    monkeypatch.setattr("bncli.runtime.usable_cpus", lambda: UsableCpus(2, 2, 1.0))
    torch.set_num_threads(1)
    resumed = bncli("train", "--resume", tmp_path / "parts", "--set", "train.epochs=2")
    assert resumed.code == 0
    assert "before" not in resumed.err
    whole, parts = (load_checkpoint(tmp_path / run / "last.pt") for run in ("whole", "parts"))
    assert parts.runtime["threads"] == 2
    assert parts.config.runtime.threads is None  # recorded, not asked for
    assert all(torch.equal(value, parts.state_dict[key]) for key, value in whole.state_dict.items())
    asked = ("--set", "train.epochs=3", "--set", "runtime.threads=1")
    changed = bncli("train", "--resume", tmp_path / "parts", *asked)
    assert "bncli: 1 thread, 2 before: they round differently" in changed.err


def test_threads_that_this_machine_does_not_have_are_not_kept(
    bncli: Bncli, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = tmp_path / "auto.yaml"
    auto.write_text(tiny_config.read_text().replace("threads: 1, ", ""))
    bncli("train", auto, "--run-dir", tmp_path / "run", "--set", "train.epochs=1")
    content = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    for threads in (10_000, -1, "many"):
        content["runtime"]["threads"] = threads
        save_as_if_whole(content, tmp_path / "run" / "last.pt")
        outcome = bncli("train", "--resume", tmp_path / "run")
        assert outcome.code == 0
        assert ("1 thread, 10000 before" in outcome.err) == (threads == 10_000)


def test_resume_continues_in_the_same_directory(bncli: Bncli, tiny_config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    bncli("train", tiny_config, "--run-dir", run_dir)
    outcome = bncli("train", "--resume", run_dir, "--set", "train.epochs=3", "--json")
    assert outcome.code == 0
    assert outcome.json["epochs"] == 3
    assert "Resuming after epoch 2 of 3" in outcome.err
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 3


def test_without_a_run_dir_every_run_gets_its_own(
    bncli: Bncli, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (
        bncli("train", tiny_config, "--json", "--set", "train.epochs=1").json["run_dir"] for _ in range(2)
    )
    assert first != second
    assert Path(first).parent == Path(second).parent == Path("runs")


FEW = ("data.num_train=100", "data.num_test=20", "model.widths=[4]", "train.epochs=1", "train.batch_size=50")
FEW_IMAGES = tuple(word for key in FEW for word in ("--set", key))


@pytest.mark.parametrize("name", [(), ("quickstart",)])
def test_no_config_is_the_quickstart_with_the_options_applied(
    bncli: Bncli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = bncli("train", *name, *FEW_IMAGES, "--device", "cpu", "--json")
    assert outcome.code == 0
    assert ("no CONFIG given: training quickstart" in outcome.err) == (not name)
    run_dir = Path(outcome.json["run_dir"])
    assert re.fullmatch(r"runs/quickstart-\d{8}-\d{6}", str(run_dir))
    recorded = load_config(run_dir / "config.yaml")
    assert recorded == load_config(None, [*FEW, "runtime.device=cpu"])
    assert recorded.data == SyntheticConfig(num_train=100, num_test=20)


def test_a_run_of_no_config_goes_on_with_keys_of_its_data(bncli: Bncli, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert bncli("train", *FEW_IMAGES, "--device", "cpu", "--run-dir", run_dir).code == 0
    again = ("--set", "train.epochs=2", "--set", "data.num_test=20")
    resumed = bncli("train", "--resume", run_dir, "--device", "cpu", *again, "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["epochs"] == 2
    assert "no CONFIG given" not in resumed.err


def test_a_built_in_name_names_the_run_directory(
    bncli: Bncli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    synthetic = ("--set", "data.name=synthetic", *FEW_IMAGES, "--set", "model.whitening=false")
    outcome = bncli("train", "cifar10", *synthetic, "--json")
    assert outcome.code == 0, outcome.err
    assert Path(outcome.json["run_dir"]).name.startswith("cifar10-")


def test_a_folder_of_data_without_a_config_is_answered_with_the_data_sets_that_have_one(
    bncli: Bncli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = bncli("train", "--data-root", "images")
    assert (outcome.code, outcome.out) == (2, "")
    assert "the data set synthetic has no such key; cifar10 and imagefolder have it" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("run", "run: the folder of a run; its configuration is run/config.yaml, and --resume continues it"),
        ("photos", "photos: a folder, no configuration; --data-root FOLDER names the one"),
        (
            "net.py",
            "net.py: Python code, no configuration; a network in it is trained with --set model.name=",
        ),
    ],
)
def test_what_is_no_configuration_is_answered_with_where_it_belongs(
    bncli: Bncli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("run").mkdir()
    Path("run/config.yaml").write_text("train: {epochs: 1}")
    Path("net.py").write_text("def net(num_classes): ...")
    outcome = bncli("train", given, "--run-dir", "new")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert f"bncli: error: {expected}" in outcome.err


def test_there_is_nothing_to_resume_where_there_was_no_run(bncli: Bncli, tmp_path: Path) -> None:
    outcome = bncli("train", "--resume", tmp_path)
    assert outcome.code == 2
    assert "no run to resume" in outcome.err


@pytest.mark.parametrize(
    ("momentum", "warns"), [("0.99", True), ("1.0", True), ("0.6", False), ("null", False)]
)
def test_a_momentum_that_keeps_one_batch_is_said_at_the_start_and_in_the_file(
    bncli: Bncli, tiny_config: Path, tmp_path: Path, momentum: str, warns: bool
) -> None:
    setting = ("--set", f"model.batch_norm.momentum={momentum}")
    dry = bncli("train", tiny_config, "--dry-run", "--json", *setting)
    assert dry.code == 0
    lines = [line for line in dry.err.splitlines() if "model.batch_norm.momentum" in line]
    assert len(lines) == warns
    if momentum == "0.99":
        assert (
            "warning: model.batch_norm.momentum: with momentum 0.99 the statistics are in effect" in lines[0]
        )
        run = bncli("train", tiny_config, "--run-dir", tmp_path / "run", *setting)
        assert lines[0] in run.err
        findings = bncli("inspect-stats", tmp_path / "run" / "last.pt", "--json").json["findings"]
        assert {(found["code"], found["severity"]) for found in findings} == {("BN015", "warning")}
        assert "unless" not in findings[0]["message"]  # our training made them: that is certain


def test_a_dry_run_tells_what_training_would_tell_of_the_data(
    bncli: Bncli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(
        "import torch\n"
        "from torch.utils.data import TensorDataset\n"
        "def images():\n"
        "    return TensorDataset(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8) % 2)\n"
    )
    sets = ("data.name=own.py:images", "model.widths=[4]", "train.batch_size=4", "train.epochs=1")
    words = [word for one in (*sets, "runtime.threads=1") for word in ("--set", one)]
    dry, real = bncli("train", *words, "--dry-run"), bncli("train", *words, "--run-dir", "run")
    note = "has no argument train or split: the test samples are the training"
    assert (dry.code, real.code, note in real.err, note in dry.err) == (0, 0, True, True)


def test_a_dry_run_describes_the_run_and_writes_nothing(
    bncli: Bncli, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    described = bncli("train", tiny_config, "--dry-run", "--json", "--set", "train.batch_size=64").json
    assert described["steps_per_epoch"] == 7
    assert described["images_left_out_per_epoch"] == 500 - 7 * 64
    assert described["num_parameters"] == 3 * 8 * 9 + 2 * 8 + 8 * 16 * 9 + 2 * 16 + 16 * 10 + 10
    assert described["flops_per_image"] == 2 * (32 * 32 * 8 * 27 + 16 * 16 * 16 * 72 + 160)
    assert described["config"]["train"]["batch_size"] == 64
    kept = bncli(
        "train", tiny_config, "--dry-run", "--set", "train.batch_size=64", "--set", "train.last_batch=keep"
    )
    assert "64 images, the last of an epoch 52" in kept.out
    assert "stages.1.0.conv" in kept.out
    assert list(tmp_path.iterdir()) == []
