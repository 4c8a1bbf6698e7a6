"""Files made to run code, or to exhaust memory or time: none of them does."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from bncli.checkpoints import byte_source
from tests.conftest import Bncli

MAX_MEMORY = 2**30  # bytes

# the bombs that take seconds
LARGE = ["endless lists", "endless memo", "nested tuples"]

BatchNorm = nn.BatchNorm2d(4).state_dict()


class Call:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class SetState:
    """Its class would run on loading, if it were found."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["canary"]).touch()


class Keyed(dict):
    """A dict whose class would run whenever an item is set."""

    canary = ""

    def __setitem__(self, key: object, value: object) -> None:
        Path(self.canary).touch()


def payloads(canary: str) -> dict[str, object]:
    touch = f"import pathlib; pathlib.Path({canary!r}).touch()"
    chain = Call(getattr, Call(getattr, Call(__import__, "os"), "path"), "join")
    inner = io.BytesIO()
    torch.save({"x": Call(os.system, f"touch {canary}")}, inner)
    return {
        "os.system": Call(os.system, f"touch {canary}"),
        "os.mkdir": Call(os.mkdir, canary),
        "open": Call(open, canary, "w"),
        "eval": Call(eval, f"open({canary!r}, 'w')"),
        "exec": Call(exec, touch),
        "compile": Call(exec, Call(compile, touch, "x", "exec")),
        "subprocess": Call(subprocess.check_output, ["touch", canary]),
        "getattr chain": Call(Call, chain, canary),
        "__import__": Call(getattr, Call(__import__, "antigravity"), "fly"),
        "__setstate__": SetState(canary),
        "nested pickle": Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {canary}"))),
        "nested torch file": Call(torch.load, io.BytesIO, inner.getvalue()),
        "storage from bytes": Call(torch.storage._load_from_bytes, inner.getvalue()),
        "in a key": {("a", Call(os.system, f"touch {canary}")): 1},
        "in a list": [[[Call(os.system, f"touch {canary}")]]],
    }


def program(canary: str) -> dict[str, bytes]:
    """Pickles written by hand, each leaving one value on the stack: what no pickler would write."""
    system, argument = (
        b"cos\nsystem\n",
        b"X" + struct.pack("<I", len(canary) + 6) + f"touch {canary}".encode(),
    )
    posix = b"\x8c\x02os\x8c\x06system\x93"
    return {
        "INST": b"(" + argument + b"ios\nsystem\n",
        "OBJ": b"(" + system + argument + b"o",
        "NEWOBJ": system + argument + b"\x85\x81",
        "NEWOBJ_EX": system + argument + b"\x85}\x92",
        "STACK_GLOBAL": posix + argument + b"\x85R",
        "BUILD of a module": b"cbuiltins\n__import__\n\x8c\x02os\x85R}\x8c\x01x" + argument + b"sb",
        "persistent id": b"(\x8c\x07storage" + system + argument + b"\x8c\x03cpuK\x01tQ",
        "persistent call": b"(\x8c\x06module" + system + argument + argument + b"tQ",
        "persistent line": b"P" + f"touch {canary}".encode() + b"\n",
        "REDUCE of torch": b"ctorch.hub\nload\n" + argument + b"\x85R",
        "extension": b"\x82\x01",
        "buffer": b"\x97",
    }


def zip_of(pickled: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def legacy_of(pickled: bytes) -> bytes:
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(part, 2) for part in parts) + pickled + pickle.dumps([], 2)


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("name", payloads("x"))
def test_no_code_in_a_pickle_is_executed(bncli: Bncli, tmp_path: Path, name: str, as_zip: bool) -> None:
    canary = tmp_path / "canary"
    hostile = payloads(str(canary))[name]
    path = tmp_path / "hostile.pt"
    torch.save({"payload": hostile, "state_dict": BatchNorm}, path, _use_new_zipfile_serialization=as_zip)
    outcome = bncli("inspect-stats", path, "--json", "--fail-on", "never")
    assert not canary.exists()
    assert "antigravity" not in sys.modules
    # the layers beside the payload are read all the same
    assert (outcome.code, outcome.json["num_layers"]) == (0, 1)


def test_the_payloads_do_run_where_pickles_are_trusted(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name in ("os.system", "exec", "__setstate__", "nested pickle", "subprocess"):
        torch.save({"payload": payloads(str(canary))[name]}, tmp_path / "hostile.pt")
        torch.load(tmp_path / "hostile.pt", weights_only=False)
        assert canary.exists(), name
        canary.unlink()


@pytest.mark.parametrize("wrap", [zip_of, legacy_of])
@pytest.mark.parametrize("name", program("x"))
def test_no_opcode_executes_anything(
    bncli: Bncli, tmp_path: Path, name: str, wrap: Callable[[bytes], bytes]
) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "hostile.pt").write_bytes(wrap(b"\x80\x04" + program(str(canary))[name] + b"."))
    outcome = bncli("inspect-stats", tmp_path / "hostile.pt")
    assert not canary.exists()
    assert outcome.code == 2
    assert "bug in bncli" not in outcome.err


def test_a_subclass_of_dict_is_filled_without_its_own_code(bncli: Bncli, tmp_path: Path) -> None:
    state = Keyed()
    for key, value in BatchNorm.items():
        dict.__setitem__(state, key, value)
    torch.save({"model": state}, tmp_path / "model.pt")
    Keyed.canary = str(tmp_path / "canary")
    assert bncli("inspect-stats", tmp_path / "model.pt", "--json").json["num_layers"] == 1
    assert not (tmp_path / "canary").exists()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(shape: bytes, stride: bytes, numel: bytes = b"K\x04") -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + numel + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + shape + stride + b"\x89}tR"


@cache
def bombs() -> dict[str, bytes]:
    huge = struct.pack("<Q", 2**40)
    wide = b"\x8a\x05" + (2**33).to_bytes(5, "little")
    layer = [b"}(", text("running_mean"), tensor(wide + b"\x85", b"K\x00\x85")]
    layer += [text("running_var"), tensor(wide + b"\x85", b"K\x00\x85"), b"u"]
    module = (
        b"cm\nM\n)\x81q\x00}("
        + text("_modules")
        + b"}("
        + b"".join(text(f"{'x' * 200}{index}") + b"h\x00" for index in range(2000))
        + b"uub"
    )
    lots = b"".join(text(str(i)) + b"cm\nN\n)\x81h\x01b" for i in range(3000))
    shared = b"cm\nM\n)\x81}(" + text("_modules") + b"}q\x01(" + lots + b"uub"
    return {
        "long text": b"\x8d" + huge,
        "long bytes": b"\x8e" + huge,
        "long bytearray": b"\x96" + struct.pack("<Q", 2**63),
        "short text": b"X" + struct.pack("<I", 2**32 - 1),
        "long number": b"\x8b" + struct.pack("<I", 2**31 - 1),
        "digits": b"I" + b"9" * 60_000 + b"\n",
        "float": b"F" + b"9" * 60_000 + b"\n",
        "memo": b"Nr" + struct.pack("<I", 2**32 - 1),
        "negative memo": b"Np-1\n",
        "endless marks": b"(" * 6_000_000,
        "endless lists": b"]" * 6_000_000,
        "endless memo": b"N" + b"\x94" * 6_000_000,
        "nested tuples": b")" + b"\x85" * 3_000_000,
        "nested tuple as a key": b"})" + b"\x85" * 200_000 + b"Ns",
        "nested lists": b"]" + b"]" * 200_000 + b"a" * 200_000,
        "nested dicts": b"}" + b"}" * 100 + b"".join(b"K\x00" for _ in range(100)),
        "nested calls": b"cm\nf\n" + b"(" * 1 + b"tR" + b"\x85cm\nf\n0" * 1000,
        "keys that collide": b"}("
        + b"".join(
            b"\x8a\x0c" + (index * (2**61 - 1)).to_bytes(12, "little") + b"N" for index in range(60_000)
        )
        + b"u",
        "list in itself": b"]q\x00h\x00a",
        "dict in itself": b"}q\x00" + text("state_dict") + b"h\x00s",
        "doubling": b"]q\x00" + b"]q\x01(h\x00h\x00eq\x00" * 100,
        "copied dicts": b"]("
        + (text("a") + b"N\x86") * 100_000
        + b"eq\x00"
        + b"0"
        + (b"ccollections\nOrderedDict\nh\x00\x85R0" * 1000)
        + b"N",
        "a broadcast layer": b"".join(layer),
        "modules in each other": module,
        "modules that share a dict": shared,
        "a huge layer without statistics": b"cm\nBatchNorm2d\n)\x81}("
        + text("_modules")
        + b"}"
        + text("_buffers")
        + b"}"
        + text("num_features")
        + wide
        + text("eps")
        + b"K\x00"
        + text("momentum")
        + b"N"
        + b"ub",
    }


@pytest.mark.parametrize("wrap", [zip_of, legacy_of])
@pytest.mark.parametrize("name", sorted(set(bombs()) - set(LARGE)))
def test_a_bomb_ends_soon_in_one_line(
    bncli: Bncli, tmp_path: Path, name: str, wrap: Callable[..., bytes]
) -> None:
    pickled = b"\x80\x04" + bombs()[name] + b"."
    content = wrap(pickled, {"0": bytes(16)}) if wrap is zip_of else wrap(pickled)
    (tmp_path / "bomb.pt").write_bytes(content)
    start = time.perf_counter()
    outcome = bncli("inspect-stats", tmp_path / "bomb.pt")
    assert time.perf_counter() - start < 30
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "bug in bncli" not in outcome.err


@cache
def zip_bombs() -> dict[str, bytes]:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 40_000_000 + b"N.")
    understated = bytearray(packed.getvalue())
    place = understated.rindex(b"PK\x01\x02")
    understated[place + 24 : place + 28] = struct.pack("<I", 1000)
    encrypted = bytearray(zip_of(b"N."))
    for signature, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        encrypted[encrypted.index(signature) + offset] |= 1
    bzip = io.BytesIO()
    with zipfile.ZipFile(bzip, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("archive/data.pkl", b"N.")
    twice = bytearray(zip_of(b"N.", {"0": bytes(16)}))
    last = twice.rindex(b"PK\x01\x02")
    twice[last + 42 : last + 46] = struct.pack("<I", 2**31)
    nested = zip_of(zip_of(b"N."))
    header = b'{"a":' + b"[" * 100_000
    return {
        "inflating pickle": packed.getvalue(),
        "understated size": bytes(understated),
        "encrypted": bytes(encrypted),
        "other compression": bzip.getvalue(),
        "entry beyond the end": bytes(twice),
        "zip in a zip": nested,
        "safetensors header": struct.pack("<Q", 2**39) + b"{",
        "safetensors nesting": struct.pack("<Q", len(header)) + header,
        "safetensors beyond": safetensors_of({"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}),
        "safetensors negative": safetensors_of({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}),
        "safetensors digits": safetensors_of(
            {"dtype": "F32", "shape": [10**3000] * 20, "data_offsets": [0, 16]}
        ),
        "safetensors backwards": safetensors_of({"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}),
        "safetensors other size": safetensors_of({"dtype": "F32", "shape": [2], "data_offsets": [0, 16]}),
        "safetensors type": safetensors_of({"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}),
        "index of itself": json.dumps({"weight_map": {"a": "bomb.pt"}}).encode(),
    }


def safetensors_of(entry: dict[str, object]) -> bytes:
    header = json.dumps({"bn.running_mean": entry, "bn.running_var": entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


@pytest.mark.parametrize("name", zip_bombs())
def test_a_hostile_container_ends_soon_in_one_line(bncli: Bncli, tmp_path: Path, name: str) -> None:
    (tmp_path / "bomb.pt").write_bytes(zip_bombs()[name])
    outcome = bncli("inspect-stats", tmp_path / "bomb.pt")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "bug in bncli" not in outcome.err
    assert ("is encrypted" in outcome.err) == (name == "encrypted")


@pytest.mark.parametrize(
    "numbers",
    [
        (b"J\xff\xff\xff\xff", b"K\x04\x85", b"K\x01\x85"),
        (b"K\x00", b"J\xfc\xff\xff\xff\x85", b"K\x01\x85"),
        (b"K\x03", b"K\x04\x85", b"J\xff\xff\xff\xff\x85"),
    ],
    ids=["offset", "shape", "stride"],
)
def test_no_offset_shape_or_stride_is_negative(
    bncli: Bncli, tmp_path: Path, numbers: tuple[bytes, bytes, bytes]
) -> None:
    """Each view would lie inside the file: only its sign is wrong."""
    sound, broken = tensor(b"K\x04\x85", b"K\x01\x85"), tensor(*numbers[1:])
    broken = broken.replace(b"tQK\x00", b"tQ" + numbers[0], 1)
    for last, code in ((sound, 0), (broken, 2)):
        entries = text("bn.running_mean") + sound + text("bn.running_var") + sound + text("bn.other") + last
        ones = struct.pack("<4f", 1, 2, 3, 4)
        (tmp_path / "a.pt").write_bytes(zip_of(b"\x80\x02}(" + entries + b"u.", {"0": ones}))
        outcome = bncli("inspect-stats", tmp_path / "a.pt")
        assert outcome.code == code
        assert ("without a proper shape, stride and offset" in outcome.err) == (code == 2)


@pytest.mark.parametrize("mib", [0.5, 4])
def test_many_views_of_the_same_bytes_are_not_compared_for_ever(
    bncli: Bncli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mib: float
) -> None:
    monkeypatch.setattr(byte_source, "MAX_READ_IN_ALL", 2**26)
    shared = torch.zeros(int(mib * 2**18))
    for code, count in ((0, 8), (2, int(64 / mib) + 1)):
        torch.save(used_layer() | {f"view{i}": shared.view(-1) for i in range(count)}, tmp_path / "a.pt")
        outcome = bncli("compare", tmp_path / "a.pt", tmp_path / "a.pt")
        assert outcome.code == code
        assert ("bytes of it would have to be read" in outcome.err) == (code == 2)


def used_layer() -> dict[str, torch.Tensor]:
    return {f"bn.{name}": value for name, value in BatchNorm.items()}


@pytest.mark.slow
def test_bombs_stay_below_a_gibibyte(tmp_path: Path) -> None:
    """In a process of its own, whose peak is not that of other tests.

    `ru_maxrss` would be: a process starts with the peak of the one that it was forked from.
    """
    paths = []
    for name in LARGE:
        paths.append(tmp_path / f"{name}.pt")
        paths[-1].write_bytes(zip_of(b"\x80\x04" + bombs()[name] + b"."))
    paths.append(tmp_path / "inflating.pt")
    paths[-1].write_bytes(zip_bombs()["inflating pickle"])
    code = (
        "import re, sys; from bncli.cli.app import main\n"
        "assert all(main(['inspect-stats', path]) == 2 for path in sys.argv[1:])\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) * 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < MAX_MEMORY


@pytest.mark.parametrize(("length", "code"), [(4, 0), (5, 2)])
def test_a_tensor_reaches_no_byte_beyond_its_storage(
    bncli: Bncli, tmp_path: Path, length: int, code: int
) -> None:
    shape = b"K" + bytes([length]) + b"\x85"
    layer = b"}(" + b"".join(
        text(name) + tensor(shape, b"K\x01\x85") for name in ("running_mean", "running_var")
    )
    content = zip_of(b"\x80\x02" + layer + b"u.", {"0": bytes(16), "1": bytes(16)})
    (tmp_path / "model.pt").write_bytes(content)
    outcome = bncli("inspect-stats", tmp_path / "model.pt", "--json")
    assert outcome.code == code
    assert ("reaches beyond its storage" in outcome.err) == (code == 2)
