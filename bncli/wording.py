"""How numbers of things, lists of names and sizes in bytes are written wherever a person reads them."""

from collections.abc import Sequence

MAX_NAMES = 8  # in one sentence


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
