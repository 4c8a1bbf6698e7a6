"""How numbers of things, names, sizes and what a value must be are written wherever a person reads them."""

from collections.abc import Mapping, Sequence
from typing import Any

MAX_NAMES = 8  # in one sentence


def one_line(text: str) -> str:
    """The text without line breaks and with control characters made visible.

    File and layer names come from strangers; an escape sequence in them must not reach the terminal.
    """
    flat = " ".join(text.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in flat)


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """A number with its noun: "1 layer", "2,000 layers"; `nouns` where an s alone does not do."""
    return f"{count:,} {noun if count == 1 else nouns or f'{noun}s'}"


def list_names(names: Sequence[str], most: int = MAX_NAMES) -> str:
    """The first few, and how many there are in all."""
    shown = ", ".join(names[:most])
    return shown + (f", ... ({len(names):,} in all)" if len(names) > most else "")


def gigabytes(num_bytes: int, digits: int = 1) -> str:
    """As disks and memory are sold: 1 GB is 1e9 bytes."""
    return f"{num_bytes / 1e9:,.{digits}f} GB"


_EXPECTED = {  # by pydantic's kinds of errors, as far as a configuration or an option can have them
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "too_short": "a list of at least {min_length:,}",
    "too_long": "a list of at most {max_length:,}",
    "greater_than": "above {gt:,}",
    "greater_than_equal": "at least {ge:,}",
    "less_than": "below {lt:,}",
    "less_than_equal": "at most {le:,}",
    "literal_error": "{expected}",
    "none_required": "null",
    "invalid-json-value": "text, a number, true, false, null, a list or keys with such values",
}


def expected_value(problem: Mapping[str, Any]) -> str:
    """What a value must be, such as "a whole number" or "at least 1", of one of pydantic's `errors()`."""
    pattern = _EXPECTED.get(problem["type"])
    if pattern is None:
        return str(problem["msg"]).removeprefix("Input should be ")
    limits = {  # those of a float key are 0.0 and 1.0
        name: int(limit) if isinstance(limit, float) and limit.is_integer() else limit
        for name, limit in problem.get("ctx", {}).items()
    }
    return pattern.format(**limits)
