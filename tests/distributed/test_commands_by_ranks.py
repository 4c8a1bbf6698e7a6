"""`bncli recalibrate` and `bncli eval` in several processes, which torchrun starts: what one process says."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bncli.checkpoints import load_checkpoint
from bncli.training import prepare
from bncli.training.agreement import measure_agreement
from tests.conftest import Bncli
from tests.distributed.torchrun import ROOT, Launched, command, environment, torchrun
from tests.faults.conftest import FAULTY

# what a run takes, and how often ranks look at what depends on what
TOLERANCE = 0.05  # reached after some of the batches
VARYING = {"seconds", "images_per_second", "forward_passes", "checkpoint", "input", "output", "machine"}
VARYING |= {"processes"}  # which only several say


def without_times(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: without_times(value) for key, value in found.items() if key not in VARYING}
    return [without_times(item) for item in found] if isinstance(found, list) else found


def bncli_by_ranks(num_ranks: int, *words: object) -> Launched:
    return torchrun(num_ranks, "-m", "bncli", *words)


def statistics_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_checkpoint(path).state_dict.items() if "running" in name}


def check_recalibrated(bncli: Bncli, checkpoint: Path, folder: Path, num_ranks: int, *options: object) -> Any:
    """The same file and the same document as those of one process; the document."""
    one, several = folder / "one.pt", folder / "several.pt"
    alone = bncli("recalibrate", checkpoint, "-o", one, "--json", *options)
    assert alone.code == 0, alone.err
    done = bncli_by_ranks(num_ranks, "recalibrate", checkpoint, "-o", several, "--json", *options)
    assert done.code == 0, done.err
    assert done.err.count("wrote") == 1
    found = json.loads(done.out)  # of rank 0 alone, or it would be no document
    assert without_times(found) == without_times(alone.json)
    torch.testing.assert_close(statistics_of(several), statistics_of(one), rtol=0, atol=0)
    return found


@pytest.mark.slow
def test_recalibrate_writes_the_bits_of_one_process(bncli: Bncli, finished_run: Path, tmp_path: Path) -> None:
    """500 images in 9 batches: two ranks have five and four of them."""
    options = ("--batch-size", 60, "--verify")
    found = check_recalibrated(bncli, finished_run / "last.pt", tmp_path, 2, *options)
    assert found["verification"]["self_consistent"]
    assert found["num_images"] == 500


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [
        (2, ("--method", "precise", "--batch-size", 60)),
        (4, ("--batch-size", 170, "--num-images", 400)),  # three batches: a rank has none
        (3, ("--method", "precise", "--batch-size", 7, "--tolerance", TOLERANCE)),
        (2, ("--batch-size", 7, "--tolerance", TOLERANCE)),
        (2, ("--method", "debias")),
    ],
    ids=["precise", "few batches", "precise with a tolerance", "exact with a tolerance", "debias"],
)
def test_so_it_does_with_any_method_and_number_of_ranks(
    bncli: Bncli, finished_run: Path, tmp_path: Path, num_ranks: int, options: tuple[object, ...]
) -> None:
    found = check_recalibrated(bncli, finished_run / "last.pt", tmp_path, num_ranks, *options)
    if "--tolerance" in options:
        assert found["stopped_early"]


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_eval_counts_and_adds_up_what_one_process_does(
    bncli: Bncli, finished_run: Path, num_ranks: int
) -> None:
    """Two batches of test images, so that a third rank has none."""
    words = ("eval", finished_run / "last.pt", "--num-images", 8, "--batch-sizes", "2,3", "--json")
    for more in (("--tta", "flip"), ("--gap", "--num-calibration-images", 120, "--sweep", "1,7")):
        alone = bncli(*words, *more)
        done = bncli_by_ranks(num_ranks, *words, *more)
        assert done.code == alone.code == 0, done.err
        found = json.loads(done.out)
        assert found["runtime"]["processes"] == num_ranks
        assert without_times(found) == without_times(alone.json)


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["true", "false"])
def test_any_network_on_streamed_and_mapped_images(bncli: Bncli, tmp_path: Path, stream: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 25), ("test", 9)):
        for label in ("dark", "light"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    network = tmp_path / "net.py"
    network.write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3),\n"
        "        nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))\n"
    )
    namespace: dict[str, Any] = {}
    exec(network.read_text(), namespace)
    torch.save(namespace["net"]().state_dict(), tmp_path / "weights.pt")
    words = [
        *(tmp_path / "weights.pt", "--model", f"{network}:net", "--data-root", tmp_path / "images", "--json"),
        *("--set", "data.image_size=32", "--set", f"data.stream={stream}", "--set", "data.workers=1"),
        *("--set", f"data.cache={tmp_path / 'cache'}", "--set", "runtime.eval_batch_size=7"),
    ]
    alone = bncli("recalibrate", *words, "-o", tmp_path / "one.pt")
    done = bncli_by_ranks(2, "recalibrate", *words, "-o", tmp_path / "two.pt", "--verify")
    assert (alone.code, done.code) == (0, 0), alone.err + done.err
    found = {**json.loads(done.out), "verification": None}
    assert without_times(found) == without_times(alone.json)
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=0)
    few = ("--num-images", 4, "--batch-sizes", 2)
    evaluated = bncli("eval", *words, *few), bncli_by_ranks(2, "eval", *words, *few)
    first, second = (without_times(json.loads(one.out)) for one in evaluated)
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["CHECKPOINT", "-o", "/nowhere/new.pt"], "there is no directory /nowhere"),
        (["CHECKPOINT", "-o", "new.pt", "--set", "runtime.timeout=0"], "runtime.timeout: must be above 0"),
        (["CHECKPOINT"], "give -o NEW for the new checkpoint"),
        (["missing.pt", "-o", "new.pt"], "missing.pt: cannot be read"),
    ],
)
def test_what_no_rank_can_do_is_said_once(finished_run: Path, words: list[str], told: str) -> None:
    checkpoint = str(finished_run / "last.pt")
    done = bncli_by_ranks(2, "recalibrate", *(checkpoint if one == "CHECKPOINT" else one for one in words))
    assert done.out == ""
    (error,) = done.errors
    assert told in error
    assert 2 in done.rank_codes.values()


@pytest.mark.slow
def test_what_a_training_measures_at_its_end_has_the_bits_of_one_process(
    bncli: Bncli, tmp_path: Path
) -> None:
    """The statistics of averaged weights, those of recalibrated.pt, and how well eval mode agrees."""
    run_dir, again = tmp_path / "run", tmp_path / "again.pt"
    (tmp_path / "run.yaml").write_text(
        FAULTY.replace("batch_size: 25,", "batch_size: 25, micro_batch_size: 7, ema_epochs: 1,")
    )
    words = ("train", tmp_path / "run.yaml", "--run-dir", run_dir, "--set", "train.recalibrate=exact")
    done = bncli_by_ranks(3, *words, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    last, recalibrated = (load_checkpoint(run_dir / name) for name in ("last.pt", "recalibrated.pt"))
    assert recalibrated.recalibration["runtime"]["processes"] == 3
    for path, method in ((run_dir / "last.pt", "precise"), (run_dir / "recalibrated.pt", "exact")):
        again.unlink(missing_ok=True)
        options = ("--method", method, "--batch-size", 7, "-o", again, "--json")
        alone = bncli("recalibrate", run_dir / "last.pt", *options)
        assert alone.code == 0, alone.err
        torch.testing.assert_close(statistics_of(path), statistics_of(again), rtol=0, atol=0)
        expected = last if method == "precise" else recalibrated
        assert alone.json["after"]["accuracy"] == expected.test_accuracy
        assert alone.json["after"]["loss"] == expected.test_loss
    setup = prepare(recalibrated.config)
    agreement = measure_agreement(recalibrated, setup, lambda: False)
    assert result["agreement"] == json.loads(json.dumps(agreement.to_dict()))


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_one_rank_that_is_told_to_stop_while_all_recalibrate_stops_all(tmp_path: Path, stopped: int) -> None:
    run_dir, script = tmp_path / "run", tmp_path / "start.py"
    script.write_text(
        "import os, sys\n"
        "from bncli.cli.app import main\n"
        "from bncli.cli.stop_signals import StopSignals\n"
        "from bncli.training import recalibrated\n"
        "recalibrate, stops = recalibrated.recalibrate, False\n"
        "StopSignals.stop_requested = lambda self: stops\n"
        "def told_to_stop(*arguments, **options):\n"
        "    global stops\n"
        f"    stops = os.environ['RANK'] == '{stopped}'\n"
        "    return recalibrate(*arguments, **options)\n"
        "recalibrated.recalibrate = told_to_stop\n"
        "sys.exit(main(None))\n"
    )
    (tmp_path / "run.yaml").write_text(
        FAULTY.replace("batch_size: 25,", "batch_size: 25, micro_batch_size: 7,")
    )
    words = ("train", tmp_path / "run.yaml", "--run-dir", run_dir, "--set", "train.recalibrate=exact")
    done = torchrun(2, script, *words)
    assert done.err.count("stopped after step 20 of 20; continue with") == 1
    assert set(done.rank_codes.values()) <= {130, 143, -15}
    assert done.errors == []
    assert not (run_dir / "recalibrated.pt").exists()
    done = bncli_by_ranks(2, "train", "--resume", run_dir)
    assert done.code == 0, done.err
    assert (run_dir / "recalibrated.pt").exists()


@pytest.mark.slow
def test_data_may_take_longer_to_prepare_than_processes_wait_for_each_other(
    bncli: Bncli, tmp_path: Path
) -> None:
    (tmp_path / "data.py").write_text(
        "import os, time, torch\n"
        "def slow(train):\n"
        "    if train and os.environ['RANK'] == '0':\n"
        "        time.sleep(12)\n"
        "    images = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8)\n"
        "    pairs = [(image, number % 3) for number, image in enumerate(images)]\n"
        "    return pairs[:40] if train else pairs[40:]\n"
    )
    words = (f"data.name={tmp_path / 'data.py'}:slow", "train.epochs=1", "train.batch_size=20")
    words += ("train.micro_batch_size=10", "runtime.timeout=8", "runtime.device=cpu", "model.widths=[4]")
    options = [word for one in words for word in ("--set", one)]
    done = bncli_by_ranks(2, "train", *options, "--run-dir", tmp_path / "run")
    assert done.code == 0, done.err


def ranks_of(launcher: "subprocess.Popen[str]") -> list[int]:
    """The processes that torchrun has started."""
    text = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
    return [int(word) for word in text.split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_all_and_leaves_nothing(
    finished_run: Path, tmp_path: Path, victim: int
) -> None:
    output = tmp_path / "new.pt"
    words = ("-m", "bncli", "recalibrate", finished_run / "last.pt", "-o", output, "--batch-size", 2)
    many = ("--set", "data.num_train=30000")  # more than a fast machine measures before it is killed
    with subprocess.Popen(
        command(2, *words, *many), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    ) as launcher:
        lines: list[str] = []
        assert launcher.stderr is not None
        while not any("pass 1" in line for line in lines):  # told after two seconds of it
            lines.append(launcher.stderr.readline())
            assert lines[-1], "ended before it was killed: " + "".join(lines)
        killed = time.monotonic()
        os.kill(ranks_of(launcher)[victim], signal.SIGKILL)
        _, rest = launcher.communicate(timeout=60)
    assert time.monotonic() - killed < 20
    (error,) = re.findall(r"^bncli: error: (.*)$", "".join(lines) + rest, flags=re.MULTILINE)
    assert f"rank {victim}" in error
    assert list(tmp_path.iterdir()) == []
