"""Images decoded whenever they are asked for: the same as those of the cache, and nothing left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bncli.config import AugmentConfig, ImageFolderConfig
from bncli.data import (
    BatchPlan,
    Dataset,
    digest_dataset,
    imagefolder,
    load_dataset,
    normalization_of,
    sample_batches,
    sequential_batches,
    training_batches,
)
from bncli.data.streamed import StreamedSplit, default_workers
from bncli.errors import DataError
from bncli.indexed import NO_LABEL, pick
from bncli.usable_cpus import UsableCpus


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 classes x 40 training JPEGs and 2 x 3 test PNGs, of different sizes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count, suffix in (("train", 40, "jpg"), ("test", 3, "png")):
        for name in ("cat", "dög"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (*rng.integers(8, 20, 2), 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.{suffix}")
    return root


def load(root: Path, tmp_path: Path, **keys: object) -> Dataset:
    keys = {"image_size": 8, "resize": 10, **keys}
    return load_dataset(ImageFolderConfig(root=str(root), cache=str(tmp_path / "cache"), **keys))


def assert_same(one, other) -> None:
    pairs = list(zip(one, other, strict=True))
    assert pairs
    for (images, labels), (same_images, same_labels) in pairs:
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_streamed_images_are_bit_for_bit_those_of_the_cache_in_every_order(root, tmp_path, workers):
    kept = load(root, tmp_path, stream=False)
    streamed = load(root, tmp_path / "unused", stream=True, workers=workers)
    assert isinstance(streamed.train, StreamedSplit)
    assert not (tmp_path / "unused").exists()  # no raw pixels
    assert (streamed.class_names, len(streamed.train)) == (kept.class_names, len(kept.train))
    assert streamed.train.image_shape == kept.train.image_shape == (3, 8, 8)
    assert torch.equal(streamed.train.labels, kept.train.labels)
    plan = BatchPlan(80, 24)
    epochs = [
        training_batches(
            dataset.train, plan, AugmentConfig(), seed=3, epoch=2, fill=(0.5, 0.5, 0.5), start_step=1
        )
        for dataset in (kept, streamed)
    ]
    assert_same(*epochs)
    assert_same(*(sample_batches(dataset.train, 30, 70) for dataset in (kept, streamed)))
    assert_same(*(sequential_batches(dataset.train, 33) for dataset in (kept, streamed)))
    assert_same(*(sequential_batches(dataset.test, 4) for dataset in (kept, streamed)))
    assert torch.equal(pick(streamed.test, torch.tensor([4, 1])), kept.test.images[[4, 1]])


def test_normalization_is_that_of_all_images_where_a_sample_holds_them_all(root, tmp_path):
    kept, streamed = (load(root, tmp_path, stream=stream, workers=0) for stream in (False, True))
    assert normalization_of(streamed.train) == normalization_of(kept.train)


def test_too_many_images_for_the_cache_are_streamed_and_the_user_is_told(root, tmp_path, monkeypatch):
    assert not isinstance(load(root, tmp_path).train, StreamedSplit)
    monkeypatch.setattr(imagefolder, "MAX_CACHED", 86 * 3 * 8 * 8 - 1)
    streamed = load(root, tmp_path)
    assert isinstance(streamed.train, StreamedSplit)
    assert "data.stream=false" in streamed.notes[0]
    assert not isinstance(load(root, tmp_path, stream=False).train, StreamedSplit)


def test_the_digest_tells_other_files_without_reading_them(root, tmp_path):
    digest = digest_dataset(load(root, tmp_path, stream=True))
    assert digest_dataset(load(root, tmp_path, stream=True)) == digest
    more = root / "train" / "cat" / "new.jpg"
    try:
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(more)
        assert digest_dataset(load(root, tmp_path, stream=True)) != digest
    finally:
        more.unlink()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_image_is_named_in_one_line_and_no_worker_is_left(tmp_path, root, workers):
    damaged = root / "train" / "dög" / "7.jpg"
    content = damaged.read_bytes()
    try:
        damaged.write_bytes(content[: len(content) // 2])
        streamed = load(root, tmp_path, stream=True, workers=workers)
        with pytest.raises(DataError) as caught:
            list(sequential_batches(streamed.train, 50))
    finally:
        damaged.write_bytes(content)
    assert str(damaged) in str(caught.value)
    assert "repair or remove it" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


def read_number(number: int) -> tuple[np.ndarray, int]:
    return np.full(2, number, np.float32), number % 3


def read_ragged(number: int) -> tuple[np.ndarray, int]:
    return np.zeros(2 + (number == 5), np.float32), NO_LABEL


def end_itself(number: int) -> tuple[np.ndarray, int]:
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return read_number(number)


def test_labels_that_nobody_knows_are_read_when_they_are_asked_for():
    assert StreamedSplit(read_number, 7, num_workers=0).labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert StreamedSplit(read_ragged, 5, num_workers=0).labels is None


def test_inputs_of_different_shapes_are_named():
    with pytest.raises(DataError, match=r"inputs 0 and 5 differ: float32 \(2,\) and float32 \(3,\)"):
        list(sequential_batches(StreamedSplit(read_ragged, 9, num_workers=0), 4))


@pytest.mark.slow
def test_a_loop_that_is_left_early_ends_its_workers_and_draws_no_random_number():
    state = torch.random.get_rng_state()
    batches = sequential_batches(StreamedSplit(read_number, 5000, num_workers=2), 64)
    assert next(batches)[0][:, 0].tolist() == list(range(64))
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
def test_a_worker_that_the_system_ends_becomes_one_line():
    with pytest.raises(DataError, match=r"data\.workers: .* set it lower than 2"):
        list(sequential_batches(StreamedSplit(end_itself, 500, num_workers=2), 64))


STREAM_FOREVER = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where tests run in the background
from bncli.data import sequential_batches
from bncli.data.streamed import StreamedSplit, default_workers
from tests.data.test_streamed import read_number
import multiprocessing
split = StreamedSplit(read_number, 10**9, num_workers=2)
for number, _ in enumerate(sequential_batches(split, 256)):
    if number == 20:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_whatever_ends_it(number):
    with subprocess.Popen(
        [sys.executable, "-c", STREAM_FOREVER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as started:
        workers = [int(word) for word in started.stdout.readline().split()]
        if number == signal.SIGINT:
            os.killpg(started.pid, number)  # as a terminal does: it goes to all of them
        else:
            started.send_signal(number)
        started.wait(20)
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(("num_processes", "expected"), [(None, 8), ("1", 8), ("3", 2), ("8", 0), ("x", 8)])
def test_the_processes_of_one_machine_share_its_cpus(
    monkeypatch: pytest.MonkeyPatch, num_processes: str | None, expected: int
) -> None:
    monkeypatch.setattr("bncli.data.streamed.usable_cpus", lambda: UsableCpus(16, 8, None))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if num_processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", num_processes)
    assert default_workers() == expected
