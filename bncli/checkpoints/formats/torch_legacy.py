"""Files of `torch.save` before version 1.6 (`_use_new_zipfile_serialization=False`): pickles, then numbers.

Five pickles: a magic number, the protocol, the machine's type sizes, the content, the keys of the storages.
The storages follow in the order of the keys, each a count of elements (8 bytes) and the numbers.
"""

from collections.abc import Callable

from bncli.checkpoints.byte_source import ByteSource, ForeignFileError, UnreadableFileError
from bncli.checkpoints.formats.foreign import (
    UNKNOWN,
    recognise_file,
    recognise_pickle,
    recognise_signature,
)
from bncli.checkpoints.formats.inert_pickle import Global, Inert, read_pickle
from bncli.checkpoints.formats.torch_pickle import FindStorage, TorchMeanings
from bncli.checkpoints.stored_tensor import Storage

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001


class _NoTensors:
    def call(self, function: Global, arguments: tuple[object, ...]) -> object:
        return Inert(function, arguments)

    def find_persistent(self, _: object) -> object:
        return Inert(None)


def read_torch_legacy(
    source: ByteSource, meanings: Callable[[FindStorage], TorchMeanings] = TorchMeanings
) -> object:
    """What the pickle says, with `StoredTensor` for tensors.

    Raises:
        UnreadableFileError: when it is damaged or no such file.
    """
    plain = _NoTensors()
    storages = _Storages(source)
    with source.stream() as stream:
        try:
            first = read_pickle(stream, plain)
        except UnreadableFileError:
            first = None
        if first != MAGIC_NUMBER:
            raise _other_format(source, first)
        version = read_pickle(stream, plain)
        if version != PROTOCOL_VERSION:
            raise UnreadableFileError("a damaged file, or of an unknown version of torch.save")
        system = read_pickle(stream, plain)
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise UnreadableFileError(
                "it was written on a big-endian machine; load it there and save it again"
            )
        content = read_pickle(stream, meanings(storages.find))
        keys = read_pickle(stream, plain)
        storages.locate(keys, stream.tell())
    return content


def _other_format(source: ByteSource, first: object) -> UnreadableFileError:
    """What a file is that does not begin with the magic number but, maybe, with another pickle."""
    is_pickle = isinstance(first, dict | list | tuple | set | Inert)  # nearly any text has a scalar's opcodes
    known = recognise_signature(source)
    known = known or (recognise_pickle(first, source.name) if is_pickle else recognise_file(source))
    if known:
        return ForeignFileError(known.sentence)
    what = "a pickle, but not of torch.save" if is_pickle else "a file of an unknown kind, or a damaged one"
    return UnreadableFileError(f"{what}; {UNKNOWN}")


class _Storages:
    """Storages that are known by key and size first, and by position once the pickles have been read."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._sizes: dict[str, int] = {}  # bytes
        self._positions: dict[str, int] = {}

    def find(self, key: str, num_elements: int, itemsize: int) -> Storage:
        """The storage of so many elements under a key."""
        size = num_elements * itemsize
        known = self._sizes.setdefault(key, size)
        if known != size:
            raise UnreadableFileError("a damaged file: a storage with two sizes")
        return Storage(
            size,
            lambda start, count: self._read(key, start, count),
            key,
            position=lambda: self._positions[key],
        )

    def locate(self, keys: object, position: int) -> None:
        """Note where the storages lie: in the order of the keys, from `position` on."""
        if not isinstance(keys, list) or not all(type(key) is str for key in keys):
            raise UnreadableFileError("a damaged file: the keys of its storages are missing")
        if set(keys) != set(self._sizes) or len(keys) != len(self._sizes):
            raise UnreadableFileError("a damaged file: its storages are not those of its tensors")
        for key in keys:
            count = int.from_bytes(self._source.read_at(position, 8), "little")
            size = self._sizes[key]
            if count > size or (count and size % count) or (count == 0) != (size == 0):
                raise UnreadableFileError("a damaged file: a storage of another size than its tensors'")
            self._positions[key] = position + 8
            position += 8 + size
        if position > self._source.size:
            raise UnreadableFileError("a damaged or truncated file: it ends before what it claims to hold")

    def _read(self, key: str, start: int, size: int) -> bytes:
        return self._source.read_at(self._positions[key] + start, size)
