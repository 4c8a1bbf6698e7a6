import hashlib
import io
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from bncli.config import Cifar10Config
from bncli.data import cifar10_files, load_dataset
from bncli.errors import DataError
from bncli.torchvision_compat import import_torchvision

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
CLASSES = ["cat", "dog", "owl"]


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote str, as in the published files."""

    dispatch: ClassVar = pickle._Pickler.dispatch.copy()

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_bytes


def python2_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


class Tiny:
    """A CIFAR-10 of 4 images per batch in the published format, and bncli told to expect it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(1)
        self.monkeypatch = monkeypatch
        self.pixels, self.labels, self.files = [], [], {}
        names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
        for name in names:
            data = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
            labels = rng.integers(0, 3, 4).tolist()
            self.pixels.append(data)
            self.labels.append(labels)
            self.files[name] = python2_pickle({b"data": data, b"labels": labels})
        self.files["batches.meta"] = python2_pickle({b"label_names": [name.encode() for name in CLASSES]})
        hashes = {name: md5(content) for name, content in self.files.items()}
        monkeypatch.setattr(cifar10_files, "TRAIN", {name: hashes[name] for name in names[:5]})
        monkeypatch.setattr(cifar10_files, "TEST", {"test_batch": hashes["test_batch"]})
        monkeypatch.setattr(cifar10_files, "META", {"batches.meta": hashes["batches.meta"]})
        # unless a test says otherwise, nothing may go out to the network
        monkeypatch.setattr(cifar10_files, "URL", "http://127.0.0.1:1/nowhere.tar.gz")
        self.archive = folder / "published" / ARCHIVE
        self.archive.parent.mkdir()
        self.publish(tar_of({f"{FOLDER}/{name}": content for name, content in self.files.items()}))

    def publish(self, archive: bytes) -> None:
        self.archive.write_bytes(archive)
        self.monkeypatch.setattr(cifar10_files, "ARCHIVE_MD5", md5(archive))

    def check(self, dataset) -> None:
        images = np.concatenate(self.pixels).reshape(-1, 3, 32, 32)
        assert np.array_equal(dataset.train.images.numpy(), images[:20])
        assert np.array_equal(dataset.test.images.numpy(), images[20:])
        assert dataset.train.labels.tolist() == list(chain(*self.labels[:5]))
        assert dataset.test.labels.tolist() == self.labels[5]
        assert dataset.class_names == ("cat", "dog", "owl")
        assert dataset.train.images.is_contiguous()


def test_names_addresses_and_md5s_are_those_that_torchvision_lists():
    reader = import_torchvision().datasets.CIFAR10
    ours = cifar10_files
    assert list(ours.TRAIN.items()) == [tuple(pair) for pair in reader.train_list]
    assert list(ours.TEST.items()) == [tuple(pair) for pair in reader.test_list]
    assert {reader.meta["filename"]: reader.meta["md5"]} == ours.META
    assert (reader.base_folder, reader.filename) == (ours.FOLDER, ours.ARCHIVE)
    assert (reader.url, reader.tgz_md5) == (ours.URL, ours.ARCHIVE_MD5)


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Tiny:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return Tiny(tmp_path, monkeypatch)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        self.server.requests.append(self.path)


@pytest.fixture
def server(tiny):
    handler = partial(QuietHandler, directory=tiny.archive.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.requests = []
        httpd.url = f"http://127.0.0.1:{httpd.server_port}/{ARCHIVE}"
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


def leftovers(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*")) if root.is_dir() else []


def test_a_mirror_is_downloaded_once_checked_and_read(tiny, server, tmp_path, capsys):
    calls = []
    config = Cifar10Config(root=str(tmp_path / "data"), url=server.url)
    tiny.check(load_dataset(config, progress=lambda *call: calls.append(call)))
    assert calls[-1][1] == calls[-1][2] == tiny.archive.stat().st_size
    tiny.check(load_dataset(config))
    assert len(server.requests) == 1
    assert capsys.readouterr().out == ""
    assert leftovers(tmp_path / "data") == sorted([FOLDER, ARCHIVE, *tiny.files])


def test_files_that_were_read_ahead_are_not_read_again(tiny, tmp_path):
    root = tmp_path / "data"
    config = Cifar10Config(root=str(root), archive=str(tiny.archive))
    cifar10_files.read_ahead(root / FOLDER)
    tiny.check(load_dataset(config))  # there was nothing to read, so it was unpacked
    cifar10_files.read_ahead(root / FOLDER)
    while any(thread.name.startswith("read-ahead") for thread in threading.enumerate()):
        time.sleep(0.01)
    for file in (root / FOLDER).iterdir():
        file.write_bytes(b"changed since")
    tiny.check(load_dataset(config))
    tiny.archive.unlink()
    with pytest.raises(DataError, match="cannot read"):
        load_dataset(config)


def test_no_test_image_is_read_where_only_training_images_are_wanted(tiny, tmp_path):
    config = Cifar10Config(root=str(tmp_path / "data"), archive=str(tiny.archive))
    whole = load_dataset(config)
    (tmp_path / "data" / FOLDER / "test_batch").write_bytes(b"damaged, which nobody sees")
    tiny.archive.unlink()
    found = load_dataset(config, only_train=True)
    assert found.test is found.train
    assert torch.equal(found.train.images, whole.train.images)
    assert torch.equal(found.train.labels, whole.train.labels)


def test_what_a_thread_could_not_read_is_reported_where_it_is_needed(tiny, tmp_path, monkeypatch):
    root = tmp_path / "data"
    load_dataset(Cifar10Config(root=str(root), archive=str(tiny.archive)))
    monkeypatch.setattr(cifar10_files, "_read_into", lambda _, file, __: file.read_text(encoding="ascii"))
    cifar10_files.read_ahead(root / FOLDER)
    with pytest.raises(DataError, match=r"cannot be read: .*codec"):
        load_dataset(Cifar10Config(root=str(root), archive=str(tiny.archive)))


def test_without_memory_to_read_ahead_files_are_read_later(tiny, tmp_path, monkeypatch):
    root = tmp_path / "data"
    config = Cifar10Config(root=str(root), archive=str(tiny.archive))
    load_dataset(config)
    original, calls = cifar10_files._read, []

    def too_large_at_first(root: Path, **how: bool) -> object:
        calls.append(root)
        if len(calls) == 1:
            raise MemoryError
        return original(root, **how)

    monkeypatch.setattr(cifar10_files, "_read", too_large_at_first)
    cifar10_files.read_ahead(root / FOLDER)
    tiny.check(load_dataset(config))
    assert len(calls) == 2


AHEAD = """
import sys
from bncli.data import cifar10_files
def read_ahead(folder):
    print(folder, "torch" in sys.modules)
    sys.exit(3)  # nothing of what follows is asked for
cifar10_files.read_ahead = read_ahead
from bncli.cli.app import main
sets = ["--set", "data.root=" + sys.argv[1], "--set", "data.archive=" + sys.argv[1]]  # no file: no download
sys.exit(main(["train", "configs/cifar10.yaml", *sets, "--dry-run"]))
"""


def test_train_begins_to_read_before_it_imports_torch(tmp_path):
    (tmp_path / FOLDER).mkdir()
    for name in (*cifar10_files.TRAIN, *cifar10_files.TEST, *cifar10_files.META):
        (tmp_path / FOLDER / name).write_bytes(b"")
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", AHEAD, str(tmp_path)], capture_output=True, text=True, check=False, cwd=root
    )
    assert (done.returncode, done.stdout) == (3, f"{tmp_path / FOLDER} False\n"), done.stderr


def test_without_a_mirror_the_published_address_is_used(tiny, server, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10_files, "URL", server.url)
    tiny.check(load_dataset(Cifar10Config(root=str(tmp_path / "data"))))


def test_a_local_archive_needs_no_network(tiny, tmp_path):
    root = tmp_path / "new" / "data"
    tiny.check(load_dataset(Cifar10Config(root=str(root), archive=str(tiny.archive))))
    assert leftovers(root) == sorted([FOLDER, *tiny.files])


def test_an_archive_that_torchvision_downloaded_before_is_used(tiny, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / ARCHIVE).write_bytes(tiny.archive.read_bytes())
    tiny.check(load_dataset(Cifar10Config(root=str(root))))


@pytest.fixture
def no_network(monkeypatch):
    """Fail where anything would be downloaded."""
    monkeypatch.setattr("bncli.data.cifar10._download", None)


@pytest.mark.parametrize(
    ("lies_in", "root"),
    [
        (FOLDER, ""),
        (FOLDER, FOLDER),
        (FOLDER, "sub"),
        (f"sub/{FOLDER}", ""),
        ("renamed", "renamed"),
        ("renamed", ""),
    ],
)
def test_batches_at_the_root_itself_or_one_folder_up_or_down_are_found(
    tiny, tmp_path, no_network, lies_in, root
):
    tiny.archive.unlink()
    base = tmp_path / "base"
    (base / "sub").mkdir(parents=True)
    (base / lies_in).mkdir(parents=True)
    for name, content in tiny.files.items():
        (base / lies_in / name).write_bytes(content)
    before = leftovers(base)
    tiny.check(load_dataset(Cifar10Config(root=str(base / root))))
    assert leftovers(base) == before


def test_batches_in_the_working_directory_are_found(tiny, tmp_path, no_network, monkeypatch):
    root = tmp_path / "data"
    load_dataset(Cifar10Config(root=str(root), archive=str(tiny.archive)))
    (root / "sub").mkdir()
    for folder in (FOLDER, "", "sub"):
        monkeypatch.chdir(root / folder)
        tiny.check(load_dataset(Cifar10Config(root=".")))


@pytest.mark.parametrize("root", ["", FOLDER, "sub"])
def test_an_archive_beside_is_unpacked_and_not_downloaded(tiny, tmp_path, no_network, root):
    base = tmp_path / "base"
    base.mkdir()
    tiny.archive.rename(base / ARCHIVE)
    tiny.check(load_dataset(Cifar10Config(root=str(base / root))))
    assert not (base / FOLDER / FOLDER).exists()


def test_damaged_batches_beside_whole_ones_are_passed_over(tiny, tmp_path, no_network):
    root = tmp_path / "base" / "data"
    load_dataset(Cifar10Config(root=str(root), archive=str(tiny.archive)))
    shutil.copytree(root / FOLDER, tmp_path / "base" / FOLDER)
    (tmp_path / "base" / FOLDER / "data_batch_1").write_bytes(b"damaged")
    tiny.archive.unlink()
    tiny.check(load_dataset(Cifar10Config(root=str(tmp_path / "base"))))


def test_a_root_that_is_the_archive_is_named(tiny, no_network):
    message = error_of(Cifar10Config(root=str(tiny.archive)))
    assert "is a file" in message
    assert "data.archive" in message


@pytest.mark.parametrize(
    ("text", "reason"), [("~nobody-of-this-name/x", "home directory"), ("a\0b", "is not a path")]
)
@pytest.mark.parametrize("key", ["root", "archive"])
def test_a_path_that_cannot_be_one_is_named(tiny, no_network, key, text, reason):
    message = error_of(Cifar10Config(**{key: text}))
    assert message.startswith(f"data.{key}: ")
    assert reason in message


def test_where_nothing_may_be_fetched_unasked_the_error_says_what_to_type(tiny, tmp_path, server):
    tiny.monkeypatch.setattr(cifar10_files, "URL", server.url)
    config = Cifar10Config(root=str(tmp_path / "data"))
    with pytest.raises(DataError, match=rf"there is no .*{FOLDER}, nor one above or below") as caught:
        load_dataset(config, may_download=False)
    for key in ("root", "archive", f"url={server.url}"):
        assert f"--set data.{key}" in str(caught.value)
    assert not (tmp_path / "data").exists()
    (tmp_path / "data" / FOLDER).mkdir(parents=True)
    with pytest.raises(DataError, match="lacks data_batch_1, "):
        load_dataset(config, may_download=False)
    for name in tiny.files:
        (tmp_path / "data" / FOLDER / name).write_bytes(b"")
    with pytest.raises(DataError, match="is damaged"):
        load_dataset(config, may_download=False)
    assert server.requests == []
    named = config.model_copy(update={"url": server.url})
    tiny.check(load_dataset(named, may_download=False))
    assert len(server.requests) == 1


@pytest.mark.parametrize("inside", [True, False])
def test_an_incomplete_or_damaged_folder_is_named_and_nothing_is_downloaded(tiny, tmp_path, server, inside):
    tiny.monkeypatch.setattr(cifar10_files, "URL", server.url)
    base = tmp_path / "base" / "data"  # away from the archive
    folder = base / FOLDER if inside else base / "mine"
    folder.mkdir(parents=True)
    config = Cifar10Config(root=str(base if inside else folder))
    (folder / "data_batch_1").write_bytes(b"")
    assert f"{folder} lacks data_batch_2, " in error_of(config)
    for name in tiny.files:
        (folder / name).write_bytes(b"")
    assert f"{folder} is damaged" in error_of(config)
    assert server.requests == []


def test_a_damaged_batch_is_replaced_from_the_archive(tiny, tmp_path):
    config = Cifar10Config(root=str(tmp_path), archive=str(tiny.archive))
    load_dataset(config)
    (tmp_path / FOLDER / "data_batch_3").write_bytes(b"damaged")
    tiny.check(load_dataset(config))


def error_of(config: Cifar10Config) -> str:
    with pytest.raises(DataError) as caught:
        load_dataset(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_download_with_the_wrong_md5_is_thrown_away(tiny, server, tmp_path):
    tiny.archive.write_bytes(b"another file")
    message = error_of(Cifar10Config(root=str(tmp_path / "data"), url=server.url))
    assert md5(b"another file") in message
    assert cifar10_files.ARCHIVE_MD5 in message
    assert leftovers(tmp_path / "data") == []


def test_a_local_archive_with_the_wrong_md5_is_refused(tiny, tmp_path):
    tiny.archive.write_bytes(tiny.archive.read_bytes()[:-100])
    message = error_of(Cifar10Config(root=str(tmp_path / "data"), archive=str(tiny.archive)))
    assert str(tiny.archive) in message
    assert f"expected {cifar10_files.ARCHIVE_MD5}" in message
    assert leftovers(tmp_path / "data") == []


def test_offline_the_error_names_the_three_ways_out(tiny, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    message = error_of(Cifar10Config(root=str(tmp_path / "data"), url=f"http://127.0.0.1:{port}/x.tar.gz"))
    assert "refused" in message
    for way in ("data.url", "data.archive", cifar10_files.ARCHIVE_MD5, "data.root", FOLDER):
        assert way in message


@pytest.mark.parametrize(("url", "reason"), [("{}.missing", "404"), ("no address", "must begin with http")])
def test_a_wrong_address_is_named(tiny, server, tmp_path, url, reason):
    url = url.format(server.url)
    message = error_of(Cifar10Config(root=str(tmp_path / "data"), url=url))
    assert url in message
    assert reason in message
    assert leftovers(tmp_path / "data") == []


def test_a_connection_that_breaks_off_leaves_nothing(tiny, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def send_half() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 500)

        thread = threading.Thread(target=send_half)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/{ARCHIVE}"
        message = error_of(Cifar10Config(root=str(tmp_path / "data"), url=url))
        thread.join()
    assert "broke off after 500 of 1000 bytes" in message
    assert leftovers(tmp_path / "data") == []


def test_a_truncated_archive_leaves_nothing_half_extracted(tiny, tmp_path):
    tiny.publish(tiny.archive.read_bytes()[:-5000])
    message = error_of(Cifar10Config(root=str(tmp_path / "data"), archive=str(tiny.archive)))
    assert "cannot be unpacked" in message
    assert leftovers(tmp_path / "data") == []


def test_an_archive_cannot_write_outside_its_folder(tiny, tmp_path):
    tiny.publish(tar_of({"../../escaped": b"x"}))
    message = error_of(Cifar10Config(root=str(tmp_path / "a" / "data"), archive=str(tiny.archive)))
    assert f"holds no {FOLDER}/data_batch_1" in message
    assert not list(tmp_path.rglob("escaped"))


def test_a_link_in_an_archive_leads_nowhere_outside(tiny, tmp_path):
    """Of a symbolic link and of a hard link to a file beside `root`, then written through."""
    victim = tmp_path / "a" / "victim"
    victim.parent.mkdir()
    for kind, target in ((tarfile.SYMTYPE, "../../../victim"), (tarfile.LNKTYPE, "../../victim")):
        for target_name in (target, str(victim)):
            victim.write_bytes(b"mine")
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
                link = tarfile.TarInfo(f"{FOLDER}/data_batch_1")
                link.type, link.linkname = kind, target_name
                tar.addfile(link)
                through = tarfile.TarInfo(f"{FOLDER}/data_batch_1")
                through.size = 4
                tar.addfile(through, io.BytesIO(b"evil"))
            tiny.publish(buffer.getvalue())
            root = tmp_path / "a" / "data"
            message = error_of(Cifar10Config(root=str(root), archive=str(tiny.archive)))
            assert f"holds no {FOLDER}/data_batch_" in message
            assert victim.read_bytes() == b"mine"
            assert leftovers(root) == []


def test_a_redirection_to_a_file_is_not_followed(tiny, tmp_path):
    for target in (tiny.archive.as_uri(), "ftp://127.0.0.1/x", "data:,x"):

        class Redirect(QuietHandler):
            location = target

            def do_GET(self) -> None:
                self.send_response(302)
                self.send_header("Location", self.location)
                self.send_header("Content-Length", "0")
                self.end_headers()

        with ThreadingHTTPServer(("127.0.0.1", 0), Redirect) as httpd:
            httpd.requests = []
            thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
            thread.start()
            url = f"http://127.0.0.1:{httpd.server_port}/{ARCHIVE}"
            message = error_of(Cifar10Config(root=str(tmp_path / "data"), url=url))
            httpd.shutdown()
            thread.join()
        assert "unknown url type" in message or "is not allowed" in message
        assert leftovers(tmp_path / "data") == []


def test_a_download_that_never_ends_is_broken_off(tiny, server, tmp_path, monkeypatch):
    monkeypatch.setattr("bncli.data.cifar10._ARCHIVE_BYTES", 1000)
    message = error_of(Cifar10Config(root=str(tmp_path / "data"), url=server.url))
    assert "it sends more than the archive's 1,000 bytes" in message
    assert leftovers(tmp_path / "data") == []


def test_a_pipe_in_the_place_of_the_archive_is_not_waited_for(tiny, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    message = error_of(Cifar10Config(root=str(tmp_path / "data"), archive=str(tmp_path / "pipe")))
    assert f"data.archive: cannot read {tmp_path / 'pipe'}: not a file" in message


def test_an_archive_without_the_batches_is_refused(tiny, tmp_path):
    tiny.publish(tar_of({"readme": b"x"}))
    message = error_of(Cifar10Config(root=str(tmp_path / "data"), archive=str(tiny.archive)))
    assert f"holds no {FOLDER}/data_batch_1" in message


def test_batches_with_another_md5_are_never_unpickled(tiny, tmp_path):
    tiny.publish(tar_of({f"{FOLDER}/{name}": b"not a pickle" for name in tiny.files}))
    message = error_of(Cifar10Config(root=str(tmp_path / "data"), archive=str(tiny.archive)))
    assert "MD5" in message


def test_a_root_that_cannot_be_written_is_named(tiny, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    root = tmp_path / "file" / "data"
    assert f"data.root: cannot write CIFAR-10 to {root}" in error_of(
        Cifar10Config(root=str(root), archive=str(tiny.archive))
    )


def test_a_missing_archive_is_named(tiny, tmp_path):
    missing = tmp_path / "missing.tar.gz"
    message = error_of(Cifar10Config(root=str(tmp_path / "data"), archive=str(missing)))
    assert f"data.archive: cannot read {missing}" in message


def unpickled(path: Path) -> dict[bytes, object]:
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"dtype\(\): align")
        return pickle.load(file, encoding="bytes")


def test_the_real_data_equals_the_pickles(real_cifar10):
    dataset = load_dataset(Cifar10Config(root=str(real_cifar10)))
    names = [f"data_batch_{i}" for i in range(1, 6)]
    entries = [unpickled(real_cifar10 / FOLDER / name) for name in [*names, "test_batch"]]
    images = np.concatenate([entry[b"data"] for entry in entries]).reshape(-1, 3, 32, 32)
    labels = list(chain(*(entry[b"labels"] for entry in entries)))
    loaded = torch.cat([dataset.train.images, dataset.test.images]).numpy()
    assert np.array_equal(loaded, images)
    assert torch.cat([dataset.train.labels, dataset.test.labels]).tolist() == labels
    assert (len(dataset.train), len(dataset.test)) == (50_000, 10_000)
    meta = unpickled(real_cifar10 / FOLDER / "batches.meta")
    assert [name.encode() for name in dataset.class_names] == meta[b"label_names"]
