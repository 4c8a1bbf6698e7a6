"""Files from strangers: what they name outside themselves is neither fetched, nor read, nor written.

The oracles are a server that counts requests, Python's audit events (every file opened, every folder listed,
every connection made by this process), and the bytes of all files before and after.
"""

import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bncli.checkpoints import load_checkpoint
from bncli.data import cifar10_files
from tests.conftest import TINY, Bncli, save_as_if_whole
from tests.data.test_cifar10 import ARCHIVE, FOLDER, Tiny

_watchers: list[list[tuple[str, str]]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watchers and (
        event in {"open", "os.scandir", "os.listdir", "os.mkdir", "os.rename", "os.utime"}
        or event.startswith("socket.")
    ):
        for watcher in _watchers:
            watcher.append((event, str(arguments[1] if event == "socket.connect" else arguments[0])))


sys.addaudithook(_audit)  # cannot be removed; without a watcher it does nothing


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """What this process opens, lists, makes and connects to."""
    events: list[tuple[str, str]] = []
    _watchers.append(events)
    try:
        yield events
    finally:
        _watchers.remove(events)


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    class Counting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.requests.append(self.path)  # type: ignore[attr-defined]
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Counting) as httpd:
        httpd.requests = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below, with its modification time and content."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(folder.rglob("*"))
    }


class Stranger:
    """A checkpoint and a run directory that name places of their own choosing, and a user who got them."""

    def __init__(self, base: Path, finished_run: Path, url: str) -> None:
        self.url, self.base = url, base
        self.trap, self.cache = base / "trap", base / "cache"
        self.home = base / "home"  # the working directory, with nothing in it but what the stranger sent
        self.checkpoint, self.run = self.home / "stranger.pt", self.home / "run"
        self.home.mkdir()
        self.content = torch.load(finished_run / "last.pt", weights_only=True)
        for split in ("train", "test"):
            for name in ("secret", "private"):
                path = self.trap / split / name / "0.png"
                path.parent.mkdir(parents=True)
                Image.new("RGB", (32, 32)).save(path)
        (self.trap / FOLDER).mkdir()
        (self.trap / ARCHIVE).write_bytes(b"no archive")
        shutil.copytree(finished_run, self.run)

    def send(self, data: dict[str, object]) -> None:
        """Write the files as a program would that means it."""
        self.content["config"]["data"] = data
        save_as_if_whole(self.content, self.checkpoint)
        save_as_if_whole(self.content, self.run / "last.pt")
        lines = [f"data: {{{', '.join(f'{key}: {value}' for key, value in data.items())}}}"]
        lines += [line for line in TINY.splitlines() if line and not line.startswith("data:")]
        (self.run / "config.yaml").write_text("\n".join(lines) + "\n")


@pytest.fixture
def stranger(
    tmp_path: Path, finished_run: Path, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> Stranger:
    url = f"http://127.0.0.1:{server.server_port}/x.tar.gz"
    made = Stranger(tmp_path, finished_run, url)
    monkeypatch.setattr(cifar10_files, "URL", url)  # a request to the published address would count as well
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(made.home)
    Image.new("RGB", (32, 32)).save(made.home / "image.png")
    return made


KINDS = ("cifar10", "imagefolder")
LOADING = {  # commands that load the data set
    "eval": ("eval", "stranger.pt"),
    "eval --gap": ("eval", "stranger.pt", "--gap"),
    "report --measure": ("report", "stranger.pt", "--measure", "-o", "run/report.html"),
    "recalibrate": ("recalibrate", "stranger.pt", "-o", "new.pt"),
    "recalibrate --verify": ("recalibrate", "stranger.pt", "--verify"),
    "bench eval": ("bench", "eval", "stranger.pt"),
    "demo": ("demo", "stranger.pt", "--save-dir", "ruined"),
    "train --resume": ("train", "--resume", "run", "--set", "train.epochs=3"),
    "train --resume --dry-run": ("train", "--resume", "run", "--dry-run"),
}
NOT_LOADING = {
    "predict": ("predict", "stranger.pt", "image.png"),
    "inspect-stats": ("inspect-stats", "stranger.pt"),
    "compare": ("compare", "stranger.pt", "stranger.pt"),
    "history": ("history", "run"),
    "report": ("report", "run"),
    "doctor": ("doctor", "stranger.pt"),
}


def data_of(stranger: Stranger, kind: str) -> dict[str, object]:
    if kind == "cifar10":
        return {
            "name": kind,
            "root": str(stranger.trap),
            "url": stranger.url,
            "archive": str(stranger.trap / ARCHIVE),
        }
    return {"name": kind, "root": str(stranger.trap), "image_size": 32, "cache": str(stranger.cache)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", [*LOADING, *NOT_LOADING])
def test_what_a_file_names_is_neither_fetched_nor_read_nor_written(
    bncli: Bncli, stranger: Stranger, server: Any, command: str, kind: str
) -> None:
    stranger.send(data_of(stranger, kind))
    before = tree(stranger.trap)
    with watched() as events:
        outcome = bncli(*(LOADING | NOT_LOADING)[command])
    assert server.requests == []
    assert not any(event.startswith("socket.connect") for event, _ in events)
    assert not [path for event, path in events if event == "open" and path.startswith(str(stranger.trap))]
    assert not [path for _, path in events if path.startswith(str(stranger.cache))]
    assert tree(stranger.trap) == before
    assert not stranger.cache.exists()
    assert not (stranger.base / "xdg").exists()
    assert sorted(path.name for path in stranger.home.iterdir()) == sorted(
        {"stranger.pt", "image.png", "run"} | ({"ruined"} & {path.name for path in stranger.home.iterdir()})
    )
    if command in NOT_LOADING:
        assert outcome.code == 0, outcome.err
        return
    assert outcome.code == 2
    errors = [line for line in outcome.err.splitlines() if line.startswith("bncli: error: ")]
    assert len(errors) == 1
    assert "data.root" in errors[0]
    assert f"data.root={stranger.trap}" in outcome.err
    reason = "does not hold CIFAR-10" if kind == "cifar10" else "it has other classes"
    assert reason in outcome.err
    if kind == "cifar10":
        assert "--set data.url=" in errors[0]


@pytest.mark.parametrize(
    "root",
    ["/net/host.example/x", "/net/../net/host.example", "/proc/self/root", "/", "//net/x", "~nobody-here/x"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_places_where_a_look_asks_another_machine_are_not_looked_at(
    bncli: Bncli, stranger: Stranger, kind: str, root: str
) -> None:
    stranger.send({"name": kind, "root": root})
    with watched() as events:
        result = bncli("eval", "stranger.pt")
    assert result.code == 2
    assert root.startswith("~") or "bncli does not look into such a folder" in result.err
    listed = [path for event, path in events if event == "os.scandir"]
    assert not [path for path in listed if path.startswith(("/net", "/proc/self/root", "//")) or path == "/"]


def test_what_is_named_on_the_command_line_is_fetched(bncli: Bncli, stranger: Stranger, server: Any) -> None:
    stranger.send(data_of(stranger, "cifar10"))
    outcome = bncli("eval", "stranger.pt", "--set", f"data.url={stranger.url}")
    assert outcome.code == 2
    assert "cannot download" in outcome.err
    assert server.requests == ["/x.tar.gz"]


def test_threads_batches_and_devices_of_a_file_stay_within_the_machine(
    bncli: Bncli, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = torch.load(finished_run / "last.pt", weights_only=True)
    content["config"]["runtime"] |= {"threads": 1024, "eval_batch_size": 1_000_000, "device": "cuda:97"}
    content["recalibration"] = {"batch_size": 10**6, "num_images": 10**9, "layers": None}
    save_as_if_whole(content, tmp_path / "greedy.pt")
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    outcome = bncli("eval", tmp_path / "greedy.pt", "--json", "--num-images", "4", "--batch-sizes", "2")
    assert outcome.code == 0, outcome.err
    assert asked == []
    assert outcome.err.count("which is not used") == 3
    verified = bncli(
        "recalibrate", tmp_path / "greedy.pt", "--verify", "--json", "--set", "runtime.device=cpu"
    )
    assert verified.json["batch_size"] == 250
    assert bncli("eval", tmp_path / "greedy.pt", "--set", "runtime.device=cuda:97").code == 2


# What a user relies on: his own files, whose data are where they were.


def train_on(bncli: Bncli, data: str, run_dir: Path) -> None:
    lines = [line for line in TINY.splitlines() if not line.startswith("data:")]
    config = run_dir.with_suffix(".yaml")
    config.write_text("\n".join([f"data: {data}", *lines, ""]).replace("batch_size: 50", "batch_size: 4"))
    outcome = bncli("train", config, "--run-dir", run_dir)
    assert outcome.code == 0, outcome.err


@pytest.fixture
def own_cifar10(bncli: Bncli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Any) -> Path:
    """A run on a tiny CIFAR-10 that lies in tmp_path/mine."""
    tiny = Tiny(tmp_path, monkeypatch)
    monkeypatch.setattr(cifar10_files, "URL", f"http://127.0.0.1:{server.server_port}/x.tar.gz")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    data = f"{{name: cifar10, root: {tmp_path / 'mine'}, archive: {tiny.archive}}}"
    train_on(bncli, data, tmp_path / "run")
    tiny.archive.unlink()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "run"


@pytest.fixture
def own_images(bncli: Bncli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on an image folder in tmp_path/mine, whose cache is named."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for number in range(6):
                path = tmp_path / "mine" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    data = f"{{name: imagefolder, root: {tmp_path / 'mine'}, cache: {tmp_path / 'cache'}}}"
    train_on(bncli, data, tmp_path / "run")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "run"


def accuracy(outcome: Any) -> float:
    assert outcome.code == 0, outcome.err
    found: float = outcome.json["accuracy"]
    return found


EVAL = ("--json", "--num-images", "4", "--batch-sizes", "2")


def test_ones_own_cifar10_is_found_again_and_a_damaged_one_is_not_followed(
    bncli: Bncli, own_cifar10: Path, tmp_path: Path, server: Any
) -> None:
    last = own_cifar10 / "last.pt"
    before = tree(tmp_path / "mine")
    outcome = bncli("eval", last, *EVAL)
    assert accuracy(outcome) == load_checkpoint(last).test_accuracy
    assert "not used" not in outcome.err
    assert bncli("train", "--resume", own_cifar10, "--set", "train.epochs=3").code == 0
    assert f"root: {tmp_path / 'mine'}" in (own_cifar10 / "config.yaml").read_text()
    assert tree(tmp_path / "mine") == before
    (tmp_path / "mine" / FOLDER / "data_batch_2").write_bytes(b"damaged")
    for command in (("eval", last), ("train", "--resume", own_cifar10, "--set", "train.epochs=4")):
        damaged = bncli(*command)
        assert damaged.code == 2
        assert f"data.root={tmp_path / 'mine'} (what it holds is not CIFAR-10 as published)" in damaged.err
    assert server.requests == []
    assert list((tmp_path / "empty").iterdir()) == []


def test_ones_own_images_are_found_again_by_their_digest(
    bncli: Bncli, own_images: Path, tmp_path: Path
) -> None:
    last, cached = own_images / "last.pt", tree(tmp_path / "cache")
    first = bncli("eval", last, *EVAL)
    assert accuracy(first) == load_checkpoint(last).test_accuracy
    assert f"data.cache={tmp_path / 'cache'}: not used" in first.err
    assert tree(tmp_path / "cache") == cached
    resumed = bncli("train", "--resume", own_images, "--set", "train.epochs=3")
    assert resumed.code == 0, resumed.err
    assert tree(tmp_path / "cache") == cached
    named = bncli("eval", own_images / "best.pt", *EVAL, "--set", f"data.cache={tmp_path / 'cache'}")
    assert named.code == 0
    assert "not used" not in named.err


def test_a_digest_is_computed_once_and_an_edited_image_is_noticed(
    bncli: Bncli, own_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = own_images / "last.pt"
    assert bncli("eval", last, *EVAL).code == 0  # fills the user's own cache, and notes the digest there
    with monkeypatch.context() as patch:
        patch.setattr("bncli.data.imagefolder.digest_dataset", None)
        patch.setattr("bncli.data.imagefolder.digest_splits", None)
        assert bncli("eval", last, *EVAL).code == 0
    path = tmp_path / "mine" / "train" / "cat" / "0.png"
    Image.new("RGB", (32, 32)).save(path)
    xdg = tree(tmp_path / "xdg")
    for command in (("eval", last), ("train", "--resume", own_images, "--set", "train.epochs=3")):
        refused = bncli(*command)
        assert refused.code == 2
        assert f"data.root={tmp_path / 'mine'} (it has other images or labels" in refused.err
    assert tree(tmp_path / "xdg") == xdg
    assert accuracy(bncli("eval", last, *EVAL, "--set", f"data.root={tmp_path / 'mine'}")) >= 0


def test_a_run_without_a_checkpoint_has_no_digest_to_know_images_by(
    bncli: Bncli, own_images: Path, tmp_path: Path
) -> None:
    (own_images / "last.pt").unlink()
    refused = bncli("train", "--resume", own_images)
    assert refused.code == 2
    assert "the file holds no digest" in refused.err
    assert bncli("train", "--resume", own_images, "--set", f"data.root={tmp_path / 'mine'}").code == 0


def as_link(file: Path, outside: Path) -> None:
    file.symlink_to(outside)


def as_pipe(file: Path, _: Path) -> None:
    os.mkfifo(file)


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
@pytest.mark.parametrize("make", [as_link, as_pipe])
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_in_a_run_directory_is_not_written_through(
    bncli: Bncli,
    finished_run: Path,
    tmp_path: Path,
    name: str,
    make: Callable[[Path, Path], None],
    exists: bool,
) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    outside = tmp_path / "outside"
    if exists:
        outside.write_text("precious")
    (tmp_path / "run" / name).unlink()
    make(tmp_path / "run" / name, outside)
    refused = bncli("train", "--resume", tmp_path / "run", "--set", "train.epochs=3")
    assert refused.code == 2
    assert f"{name}: is a link or no file" in refused.err
    assert outside.read_text() == "precious" if exists else not outside.exists()
