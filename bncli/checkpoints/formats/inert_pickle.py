"""A pickle read as data: no class is looked up, nothing is imported, nothing is called.

Pickle is a little stack machine whose programs may call any function. This one has the stack and the memo,
but every function and class stays a name (`Global`), every call of one and every object is a record of what
was asked for (`Inert`). The few calls that checkpoints consist of (tensors, ordered dicts) are the caller's,
in `PickleMeanings`. Python's `Lib/pickletools.py` describes the opcodes.

What a hostile pickle could exhaust is limited: operations (and with them objects, memo and time), text, and
the digits of a number. Bytes are skipped, since no tensor of a checkpoint lies in them.
"""

import io
import struct
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol

from bncli.checkpoints.byte_source import UnreadableFileError

# A tensor takes about 30 operations: 4 million are some 130,000 tensors. An operation keeps at most about
# 140 bytes (an entry of the memo), which bounds memory to 560 MB.
MAX_OPERATIONS = 4_000_000
MAX_TEXT = 32 * 2**20  # characters in all
MAX_TEXT_OF_PYTHON_2 = 2**12  # bytes: what is longer are the numbers of an array, as bytes are since
MAX_LINE = 2**16
MAX_LONG = 1024  # bytes of a whole number
MAX_WALKED = 100_000  # objects


_PLAIN = (str, int, float, tuple, type(None))


class Global(NamedTuple):
    """The name of a class or function that the pickle refers to."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """As it stands in an import."""
        return f"{self.module}.{self.name}"


BYTES = Global("builtins", "bytes")  # the kind of bytes; their arguments are size and place in the stream


class Inert:
    """An object that was not made: its class, the arguments, what it would have been filled with."""

    __slots__ = ("arguments", "items", "kind", "state")

    def __init__(self, kind: Global | None, arguments: object = ()) -> None:
        self.kind = kind  # None where the pickle calls something that is no name
        self.arguments = arguments
        self.state: object = None  # as `__setstate__` would have got it
        self.items: dict[str | int, object] | None = None  # of subclasses of dict

    @property
    def attributes(self) -> dict[str, object]:
        """The object's `__dict__`, as far as the pickle tells."""
        state = self.state
        if type(state) is tuple and len(state) == 2:  # (__dict__, __slots__)
            state = state[0]
        return state if isinstance(state, dict) else {}


class OddKey(str):
    """The text that stands for a key of a dict that is no text and no small number, and that key."""

    __slots__ = ("value",)
    value: object


class PickleMeanings(Protocol):
    """What calls and persistent ids mean; both only make values, or give `Inert`."""

    def call(self, function: Global, arguments: tuple[object, ...]) -> object:
        """The value of `function(*arguments)`."""

    def find_persistent(self, key: object) -> object:
        """The value of a persistent id."""


class Machine:
    """Stack, marks and memo of one pickle, and what comes next in its stream."""

    def __init__(self, stream: io.BufferedReader | io.BytesIO, meanings: PickleMeanings) -> None:
        self.stream = stream
        self.meanings = meanings
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.num_characters = 0
        self.num_odd_keys = 0

    def take(self, size: int) -> bytes:
        """The next `size` bytes; `size` is checked by the caller or fixed."""
        data = self.stream.read(size)
        if len(data) != size:
            raise UnreadableFileError("a damaged or truncated pickle")
        return data

    def take_line(self) -> bytes:
        """The next line without its end."""
        line = self.stream.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            raise UnreadableFileError("a damaged pickle: a line without an end")
        return line[:-1]

    def take_length(self, num_bytes: int) -> int:
        """The next number of so many bytes, unsigned."""
        return int.from_bytes(self.take(num_bytes), "little")

    def text(self, size: int, encoding: str = "utf-8") -> str:
        """The next `size` bytes as text."""
        self.num_characters += size
        if self.num_characters > MAX_TEXT:
            raise UnreadableFileError(f"a pickle with more than {MAX_TEXT:,} characters of text")
        # pickles hold lone surrogates, which strict UTF-8 does not allow
        return self.take(size).decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")

    def line_of_text(self, encoding: str = "utf-8") -> str:
        """The next line as text."""
        line = self.take_line()
        self.num_characters += len(line)
        if self.num_characters > MAX_TEXT:
            raise UnreadableFileError(f"a pickle with more than {MAX_TEXT:,} characters of text")
        return line.decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")

    def pop_to_mark(self) -> list[Any]:
        """What lies above the topmost mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def remember(self, index: int) -> None:
        """Put the top of the stack into the memo."""
        if not 0 <= index < MAX_OPERATIONS:
            raise UnreadableFileError(f"a damaged pickle: object number {index} is out of bounds")
        self.memo[index] = self.stack[-1]

    def key(self, value: object) -> str | int:
        """Text and small numbers as they are, text for any other key.

        Hashing what a stranger chose can take for ever, or overflow the C stack.
        """
        if type(value) is str or (type(value) is int and -(2**31) <= value < 2**31):
            return value
        if type(value) is int and -(2**63) <= value < 2**63:
            return str(value)
        self.num_odd_keys += 1
        key = OddKey(f"<{type(value).__name__} {self.num_odd_keys}>")
        key.value = value
        return key

    def set_items(self, target: object, items: list[Any]) -> None:
        """Put keys and values, in turns, into a dict or an object."""
        if isinstance(target, Inert):
            target.items = target.items if target.items is not None else {}
            target = target.items
        if isinstance(target, dict):
            for position in range(0, len(items) - 1, 2):
                target[self.key(items[position])] = items[position + 1]
        elif isinstance(target, _PLAIN) and not isinstance(target, Global):
            raise TypeError  # a sound pickle gives items to objects only

    def extend(self, target: object, items: list[Any]) -> None:
        """Append to a list; other objects keep nothing."""
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, _PLAIN) and not isinstance(target, Global):
            raise TypeError

    def call(self, function: object, arguments: object) -> object:
        """What a call means: nothing but a record, unless checkpoints consist of it."""
        if not isinstance(function, Global) or type(arguments) is not tuple:
            return Inert(None, arguments)
        return self.meanings.call(function, arguments)

    def build(self, state: object) -> None:
        """Give the object on top its state."""
        if isinstance(self.stack[-1], Inert):  # on a dict or a tensor: attributes that nothing shows
            self.stack[-1].state = state


def walk(content: object) -> Iterator[object]:
    """Everything in what a pickle said, in its order, each object once, as far as `MAX_WALKED` steps lead."""
    waiting = [content]
    seen: set[int] = set()
    while waiting and len(seen) < MAX_WALKED:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        waiting += reversed(list(islice(parts_of(node), MAX_WALKED)))


def parts_of(node: object) -> Iterable[object]:
    """What a container or an object of a pickle holds; nothing for all else."""
    if isinstance(node, Inert):
        return (node.kind, node.arguments, node.state, node.items)
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list | tuple) and not isinstance(node, Global) else ()


MAX_PROTOCOL = 5


def read_pickle(stream: io.BufferedReader | io.BytesIO, meanings: PickleMeanings) -> Any:
    """The next pickle of a stream, which afterwards stands behind it.

    Dicts, ordered dicts and lists, tuples, text and numbers are themselves; sets are lists; the keys of
    dicts are text or numbers below 2^31, others being replaced by a text that stands for them (`OddKey`);
    bytes are `Inert`.

    Raises:
        UnreadableFileError: on a damaged pickle, and on one that exceeds the limits.
    """
    try:
        return _run(Machine(stream, meanings))
    except (IndexError, KeyError, TypeError, ValueError, struct.error, OverflowError) as error:
        raise UnreadableFileError(f"a damaged pickle ({type(error).__name__})") from None


def _run(machine: Machine) -> Any:
    read, stack, memo = machine.stream.read, machine.stack, machine.memo
    operations, number = _OPERATIONS, int.from_bytes
    for _ in range(MAX_OPERATIONS):
        code = read(1)
        operation = operations.get(code)
        if operation is not None:
            operation(machine, code)
        # two thirds of a checkpoint's operations are these; they stand here for speed. Where the file ends in
        # one of them the next code is missing
        elif code == b"h":
            stack.append(memo[read(1)[0]])
        elif code == b"j":
            stack.append(memo[number(read(4), "little")])
        elif code == b"q":
            memo[read(1)[0]] = stack[-1]
        elif code == b"r":
            machine.remember(number(read(4), "little"))
        elif code == b".":
            return stack.pop()
        else:
            raise UnreadableFileError("a damaged or truncated pickle, or one with a foreign opcode")
    raise UnreadableFileError(
        f"a pickle of more than {MAX_OPERATIONS:,} operations, which bncli does not read"
    )


_Operation = Callable[[Machine, bytes], None]
_OPERATIONS: dict[bytes, _Operation] = {}


def _operation(*codes: bytes) -> Callable[[_Operation], _Operation]:
    def register(function: _Operation) -> _Operation:
        _OPERATIONS.update(dict.fromkeys(codes, function))
        return function

    return register


_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}
_NUMBERS = {
    code: struct.Struct(form) for code, form in ((b"K", "<B"), (b"M", "<H"), (b"J", "<i"), (b"G", ">d"))
}
_TEXT = {b"X": 4, b"\x8c": 1, b"\x8d": 8}  # opcode: bytes of its length
_TEXT_OF_PYTHON_2 = {b"U": 1, b"T": 4}
_BYTES = {b"C": 1, b"B": 4, b"\x8e": 8, b"\x96": 8}
_LONGS = {b"\x8a": 1, b"\x8b": 4}


@_operation(*_CONSTANTS)
def _constant(machine: Machine, code: bytes) -> None:
    machine.stack.append(_CONSTANTS[code])


@_operation(*_NUMBERS)
def _number(machine: Machine, code: bytes) -> None:
    form = _NUMBERS[code]
    machine.stack.append(form.unpack(machine.take(form.size))[0])


@_operation(*_TEXT)
def _text(machine: Machine, code: bytes) -> None:
    machine.stack.append(machine.text(machine.take_length(_TEXT[code])))


@_operation(*_TEXT_OF_PYTHON_2)
def _text_of_python_2(machine: Machine, code: bytes) -> None:
    size = machine.take_length(_TEXT_OF_PYTHON_2[code])
    if size > MAX_TEXT_OF_PYTHON_2:
        _skip(machine, size)
    else:
        machine.stack.append(machine.text(size, "latin-1"))


@_operation(*_BYTES)
def _bytes(machine: Machine, code: bytes) -> None:
    _skip(machine, machine.take_length(_BYTES[code]))


def _skip(machine: Machine, size: int) -> None:
    """Pass over bytes; what is on the stack then tells where they lie."""
    if size >= 2**62:
        raise UnreadableFileError("a damaged pickle: bytes without bounds")
    start = machine.stream.tell()
    if size:  # the last byte is read, so that the end of the file is noticed
        machine.stream.seek(size - 1, io.SEEK_CUR)
        machine.take(1)
    machine.stack.append(Inert(BYTES, (size, start)))


@_operation(*_LONGS)
def _long(machine: Machine, code: bytes) -> None:
    size = machine.take_length(_LONGS[code])
    if size > MAX_LONG:
        raise UnreadableFileError(f"a pickle with a whole number of {size:,} bytes")
    machine.stack.append(int.from_bytes(machine.take(size), "little", signed=True))


@_operation(b"I", b"L", b"F")
def _number_in_digits(machine: Machine, code: bytes) -> None:
    line = machine.take_line()
    if len(line) > MAX_LONG:
        raise UnreadableFileError(f"a pickle with a number of {len(line):,} digits")
    if code == b"I" and line in (b"00", b"01"):
        machine.stack.append(line == b"01")
    else:
        machine.stack.append(float(line) if code == b"F" else int(line.removesuffix(b"L")))


@_operation(b"S", b"V")
def _line_of_text(machine: Machine, code: bytes) -> None:
    text = machine.line_of_text("latin-1")
    # escapes are left as they are: no name of a tensor has any
    machine.stack.append(text[1:-1] if code == b"S" else text)


@_operation(b"]", b"}", b"\x8f")
def _empty(machine: Machine, code: bytes) -> None:
    machine.stack.append({} if code == b"}" else [])


@_operation(b"(")
def _mark(machine: Machine, _: bytes) -> None:
    machine.marks.append(len(machine.stack))


@_operation(b"t", b"l", b"d", b"\x91")
def _collect(machine: Machine, code: bytes) -> None:
    items = machine.pop_to_mark()
    if code == b"d":
        content: dict[str | int, object] = {}
        machine.set_items(content, items)
        machine.stack.append(content)
    else:
        machine.stack.append(tuple(items) if code == b"t" else items)


@_operation(b"\x85", b"\x86", b"\x87")
def _short_tuple(machine: Machine, code: bytes) -> None:
    size = code[0] - 0x84
    if len(machine.stack) < size:
        raise IndexError
    items = tuple(machine.stack[-size:])
    del machine.stack[-size:]
    machine.stack.append(items)


@_operation(b"a", b"e", b"\x90")
def _append(machine: Machine, code: bytes) -> None:
    items = [machine.stack.pop()] if code == b"a" else machine.pop_to_mark()
    machine.extend(machine.stack[-1], items)


@_operation(b"s", b"u")
def _set(machine: Machine, code: bytes) -> None:
    items = [machine.stack.pop(-2), machine.stack.pop()] if code == b"s" else machine.pop_to_mark()
    machine.set_items(machine.stack[-1], items)


@_operation(b"0", b"1", b"2")
def _shuffle(machine: Machine, code: bytes) -> None:
    if code == b"0":
        machine.stack.pop()
    elif code == b"1":
        machine.pop_to_mark()
    else:
        machine.stack.append(machine.stack[-1])


@_operation(b"g", b"p", b"\x94")
def _use_memo(machine: Machine, code: bytes) -> None:
    if code == b"\x94":
        machine.remember(len(machine.memo))
        return
    index = int(machine.take_line()[:20])
    if code == b"p":
        machine.remember(index)
    else:
        machine.stack.append(machine.memo[index])


@_operation(b"c", b"i", b"\x93")
def _name(machine: Machine, code: bytes) -> None:
    if code == b"\x93":
        name, module = machine.stack.pop(), machine.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError
        machine.stack.append(Global(module, name))
        return
    known = Global(machine.line_of_text(), machine.line_of_text())
    machine.stack.append(machine.call(known, tuple(machine.pop_to_mark())) if code == b"i" else known)


@_operation(b"R", b"\x81", b"\x92", b"o")
def _call(machine: Machine, code: bytes) -> None:
    if code == b"o":
        function, *arguments = machine.pop_to_mark()
        machine.stack.append(machine.call(function, tuple(arguments)))
        return
    if code == b"\x92":
        machine.stack.pop()  # keyword arguments
    arguments = machine.stack.pop()
    machine.stack.append(machine.call(machine.stack.pop(), arguments))


@_operation(b"b")
def _build(machine: Machine, _: bytes) -> None:
    machine.build(machine.stack.pop())


@_operation(b"P", b"Q")
def _persistent(machine: Machine, code: bytes) -> None:
    key = machine.line_of_text() if code == b"P" else machine.stack.pop()
    machine.stack.append(machine.meanings.find_persistent(key))


@_operation(b"\x80", b"\x95")
def _header(machine: Machine, code: bytes) -> None:
    if code == b"\x95":
        machine.take(8)  # the length of a frame, which only helps buffering
    elif machine.take(1)[0] > MAX_PROTOCOL:
        raise UnreadableFileError("a pickle of an unknown protocol")
