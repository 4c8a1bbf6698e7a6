"""Messages of protobuf that claim more than they hold, in each format that is made of them."""

import resource
import struct
from pathlib import Path

import pytest

from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.formats.protobuf import fields
from tests.checkpoints.formats.damage import read_or_refuse
from tests.checkpoints.formats.test_damaged_keras import BN, HEADER, block, entry, table, varint

HUGE = varint(2**62)
NESTED = b"".join(b"\x0a" + varint(5 * (5000 - level)) for level in range(5000))  # each inside the one before
FILES = {
    "a graph of ONNX": ("a.onnx", b"\x08\x0a\x12\x05torch\x3a" + HUGE),
    "a node of ONNX": ("a.onnx", b"\x08\x0a\x12\x05torch\x3a\x20\x0a" + HUGE + bytes(20)),
    "a parameter of MindSpore": ("a.ckpt", b"\x0a" + HUGE + b"\x0a\x0bmoving_mean\x12\x04"),
    "an entry of TensorFlow": ("a.index", table(block([HEADER, *BN, (0, b"z", b"\x12" + HUGE)]))),
    "its slices": ("a.index", table(block([HEADER, *BN, (0, b"z", entry(8, 2) + b"\x3a" + HUGE)]))),
    "messages in messages in ONNX": ("a.onnx", b"\x08\x0a\x12\x05torch\x3a" + varint(len(NESTED)) + NESTED),
}


@pytest.mark.parametrize("case", FILES)
def test_a_length_beyond_the_file_is_refused_in_little_memory(tmp_path: Path, case: str) -> None:
    name, content = FILES[case]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "a.data-00000-of-00001").write_bytes(struct.pack("<4f", 1, 2, 3, 4))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_or_refuse(tmp_path / name) is not None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 2**10  # KiB


@pytest.mark.parametrize("number", [2**64 - 1, 2**63, 2**31, 3])
def test_no_field_is_longer_than_its_message(number: int) -> None:
    with pytest.raises(UnreadableFileError):
        list(fields(b"\x0a" + varint(number) + b"ab"))


def test_a_number_that_never_ends_is_refused() -> None:
    with pytest.raises(UnreadableFileError):
        list(fields(b"\x08" + b"\xff" * 1000))
