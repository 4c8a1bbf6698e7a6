"""A reader for the files of `torch.save` that bncli writes itself, in which nothing is ever called.

`torch.load(weights_only=True)` executes no foreign code either, but it trusts numbers: a file of 500 bytes
may have it allocate terabytes (a storage said to be huge, one element expanded to 2^40, `bytearray(2**40)`)
or read behind a record. Here every size is compared with the bytes that are there before anything is
allocated, only the few names that `torch.save` needs for plain tensors have a meaning, and every record's
CRC-32 is checked. What is read is never larger than the file.

Assumes the zip format that torch.save writes since version 1.6, with plain tensors that repeat no value. The
pickle inside is protocol 2: https://github.com/python/cpython/blob/main/Lib/pickletools.py.
"""

import io
import math
import pickle
import pickletools
import stat
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bncli.checkpoints.byte_source import names_in
from bncli.checkpoints.formats.foreign import describe_directory
from bncli.checkpoints.formats.torch_pickle import STORAGE_DTYPES
from bncli.errors import CheckpointError

ZIP_START = b"PK\x03\x04"
MAX_DEPTH = 64
MAX_VALUES = 2_000_000  # a list that holds ten lists that each hold ten ... is a small file, too
# the types that bncli saves; foreign files have more of them
_DTYPES = {
    f"{kind}Storage": STORAGE_DTYPES[f"{kind}Storage"]
    for kind in ["Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"]
}
# what torch.save writes for tensors, texts, numbers and containers; no other instruction is followed
_OPCODES = frozenset({
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE",
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE",
    "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPUT",
    "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD",
    "BINPERSID",
})  # fmt: skip


class _ForeignObjectError(Exception):
    """The pickle names something that is no plain value."""


class _DamageError(Exception):
    """What stands in the file contradicts itself."""


def read_own_zip(path: str | Path) -> Any:
    """What `torch.save` wrote: containers, plain values and contiguous tensors, on the CPU.

    Raises:
        CheckpointError: on anything else; naming the file and why.
    """
    if _first_bytes(Path(path)) != ZIP_START:
        raise CheckpointError(f"{path}: not a checkpoint: no file of torch.save")
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except _ForeignObjectError as error:
        reason = f"it holds Python objects beside tensors ({error}), which bncli does not execute"
        raise CheckpointError(f"{path}: {reason}; save model.state_dict() instead") from None
    except Exception as error:  # zipfile and pickle raise a dozen types on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        message = (
            f"not a checkpoint: a damaged or truncated one ({type(error).__name__.strip('_')}: {reason})"
        )
        raise CheckpointError(f"{path}: {message}") from None


def _first_bytes(path: Path) -> bytes:
    """The first four bytes of a file that may be a checkpoint.

    Raises:
        CheckpointError: it is empty, cannot be read, or is no file (a pipe could be waited for without end).
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: {describe_directory(str(path), names_in(path))}")
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: a pipe or a device, not a checkpoint; copy it into a file")
        with path.open("rb") as file:
            start = file.read(4)
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read: {reason}") from None
    if not start:
        raise CheckpointError(f"{path}: an empty file, not a checkpoint")
    return start


def _read(archive: zipfile.ZipFile) -> Any:
    records = _records(archive)
    if records.get("byteorder", (None, sys.byteorder.encode()))[1] != sys.byteorder.encode():
        raise _DamageError("written on a machine of the other byte order")
    program = records["data.pkl"][1]
    _check_program(program)
    content = _Unpickler(program, records).load()
    _check_extent(content)
    return content


def _records(archive: zipfile.ZipFile) -> dict[str, tuple[zipfile.ZipInfo, bytes]]:
    """Every record by its name below the archive's one folder, with its bytes."""
    infos = archive.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos):
        raise _DamageError("compressed, which torch.save does not do")
    if archive.fp is None:
        raise _DamageError("closed")
    size = archive.fp.seek(0, io.SEEK_END)
    if sum(info.file_size for info in infos) > size:
        raise _DamageError("its records are said to be larger than the file")
    names = [info.filename.partition("/") for info in infos]
    if len({folder for folder, _, _ in names}) != 1 or len({name for _, _, name in names}) != len(names):
        raise _DamageError("not one folder of records with a name each")
    # read() checks the CRC-32
    return {name: (info, archive.read(info)) for info, (_, _, name) in zip(infos, names, strict=True)}


def _check_program(program: bytes) -> None:
    """Refuse instructions that no checkpoint needs, before any is followed."""
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name == "GLOBAL" and _meaning(*str(argument).split(" ", 1)) is None:
            raise _ForeignObjectError(str(argument).replace(" ", "."))
        if opcode.name not in _OPCODES:
            raise _ForeignObjectError(f"pickle's {opcode.name}")
        # the unpickler makes room for as many objects as the largest number says
        if opcode.name in {"LONG_BINPUT", "LONG_BINGET"} and int(argument or 0) > len(program):
            raise _DamageError(f"object number {argument}")


def _meaning(module: str, name: str) -> Any:
    """What a name in the pickle stands for; None where it stands for nothing."""
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    return {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    }.get((module, name))


class _Unpickler(pickle.Unpickler):
    """Follows a checked program; storages are flat tensors over the bytes of their record."""

    def __init__(self, program: bytes, records: dict[str, tuple[zipfile.ZipInfo, bytes]]) -> None:
        super().__init__(io.BytesIO(program))
        self._records = records
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        found = _meaning(module, name)
        if found is None:
            raise _ForeignObjectError(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, num_values = pid  # the fourth is the device it was on
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(num_values) is not int:
            raise _DamageError("a storage is described wrongly")
        found = self._storages.get((key, dtype))
        if found is None:
            data = self._records[f"data/{key}"][1]
            found = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
            self._storages[key, dtype] = found
        if len(found) != num_values:
            raise _DamageError(f"storage {key} is said to hold {num_values} values, but holds {len(found)}")
        return found


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, *_: Any
) -> Tensor:
    """A part of a storage as a tensor; the arguments are those of `torch._utils._rebuild_tensor_v2`."""
    if not isinstance(storage, Tensor) or type(shape) is not tuple or type(stride) is not tuple:
        raise _DamageError("a tensor is described wrongly")
    if not all(type(number) is int and number >= 0 for number in (offset, *shape, *stride)):
        raise _DamageError("a tensor has a negative size")
    num_values = math.prod(shape)
    # strides may repeat one value 2^40 times, so the shape counts; channels_last passes
    if len(shape) != len(stride) or num_values > len(storage):
        raise _DamageError(f"a tensor of shape {shape} does not fit its storage of {len(storage)} values")
    return storage.as_strided(shape, stride, offset)  # refuses what leads outside


def _check_extent(content: Any) -> None:
    """Refuse deep, huge and endless nesting: all that follows may recurse."""
    level, num_values = [content], 0
    for _ in range(MAX_DEPTH):
        num_values += len(level)
        if num_values > MAX_VALUES:
            raise _DamageError(f"more than {MAX_VALUES:,} values")
        below: list[Any] = []
        for node in level:
            if isinstance(node, OrderedDict):
                vars(node).clear()  # attributes could stand in for methods; torch's `_metadata` is not needed
            if isinstance(node, dict):
                below += node.keys()
                below += node.values()
            elif isinstance(node, list | tuple):
                below += node
            if len(below) > MAX_VALUES:
                raise _DamageError(f"more than {MAX_VALUES:,} values")
        if not below:
            return
        level = below
    raise _DamageError(f"nested deeper than {MAX_DEPTH} levels")
