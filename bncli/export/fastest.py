"""Which of several ways to compute the same is the fastest here, found in a second or two.

All take turns, so that another program on the machine slows down each of them. The least time counts: what
is added to it is others' work.
"""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Key = TypeVar("Key")
MIN_TURNS, MAX_TURNS = 3, 200


def times_in_turns(ways: Mapping[Key, Callable[[], object]], seconds: float = 1.0) -> dict[Key, float]:
    """The least seconds of one call of each, from 3 turns on until so many seconds are over.

    The first call of each is not counted: engines prepare themselves for the shape of the inputs in it.
    """
    best = dict.fromkeys(ways, float("inf"))
    for call in ways.values():
        call()
    start = time.perf_counter()
    for turn in range(MAX_TURNS):
        if turn >= MIN_TURNS and time.perf_counter() - start > seconds:
            break
        for key, call in ways.items():
            call()  # another way's threads may still be waiting for work
            begin = time.perf_counter()
            call()
            best[key] = min(best[key], time.perf_counter() - begin)
    return best
