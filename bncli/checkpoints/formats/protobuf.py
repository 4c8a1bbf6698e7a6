"""The wire format of protocol buffers, as far as a reader of checkpoints needs it: fields by number.

Of a known message the fields are taken by their numbers; others are passed over. `fields` reads a message in
memory. `Wire` reads one by position: nothing is copied that is not asked for, so that a message of gigabytes
costs what its small fields cost. What a file claims is bounded: a field ends within its message, and there
are only so many fields. Reference: protobuf.dev, "Encoding".
"""

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bncli.checkpoints.byte_source import ByteSource, UnreadableFileError

MAX_FIELDS = 4_000_000  # of one file, all messages together: some seconds
MAX_TEXT = 2**16  # bytes of one name
WINDOW = 2**13  # bytes that are read at once where only small fields are asked for
VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5  # kinds of fields
_HEAD = 20  # bytes: two numbers of ten


class NoMessageError(UnreadableFileError):
    """What stands there is no message of a protocol buffer."""

    def __init__(self) -> None:
        super().__init__("a damaged or truncated file: no sound protocol buffer")


def varint(data: bytes | memoryview, position: int) -> tuple[int, int]:
    """The number that begins at `position`, and where it ends.

    Raises:
        UnreadableFileError: when it does not end.
    """
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise NoMessageError


def _head(data: bytes | memoryview, position: int) -> tuple[int, int, int, int]:
    """Of the field that begins at `position`: its number, kind, value, and where that ends.

    The value of bytes is their length, and they begin where it ends.

    Raises:
        UnreadableFileError: when no field begins there.
    """
    tag, position = varint(data, position)
    number, kind = tag >> 3, tag & 7
    if kind in (VARINT, BYTES):
        value, position = varint(data, position)
    elif kind in (FIXED_64, FIXED_32):
        width = 8 if kind == FIXED_64 else 4
        value = int.from_bytes(data[position : position + width], "little")
        position += width
    else:
        raise NoMessageError
    if number == 0:
        raise NoMessageError
    return number, kind, value, position


# ---- in memory


def fields(message: bytes | memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The number and the value of each field: an int, or the bytes of text and of messages inside.

    A float lies in an int of the same bits.

    Raises:
        UnreadableFileError: when it is no protocol buffer.
    """
    data, position = memoryview(message), 0
    while position < len(data):
        number, kind, value, position = _head(data, position)
        end = position + (value if kind == BYTES else 0)
        if end > len(data):
            raise NoMessageError
        yield number, data[position:end] if kind == BYTES else value
        position = end


def inside(messages: Iterable[bytes | memoryview], *path: int) -> Iterator[bytes | memoryview]:
    """The messages inside messages, by the number of the field on each level.

    Raises:
        UnreadableFileError: when one is no protocol buffer.
    """
    if not path:
        yield from messages
        return
    for message in messages:
        below = (part for number, part in fields(message) if number == path[0] and not isinstance(part, int))
        yield from inside(below, *path[1:])


def text(value: int | memoryview) -> str:
    """A field's bytes as text."""
    return "" if isinstance(value, int) else bytes(value).decode("utf-8", "replace")


# ---- by position


class Field(NamedTuple):
    """One field: of a number its value; of bytes, a text or a message, where they begin and end."""

    number: int
    kind: int
    start: int  # or the value of a VARINT, and the bits of a fixed one
    end: int

    @property
    def value(self) -> int:
        """The value of a number, unsigned."""
        return self.start

    @property
    def as_float(self) -> float:
        """The value of a 32-bit one as the float that it is."""
        return float(struct.unpack("<f", struct.pack("<I", self.start & 0xFFFFFFFF))[0])

    @property
    def size(self) -> int:
        """How many bytes."""
        return self.end - self.start


class Wire:
    """The messages of one file."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self._fields_left = MAX_FIELDS
        self._window, self._place = b"", 0

    def fields(self, start: int = 0, end: int | None = None) -> Iterator[Field]:
        """The fields of the message between two positions, in the file's order.

        Raises:
            UnreadableFileError: where none stands there, or the file has more fields than any sound one.
        """
        position, end = start, self.source.size if end is None else end
        while position < end:
            self._fields_left -= 1
            if self._fields_left < 0:
                raise UnreadableFileError(f"a file of more than {MAX_FIELDS:,} fields")
            head = self._near(position, min(_HEAD, end - position))
            number, kind, value, size = _head(head, 0)
            position += size
            place = (value, value)
            if kind == BYTES:
                place = (position, position + value)
                position += value
            if position > end:
                raise NoMessageError
            yield Field(number, kind, *place)

    def bytes_of(self, field: Field, limit: int = MAX_TEXT) -> bytes:
        """What a field of bytes holds.

        Raises:
            UnreadableFileError: when it is a number, or longer than `limit`.
        """
        if field.kind != BYTES:
            raise NoMessageError
        if field.size > limit:
            raise UnreadableFileError(f"a damaged file: a text of {field.size:,} bytes")
        return self._near(field.start, field.size)

    def text(self, field: Field) -> str:
        """The text of a field; what is no UTF-8 in it is replaced."""
        return self.bytes_of(field).decode("utf-8", "replace")

    def inside(self, field: Field) -> Iterator[Field]:
        """The fields of the message that a field is."""
        if field.kind != BYTES:
            raise NoMessageError
        return self.fields(field.start, field.end)

    def numbers(self, field: Field, most: int) -> list[int]:
        """The numbers of a repeated field, packed or one by one; signed, as int64 is.

        Raises:
            UnreadableFileError: when they are more than `most`.
        """
        if field.kind == VARINT:
            return [_signed(field.value)]
        data, position, found = self.bytes_of(field, most * 10), 0, []
        while position < len(data):
            value, position = varint(data, position)
            found.append(_signed(value))
        if len(found) > most:
            raise UnreadableFileError(f"a damaged file: more than {most} dimensions")
        return found

    def _near(self, position: int, size: int) -> bytes:
        """A few bytes; those behind them are read with them, because they are asked for next."""
        start = position - self._place
        if not 0 <= start <= len(self._window) - size:
            self._window = self.source.read_at(position, max(size, min(WINDOW, self.source.size - position)))
            self._place, start = position, 0
        return self._window[start : start + size]


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value
