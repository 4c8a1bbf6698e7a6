"""The wire format of protocol buffers, as far as a reader of checkpoints needs it: fields by number.

Reference: protobuf.dev, "Encoding". Of a known message the fields are taken by their
numbers; others are passed over.
"""

from collections.abc import Iterable, Iterator

from bncli.checkpoints.byte_source import UnreadableFileError

_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
_DAMAGED = "a damaged file: what should be a protocol buffer is none"


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
    raise UnreadableFileError(_DAMAGED)


def fields(message: bytes | memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The number and the value of each field: an int, or the bytes of text and of messages inside.

    A float lies in an int of the same bits.

    Raises:
        UnreadableFileError: when it is no protocol buffer.
    """
    data, position = memoryview(message), 0
    while position < len(data):
        tag, position = varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, position = varint(data, position)
            yield number, value
            continue
        if wire == _BYTES:
            size, position = varint(data, position)
        elif wire in (_FIXED_64, _FIXED_32):
            size = 8 if wire == _FIXED_64 else 4
        else:
            raise UnreadableFileError(_DAMAGED)
        if position + size > len(data):
            raise UnreadableFileError(_DAMAGED)
        part = data[position : position + size]
        yield number, part if wire == _BYTES else int.from_bytes(part, "little")
        position += size


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
