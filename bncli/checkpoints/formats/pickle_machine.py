"""The state of a pickle that is read as data: its stack, marks and memo, and the limits of all three.

Every function and class stays a name (`Global`), every call of one and every object is a record of what was
asked for (`Inert`).
"""

import io
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol

from bncli.checkpoints.byte_source import UnreadableFileError

# A tensor takes about 30 operations: 4 million are some 130,000 tensors. An operation keeps at most about
# 140 bytes (an entry of the memo), which bounds memory to 560 MB.
MAX_OPERATIONS = 4_000_000
MAX_TEXT = 32 * 2**20  # characters in all
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
        return f"<{type(value).__name__} {self.num_odd_keys}>"

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
        below: Iterable[object] = ()
        if isinstance(node, Inert):
            below = (node.kind, node.arguments, node.state, node.items)
        elif isinstance(node, dict):
            below = node.values()
        elif isinstance(node, list | tuple) and not isinstance(node, Global):
            below = node
        waiting += reversed(list(islice(below, MAX_WALKED)))
