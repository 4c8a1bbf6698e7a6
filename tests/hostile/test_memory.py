"""A data set larger than the memory limit: refused with the numbers, or mapped without being filled."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bncli.config import SyntheticConfig
from bncli.data import memory
from bncli.data.synthetic import load_synthetic
from bncli.errors import DataError
from tests.hostile.conftest import SMALLEST

GB = 10**9


def limited_bncli(limit_kib: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The program under `ulimit -v`, which bounds the address space (RLIMIT_AS)."""
    words = " ".join(f"'{argument}'" for argument in arguments)
    command = f"ulimit -v {limit_kib} && exec '{sys.executable}' -m bncli {words}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, env=environment
    )


def test_images_beyond_the_memory_are_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * GB)
    with pytest.raises(DataError, match=r"drawing 1,002,000 images needs 3\.35 GB of memory, but 2\.00 GB"):
        load_synthetic(SyntheticConfig(num_train=1_000_000, num_test=2_000))


def test_available_memory_is_the_least_of_system_container_and_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    (tmp_path / "memory.max").write_text("4000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 500000\n")
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "none")
    assert memory.available_memory() == 5000 * 1024
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_memory() == 1_500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() == 5000 * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v and /proc are Linux's")
def test_under_ulimit_a_larger_data_set_is_refused_before_it_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(SMALLEST)
    limit = 6_000_000  # KiB; importing torch alone takes most of 4 GB of address space
    small = limited_bncli(limit, "train", tmp_path / "c.yaml", "--dry-run")
    assert small.returncode == 0, small.stderr
    large = limited_bncli(
        limit, "train", tmp_path / "c.yaml", "--dry-run", "--set", "data.num_train=1000000",
        "--set", "data.num_test=1000000",
    )  # fmt: skip
    assert large.returncode == 2
    assert re.search(r"needs 6\.\d\d GB of memory, but \d\.\d\d GB are available", large.stderr), large.stderr
    assert len(large.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_an_image_folder_is_mapped_so_that_training_fills_no_memory_with_it(tmp_path: Path) -> None:
    """900 MB of pixels: what the process fills itself (RssAnon) grows by a fraction of that."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in "ab":
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(600 if split == "train" else 4):
                colour = tuple(int(value) for value in rng.integers(0, 256, 3))
                Image.new("RGB", (16, 16), colour).save(folder / f"{number}.png")
    settings = (
        f"data: {{name: imagefolder, root: {tmp_path}/images, image_size: 512, cache: {tmp_path}/cache}}\n"
        "model: {widths: [2], blocks_per_stage: 1}\n"
        "train: {epochs: 1, batch_size: 4}\n"
        "runtime: {device: cpu, precision: float32, threads: 1, eval_batch_size: 4}\n"
    )
    (tmp_path / "c.yaml").write_text(settings)
    code = (
        "import threading, time, torch, bncli.training\n"
        "from bncli.cli.app import main\n"
        "def now(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))\n"  # noqa: E501
        "start, most = now(), [0]\n"
        "def watch():\n"
        "    while True: most[0] = max(most[0], now()); time.sleep(0.01)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        f"code = main(['train', {str(tmp_path / 'c.yaml')!r}, '--run-dir', {str(tmp_path / 'run')!r}])\n"
        "print('grown', code, most[0] - start)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    entry = max((tmp_path / "cache").glob("*.npy"), key=lambda path: path.stat().st_size)
    _, exit_code, grown = done.stdout.splitlines()[-1].split()
    assert exit_code == "0", done.stderr
    assert entry.stat().st_size > 900_000_000
    assert int(grown) * 1024 < entry.stat().st_size / 2
