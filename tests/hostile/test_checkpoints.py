"""Checkpoints made to harm: code, sizes that lie, networks that do not fit into memory, wrong values."""

import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bncli.checkpoints import load_checkpoint, load_model
from bncli.checkpoints.byte_source import MAX_READ
from bncli.checkpoints.own_reader import load_values, open_whole
from bncli.checkpoints.part_digests import digest_parts
from bncli.errors import CheckpointError
from tests.conftest import Bncli

HUGE = 1 << 40


def read_whole(path: Path) -> Any:
    with open_whole(path) as (_, content):
        return load_values(content)


def zip_with(program: bytes, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in {"data.pkl": program, "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def tensor_program(num_values: int, shape: int, stride: int, offset: int = 0) -> bytes:
    """The pickle of one tensor as torch.save writes it, with sizes that may lie."""

    def whole(number: int) -> bytes:
        return pickle.dumps(number, 2)[2:-1]

    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + whole(num_values) + b"tQ" + whole(offset)
        + whole(shape) + b"\x85" + whole(stride) + b"\x85" + b"\x89ccollections\nOrderedDict\n)RtR."
    )  # fmt: skip


def refused(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "hostile.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_whole(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_honest_files_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 6, generator=generator)
    content = {
        "types": [
            torch.arange(3).to(dtype) for dtype in (torch.uint8, torch.int64, torch.bfloat16, torch.bool)
        ],
        "strided": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "views": (values, values[1:3, ::2], values.T),
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 3),
        "plain": OrderedDict(a=1, b=-1.5, c=None, d=True, e="ü", f=(1, [2]), g=2**70),
    }
    torch.save(content, tmp_path / "file.pt")
    ours = read_whole(tmp_path / "file.pt")
    theirs = torch.load(tmp_path / "file.pt", weights_only=True)
    assert digest_parts(ours) == digest_parts(theirs) == digest_parts(content)
    assert ours["strided"].stride() == content["strided"].stride()


def test_the_tensor_program_of_these_tests_is_an_honest_one_when_its_sizes_are(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(zip_with(tensor_program(4, 2, 2, 1), {"data/0": np.arange(4, dtype="f4").tobytes()}))
    assert read_whole(path).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (tensor_program(HUGE, 4, 1), "said to hold 1099511627776 values, but holds 4"),
        (tensor_program(5, 5, 1), "said to hold 5 values, but holds 4"),
        (tensor_program(4, HUGE, 0), "does not fit its storage of 4 values"),
        (tensor_program(4, 4, 1, offset=1), "damaged"),
        (tensor_program(4, 2, HUGE), "damaged"),
        (tensor_program(4, 2, -1), "negative"),
        (tensor_program(4, -2, 1), "negative"),
        (tensor_program(4, 2, 1, offset=-1), "negative"),
    ],
)
def test_a_tensor_whose_sizes_lie_is_refused_before_it_exists(
    tmp_path: Path, program: bytes, expected: str
) -> None:
    assert expected in refused(tmp_path, zip_with(program, {"data/0": bytes(16)}))


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (pickle.dumps(os.mkdir, 2), "posix.mkdir"),
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.", "builtins.bytearray"),
        (b"\x80\x02ctorch\nFloatTensor\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.", "torch.FloatTensor"),
        (b"\x80\x02ctorch\nFloatStorage\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.", "torch.FloatStorage"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "object number"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x00.", "damaged"),
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "nested deeper"),
        (b"\x80\x02]q\x00h\x00a.", "nested deeper"),
        (b"\x80\x02]q\x00" + b"".join(b"]q%c(" % i + b"h%c" % (i - 1) * 10 + b"e" for i in range(1, 40)) + b".",  # noqa: E501
         "more than 2,000,000 values"),
        (b"\x80\x02K\x01K\x02K\x03s.", "damaged"),
        (b"\x80\x02NK\x01a.", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"", "damaged"),
    ],
)  # fmt: skip
def test_a_pickle_that_is_a_program_is_not_followed(tmp_path: Path, program: bytes, expected: str) -> None:
    assert expected in refused(tmp_path, zip_with(program, {}))


def test_a_pickle_of_another_protocol_is_read_as_data_and_is_no_checkpoint(tmp_path: Path) -> None:
    for protocol in (0, 1, 2, 4, 5):
        program = pickle.dumps({"format": "x" * 300, "n": [1, -1.5, 2**70, None, True]}, protocol)
        (tmp_path / "file.pt").write_bytes(zip_with(program, {}))
        assert read_whole(tmp_path / "file.pt") == pickle.loads(program)
        with pytest.raises(CheckpointError, match="no bncli checkpoint"):
            load_checkpoint(tmp_path / "file.pt")


def test_a_storage_of_another_size_than_its_entry_is_refused(tmp_path: Path) -> None:
    program = tensor_program(3, 3, 1)
    assert "said to hold 3 values, but holds 4" in refused(tmp_path, zip_with(program, {"data/0": bytes(16)}))


def test_an_entry_without_a_checksum_or_with_a_twin_is_refused(tmp_path: Path) -> None:
    """Others write 0 for speed; what bncli writes has a checksum for each entry, read or not."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "file.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert "checksum" in refused(tmp_path, (tmp_path / "file.pt").read_bytes())
    whole = zip_with(tensor_program(4, 4, 1), {"data/0": bytes(16), "data/unused": b"x" * 99})
    (tmp_path / "sound.pt").write_bytes(whole)
    assert read_whole(tmp_path / "sound.pt").tolist() == [0] * 4
    assert "checksum of its entry archive/data/unused" in refused(tmp_path, whole.replace(b"xx", b"xy", 1))
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(tmp_path / "a.zip", "w") as archive,
    ):
        for _ in range(2):
            archive.writestr("archive/data.pkl", pickle.dumps(1, 2))
    assert "a name each" in refused(tmp_path, (tmp_path / "a.zip").read_bytes())
    other = io.BytesIO(zip_with(pickle.dumps(1, 2), {}))
    with zipfile.ZipFile(other, "a") as archive:
        archive.writestr("elsewhere/data/0", b"")
    assert "one folder" in refused(tmp_path, other.getvalue())


def test_a_tensor_larger_than_is_read_at_once_is_loaded_and_only_once(tmp_path: Path) -> None:
    large = torch.arange(MAX_READ // 4 + 1000, dtype=torch.int32)
    torch.save({"a": large, "b": large[5:]}, tmp_path / "large.pt")
    found = read_whole(tmp_path / "large.pt")
    assert torch.equal(found["a"], large)
    assert found["b"].untyped_storage().data_ptr() == found["a"].untyped_storage().data_ptr()
    found["a"][5] = -1  # it is nobody else's memory, and can be written
    assert found["b"][0] == -1


def test_a_checkpoint_that_poses_as_torchscript_is_not_read_less_strictly(
    smallest_run: Path, tmp_path: Path
) -> None:
    data = io.BytesIO((smallest_run / "last.pt").read_bytes())
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr("archive/code/x.py", "")
    (tmp_path / "posing.pt").write_bytes(data.getvalue())
    with pytest.raises(CheckpointError, match="a torchscript file, but no bncli checkpoint"):
        load_checkpoint(tmp_path / "posing.pt")


def test_numbers_as_keys_are_not_text(tmp_path: Path) -> None:
    content = {0: "number", "0": "text", -7: 1, 2**31 - 1: 2, -(2**31): 3}
    torch.save(content, tmp_path / "keys.pt")
    assert read_whole(tmp_path / "keys.pt") == content


def test_attributes_of_a_dict_cannot_stand_in_for_its_methods(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    program = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb."
    path.write_bytes(zip_with(program, {}))
    assert list(read_whole(path).items()) == []


def test_a_compressed_archive_is_refused_unread(tmp_path: Path) -> None:
    bomb = zip_with(tensor_program(4, 4, 1), {"data/0": bytes(1 << 24)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 1 << 16
    assert "compressed" in refused(tmp_path, bomb)


def test_records_that_overlap_are_refused_unread(tmp_path: Path) -> None:
    """Thousands of entries that share one record's bytes: small on disk, huge in memory."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", tensor_program(4, 4, 1))
        archive.writestr("archive/data/0", bytes(1 << 20))
        whole = archive.getinfo("archive/data/0")
        for number in range(1, 1000):
            twin = zipfile.ZipInfo(f"archive/data/{number}")
            twin.header_offset, twin.file_size, twin.compress_size = whole.header_offset, 1 << 20, 1 << 20
            twin.CRC = whole.CRC
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
    assert "larger than the file" in refused(tmp_path, file.getvalue())


def signed(smallest_run: Path, path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A checkpoint with a change, whose digests a forger made right again."""
    content = torch.load(smallest_run / "last.pt", weights_only=True)
    change(content)
    del content["digests"]
    content["digests"] = digest_parts(content)
    torch.save(content, path)
    return path


def test_a_network_that_the_file_cannot_hold_is_never_built(smallest_run: Path, tmp_path: Path) -> None:
    """Sixteen stages of 8192 channels would be 600 GB of weights."""

    def change(content: dict[str, Any]) -> None:
        content["config"]["model"] |= {"widths": [8192] * 5, "blocks_per_stage": 64}

    path = signed(smallest_run, tmp_path / "giant.pt", change)
    with pytest.raises(CheckpointError, match=r"fit its configuration: stages\.0\.0\.conv\.weight: expected"):
        load_model(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epoch", "1"), ("epoch", -1), ("epoch", 1.5), ("epoch", True), ("step", None), ("image_size", 0),
        ("image_size", 1 << 30), ("image_size", "32"), ("class_names", [1, 2]), ("class_names", []),
        ("class_names", "abc"), ("class_names", ["a", "a"]), ("seconds", float("nan")), ("seconds", -1.0),
        ("test_accuracy", 1.5), ("test_accuracy", "0.5"), ("best_accuracy", float("nan")), ("test_loss", "low"),  # noqa: E501
        ("normalization", None), ("normalization", {"mean": [0.5, 0.5], "std": [1.0, 1.0, 1.0]}),
        ("normalization", {"mean": [0.5] * 3, "std": [1.0, 1.0, 0.0]}),
        ("normalization", {"mean": [0.5] * 3, "std": [1.0, 1.0, -1.0]}),
        ("normalization", {"mean": [0.5, float("nan"), 0.5], "std": [1.0] * 3}),
        ("normalization", {"mean": [0.5, 0.5, 10**50], "std": [1.0] * 3}),
        ("state_dict", []), ("state_dict", {"a": 1}), ("state_dict", {1: torch.zeros(1)}),
        ("runtime", None), ("machine", []), ("optimizer", [1]), ("config", None), ("config", []),
    ],
)  # fmt: skip
def test_a_part_of_another_type_or_range_is_named(
    smallest_run: Path, tmp_path: Path, key: str, value: object
) -> None:
    path = signed(smallest_run, tmp_path / "changed.pt", lambda content: content.update({key: value}))
    with pytest.raises(
        CheckpointError, match=re.escape(key) if key != "config" else "configuration|incomplete"
    ):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, dtype=torch.float64), torch.zeros(3), torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, device="meta"), torch.eye(2).to_sparse(), torch.nn.Parameter(torch.zeros(2)),
        torch.zeros(1).expand(2),
    ],
    ids=["float64", "shape", "complex", "meta", "sparse", "parameter", "expanded"],
)  # fmt: skip
def test_only_plain_tensors_of_the_right_shape_and_type_become_weights(
    smallest_run: Path, tmp_path: Path, tensor: torch.Tensor
) -> None:
    content = torch.load(smallest_run / "last.pt", weights_only=True)
    content["state_dict"]["stages.0.0.norm.weight"] = tensor
    del content["digests"]
    content["format_version"] = 1  # which has no digests
    torch.save(content, tmp_path / "changed.pt")
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "changed.pt")


def test_names_from_a_checkpoint_cannot_steer_the_terminal(
    bncli: Bncli, smallest_run: Path, tmp_path: Path
) -> None:
    evil = ["\x1b[2J\x1b]0;owned\x07", "[red]x[/red]", "a\nb", "\u202etac", "\udcff", "\x9b31m", *"defg"]
    path = signed(smallest_run, tmp_path / "evil.pt", lambda content: content.update(class_names=evil))
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    for command in (
        ("predict", path, tmp_path / "image.png", "--top", 10),
        ("predict", path, tmp_path / "image.png", "--top", 10, "--json"),
        ("eval", path, "--num-images", 2, "--batch-sizes", "2"),
        ("inspect-stats", path),
        ("doctor", path),
    ):
        outcome = bncli(*command)
        for text in (outcome.out, outcome.err):
            assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text), command
    assert "[red]x[/red]" in bncli("predict", path, tmp_path / "image.png", "--top", 10).out


@pytest.mark.parametrize("command", ["eval", "predict", "doctor"])
def test_a_pipe_in_the_place_of_a_checkpoint_is_not_waited_for(
    bncli: Bncli, tmp_path: Path, command: str
) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    arguments = ["image.png"] if command == "predict" else []
    outcome = bncli(command, tmp_path / "pipe.pt", *arguments)
    assert outcome.code == (1 if command == "doctor" else 2)
    assert "a pipe or a device" in outcome.out + outcome.err
