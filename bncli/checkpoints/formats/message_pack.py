"""MessagePack, read where it lies: names and small values become objects, runs of bytes stay in the file.

The library `msgpack` would take all of a file into memory to reach the last key. Format:
github.com/msgpack/msgpack/blob/master/spec.md.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from bncli.checkpoints.byte_source import ByteSource, UnreadableFileError

MAX_OBJECTS = 600_000  # of up to 120 bytes; an array takes about 5
MAX_TEXT = 32 * 2**20  # bytes in all
MAX_DEPTH = 60
_PAGE = 2**16
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes in the file: of `code`, the type of an extension, or of none."""

    start: int
    size: int
    code: int | None = None


class MessagePack:
    """Reads one value after another from a part of a file."""

    def __init__(self, source: ByteSource, start: int, end: int) -> None:
        self._source, self.position, self._end = source, start, end
        self._page, self._page_start = b"", 0
        self._num_objects = self._num_characters = 0

    def read(self, depth: int = 0) -> object:
        """The next value; maps are dicts, lists are lists, runs of bytes and extensions are `Run`.

        Raises:
            UnreadableFileError: on damage, and on what exceeds the limits.
        """
        self._num_objects += 1
        if self._num_objects > MAX_OBJECTS or depth > MAX_DEPTH:
            raise UnreadableFileError("a MessagePack file of too many values, or nested too deeply")
        code = self._take(1)[0]
        if code < 0x80:
            return code
        if code >= 0xE0:
            return code - 0x100
        if code < 0x90:
            return self._map(code & 0x0F, depth)
        if code < 0xA0:
            return self._list(code & 0x0F, depth)
        if code < 0xC0:
            return self._text(code & 0x1F)
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            form = _NUMBERS[code]
            return struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return self._long(code, depth)

    def _long(self, code: int, depth: int) -> object:
        """What begins with a length."""
        if 0xD4 <= code <= 0xD8:
            return self._extension(1 << (code - 0xD4))
        for first, sizes, make in (
            (0xC4, (1, 2, 4), self._run),
            (0xC7, (1, 2, 4), self._extension),
            (0xD9, (1, 2, 4), self._text),
            (0xDC, (2, 4), lambda count: self._list(count, depth)),
            (0xDE, (2, 4), lambda count: self._map(count, depth)),
        ):
            chosen: Callable[[int], object] = make
            if first <= code < first + len(sizes):
                return chosen(int.from_bytes(self._take(sizes[code - first]), "big"))
        raise UnreadableFileError("a damaged MessagePack file")

    def _map(self, count: int, depth: int) -> dict[str | int, object]:
        found: dict[str | int, object] = {}
        for _ in range(self._possible(2 * count) // 2):
            key = self.read(depth + 1)
            if not isinstance(key, str | int):
                raise UnreadableFileError("a damaged MessagePack file: a key that is no text")
            found[key] = self.read(depth + 1)
        return found

    def _list(self, count: int, depth: int) -> list[object]:
        return [self.read(depth + 1) for _ in range(self._possible(count))]

    def _possible(self, count: int) -> int:
        """The number of values that follow, each of which takes a byte."""
        if count > self._end - self.position:
            raise UnreadableFileError("a damaged or truncated MessagePack file")
        return count

    def _text(self, size: int) -> str:
        self._num_characters += size
        if self._num_characters > MAX_TEXT:
            raise UnreadableFileError(f"a MessagePack file with more than {MAX_TEXT:,} characters of text")
        try:
            return self._take(size).decode()
        except UnicodeDecodeError:
            raise UnreadableFileError("a damaged MessagePack file: text that is none") from None

    def _extension(self, size: int) -> Run:
        return self._run(size, self._take(1)[0])

    def _run(self, size: int, code: int | None = None) -> Run:
        start = self.position
        if size > self._end - start:
            raise UnreadableFileError("a damaged or truncated MessagePack file")
        self.position += size
        return Run(start, size, code)

    def _take(self, size: int) -> bytes:
        """The next bytes; what is near one another in the file is read at once."""
        start = self.position
        if size > self._end - start:
            raise UnreadableFileError("a damaged or truncated MessagePack file")
        self.position += size
        offset = start - self._page_start
        if not 0 <= offset <= len(self._page) - size:
            self._page = self._source.read_at(start, min(max(_PAGE, size), self._end - start))
            self._page_start, offset = start, 0
        return self._page[offset : offset + size]
