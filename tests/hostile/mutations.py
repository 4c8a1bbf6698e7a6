"""Seeded changes of configurations, checkpoints and images: of structure, and of single bytes."""

import copy
import random
from typing import Any

import torch

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**40, 0.0, -0.5, 1e308, 5e-324, float("nan"),
    float("inf"), float("-inf"), "", "0", "\x1b[31mred\x07", "[bold]x[/bold]", "a\nb\rc", "\udcff", "\u202e", "x" * 5000,  # noqa: E501
    "../../etc/passwd", "/dev/zero", "file:///etc/passwd", [], {}, [[]], [1, "a", None], {"": {}}, {"a": [1]},
)  # fmt: skip


def nasty(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(NASTY))


def nasty_tensor(rng: random.Random, like: Any = None) -> Any:
    shape = tuple(like.shape) if isinstance(like, torch.Tensor) else (2,)
    return rng.choice(
        [
            lambda: torch.full(shape, float("nan")),
            lambda: torch.zeros(
                shape, dtype=rng.choice([torch.float64, torch.int64, torch.bool, torch.bfloat16])
            ),
            lambda: torch.zeros(*shape, 1),
            lambda: torch.zeros(0),
            lambda: torch.zeros(1).expand(1 << rng.randrange(20, 50)),
            lambda: torch.zeros(shape, dtype=torch.complex64),
            lambda: torch.empty(shape, device="meta"),
            lambda: torch.eye(2).to_sparse(),
            lambda: torch.nn.Parameter(torch.zeros(shape)),
            lambda: torch.full(shape, rng.choice([1e38, -1e38, float("inf"), 0.0])),
        ]
    )()


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) below a nested value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found.append((value, key))
        places(item, found)
    return found


def mutated(value: Any, rng: random.Random, *, tensors: bool = False) -> Any:
    """A deep copy with one to three changes somewhere inside."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        all_places = places(value, [])
        if not all_places:
            return nasty(rng)
        container, key = rng.choice(all_places)
        item = container[key]
        change = rng.randrange(7)
        if change == 0:
            del container[key]
        elif change == 1:
            container[key] = nasty_tensor(rng, item) if tensors else nasty(rng)
        elif change == 2:
            container[key] = -item if isinstance(item, int | float) else nasty(rng)
        elif change == 3:
            container[key] = copy.deepcopy(rng.choice(all_places)[0])
        elif change == 4 and isinstance(container, dict):
            container[str(nasty(rng))[:20]] = container.pop(key)
        elif change == 5 and isinstance(item, int) and not isinstance(item, bool):
            container[key] = item + rng.choice([-1, 1, 7, 1000])
        else:
            container[key] = nasty(rng)
    return value


def with_changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few bytes flipped, removed, doubled, overwritten by extreme numbers, or the end cut off."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(changed)) if changed else 0
        kind = rng.randrange(6)
        if kind <= 1 and changed:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del changed[place : place + rng.randrange(1, 40)]
        elif kind == 3:
            changed[place:place] = changed[place : place + rng.randrange(1, 40)]
        elif kind == 4:
            changed[place : place + 4] = rng.choice(
                [b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"]
            )
        elif rng.random() < 0.3:
            del changed[place:]
    return bytes(changed)
