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
from collections.abc import Callable
from typing import Any

from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.formats.pickle_machine import (
    MAX_LONG,
    MAX_OPERATIONS,
    Global,
    Inert,
    Machine,
    PickleMeanings,
)

MAX_PROTOCOL = 5


def read_pickle(stream: io.BufferedReader | io.BytesIO, meanings: PickleMeanings) -> Any:
    """The next pickle of a stream, which afterwards stands behind it.

    Dicts, ordered dicts and lists, tuples, text and numbers are themselves; sets are lists; the keys of
    dicts are text or numbers below 2^31, others being replaced by a text that stands for them; bytes are
    `Inert`.

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
    machine.stack.append(machine.text(machine.take_length(_TEXT_OF_PYTHON_2[code]), "latin-1"))


@_operation(*_BYTES)
def _bytes(machine: Machine, code: bytes) -> None:
    size = machine.take_length(_BYTES[code])
    if size >= 2**62:
        raise UnreadableFileError("a damaged pickle: bytes without bounds")
    if size:  # the last byte is read, so that the end of the file is noticed
        machine.stream.seek(size - 1, io.SEEK_CUR)
        machine.take(1)
    machine.stack.append(Inert(Global("builtins", "bytes"), (size,)))


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
