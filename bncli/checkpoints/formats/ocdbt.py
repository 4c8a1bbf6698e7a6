"""TensorStore's OCDBT: many small values in few files, by a B+tree. Orbax keeps the chunks of arrays there.

`manifest.ocdbt` names the root of the latest version; nodes and larger values lie in data files beside it.
TensorStore itself is a library of 60 MB that follows any path; this reads values by key and does no more.
Reference: tensorstore/kvstore/ocdbt/index.rst, "Storage format".
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.folder import Folder
from bncli.checkpoints.formats.crc32c import crc32c
from bncli.checkpoints.formats.zstandard_frame import decompress

MANIFEST = "manifest.ocdbt"
_MANIFEST_MAGIC, _NODE_MAGIC = 0x0CDB3A2A, 0x0CDB20DE
MAX_NODE = 16 * 2**20  # bytes, compressed or not
MAX_DECODED = 2**26  # bytes of all nodes: 60,000 arrays have room
MAX_ENTRIES = 1_000_000  # of all nodes: keys, children and files
MAX_KEY = 4096  # bytes
MAX_KEYS_LENGTH = 2**26  # bytes of all keys: a node says only in what a key differs from the one before
MAX_HEIGHT = 32


class Place(NamedTuple):
    """Where a value lies: in a data file."""

    file: str
    offset: int
    size: int


class _Node(NamedTuple):
    place: Place
    base: bytes  # of the paths in it
    prefix: bytes  # of the keys in it
    height: int


@dataclass
class _Tree:
    """What is collected on the way from the root to the leaves, and how much is left to be read."""

    folder: Folder
    root: str  # directory with a slash, or ''
    values: dict[str, bytes | Place] = field(default_factory=dict)
    decoded_left: int = MAX_DECODED
    entries_left: int = MAX_ENTRIES
    keys_left: int = MAX_KEYS_LENGTH

    def read_node(self, place: Place, magic: int) -> "_Fields":
        """A node or a manifest, its checksum checked, decompressed."""
        if not 14 <= place.size <= MAX_NODE:
            raise UnreadableFileError("a damaged checkpoint: a node of its tree of an impossible size")
        data = self.folder.read_at(place.file, place.offset, place.size)
        return self.decode(data, magic)

    def decode(self, data: bytes, magic: int) -> "_Fields":
        body, checksum = data[:-4], int.from_bytes(data[-4:], "little")
        is_whole = len(data) > 18 and int.from_bytes(data[4:12], "little") == len(data)
        if not is_whole or int.from_bytes(data[:4], "big") != magic or crc32c(body) != checksum:
            raise UnreadableFileError("a damaged or truncated checkpoint: its tree of values is broken")
        head = _Fields(body[12:], self)
        version, compression = head.number(), head.number()
        if version != 0 or compression > 1:
            raise UnreadableFileError("a checkpoint of an unknown version of OCDBT")
        content = head.rest()
        if compression:
            content = decompress(content, min(MAX_NODE, self.decoded_left))
        self.decoded_left -= len(content)
        return _Fields(content, self)


class _Fields:
    """The fields of a node, one after another."""

    def __init__(self, data: bytes, tree: _Tree) -> None:
        self._data, self._position, self._tree = data, 0, tree

    def take(self, size: int) -> bytes:
        """The next bytes."""
        start = self._position
        if size > len(self._data) - start:
            raise UnreadableFileError("a damaged checkpoint: a node of its tree ends too early")
        self._position += size
        return self._data[start : start + size]

    def rest(self) -> bytes:
        """All that follows."""
        return self._data[self._position :]

    def number(self) -> int:
        """The next number: seven bits a byte, the lowest first."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise UnreadableFileError("a damaged checkpoint: a number without an end")

    def numbers(self, count: int) -> list[int]:
        """So many numbers."""
        return [self.number() for _ in range(count)]

    def count(self) -> int:
        """A number of entries, of which all nodes together may have only so many."""
        count = self.number()
        self._tree.entries_left -= count
        if self._tree.entries_left < 0 or count > len(self._data):
            raise UnreadableFileError("a damaged checkpoint: a tree with too many values")
        return count

    def texts(self, count: int, between: Callable[[], None]) -> list[bytes]:
        """So many texts, each given by how much of the one before it begins with, and what follows.

        `between` reads what stands between the lengths and the characters.
        """
        shared = [0, *self.numbers(count - 1)] if count else []
        lengths = self.numbers(count)
        between()
        texts, last = [], b""
        for same, length in zip(shared, lengths, strict=True):
            self._tree.keys_left -= same + length
            if same > len(last) or same + length > MAX_KEY or self._tree.keys_left < 0:
                raise UnreadableFileError("a damaged checkpoint: names that are far too long")
            last = last[:same] + self.take(length)
            texts.append(last)
        return texts

    def files(self, base: bytes) -> list[tuple[str, bytes]]:
        """The table of data files: each with the directory that the files named in it are relative to."""
        count = self.count()
        lengths: list[int] = []
        paths = self.texts(count, lambda: lengths.extend(self.numbers(count)))
        return [
            (_text(base + path), base + path[:length]) for path, length in zip(paths, lengths, strict=True)
        ]


def read_ocdbt(folder: Folder, directory: str) -> dict[str, bytes | Place]:
    """All keys of the latest version with their values, or where those lie; `directory` ends with a slash.

    Raises:
        UnreadableFileError: on damage.
    """
    tree = _Tree(folder, directory)
    manifest = tree.decode(folder.read(directory + MANIFEST, MAX_NODE), _MANIFEST_MAGIC)
    root = _latest(manifest, tree)
    waiting = [] if root is None else [root]
    while waiting:
        node = waiting.pop()
        waiting += _read_node(tree, node)
    return tree.values


def _latest(manifest: _Fields, tree: _Tree) -> _Node | None:
    """The root of the latest version; None of an empty one."""
    manifest.take(16)  # a random number that is its own
    if manifest.number() != 0:
        raise UnreadableFileError(
            "a checkpoint whose versions lie in numbered files, which bncli does not read"
        )
    manifest.numbers(2)  # limits for inline values and for nodes
    manifest.take(1)
    if manifest.number() == 1:
        manifest.take(4)  # the level of the compression
    files = manifest.files(b"")
    count = manifest.count()
    generations = manifest.numbers(count)
    heights = manifest.take(count)
    ids, offsets, sizes = (manifest.numbers(count) for _ in range(3))
    if not count:
        return None
    newest = max(range(count), key=generations.__getitem__)
    if sizes[newest] == 0 or heights[newest] > MAX_HEIGHT:
        return None
    return _node(tree, files, ids[newest], offsets[newest], sizes[newest], b"", heights[newest])


def _node(
    tree: _Tree,
    files: list[tuple[str, bytes]],
    number: int,
    offset: int,
    size: int,
    prefix: bytes,
    height: int,
) -> _Node:
    if number >= len(files):
        raise UnreadableFileError("a damaged checkpoint: a value in a file that is not named")
    path, base = files[number]
    return _Node(Place(tree.root + path, offset, size), base, prefix, height)


def _read_node(tree: _Tree, node: _Node) -> list[_Node]:
    """Note the values of a leaf; the children of any other node."""
    fields = tree.read_node(node.place, _NODE_MAGIC)
    if fields.take(1)[0] != node.height:
        raise UnreadableFileError("a damaged checkpoint: a node of its tree at another height")
    files = fields.files(node.base)
    count = fields.count()
    if node.height == 0:
        _read_leaf(tree, node, fields, files, count)
        return []
    common: list[int] = []
    keys = fields.texts(count, lambda: common.extend(fields.numbers(count)))
    ids, offsets, sizes = (fields.numbers(count) for _ in range(3))
    return [
        _node(tree, files, number, offset, size, node.prefix + key[:length], node.height - 1)
        for key, length, number, offset, size in zip(keys, common, ids, offsets, sizes, strict=True)
    ]


def _read_leaf(tree: _Tree, node: _Node, fields: _Fields, files: list[tuple[str, bytes]], count: int) -> None:
    keys = fields.texts(count, lambda: None)
    sizes, kinds = fields.numbers(count), fields.numbers(count)
    elsewhere = [index for index, kind in enumerate(kinds) if kind]
    ids, offsets = fields.numbers(len(elsewhere)), fields.numbers(len(elsewhere))
    for index, number, offset in zip(elsewhere, ids, offsets, strict=True):
        place = _node(tree, files, number, offset, sizes[index], b"", 0).place
        tree.values[_text(node.prefix + keys[index])] = place
    for index, kind in enumerate(kinds):
        if not kind:
            tree.values[_text(node.prefix + keys[index])] = fields.take(sizes[index])


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")
