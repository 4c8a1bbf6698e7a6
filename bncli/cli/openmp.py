"""How PyTorch's threads wait for each other: a moment awake, then asleep. Said before torch is imported.

In GNU's OpenMP, which PyTorch carries on Linux, a thread that has to wait asks 300,000 times in a row whether
it may go on: milliseconds in which it keeps its core from whom it waits for, where another process wants that
core or a CPU quota runs out. 1,000 times is what GNU takes itself where it knows of more threads than cores;
of other processes it does not know. What is computed does not change by a bit.

Measured with quickstart.yaml on 2 cores (AMD EPYC, torch 2.13), training images/s with two threads, the best
of at least 6 epochs: beside one busy process about 700 with GNU's own number, 2,600 with 1,000, 2,800 with
none at all; on free cores 5,500, 5,300 and 5,000.
"""

from collections.abc import MutableMapping

_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def shorten_waiting(environment: MutableMapping[str, str]) -> None:
    """Ask GNU's OpenMP for it, unless the user has chosen. Without effect once torch is imported."""
    if not any(name in environment for name in _CHOICES):
        environment["GOMP_SPINCOUNT"] = "1000"
