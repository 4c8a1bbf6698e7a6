"""A count with its noun: 1 tensor, 2 tensors."""


def plural(count: int, noun: str) -> str:
    """`noun` in the singular or with an s, after its count, whose thousands are set apart."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
