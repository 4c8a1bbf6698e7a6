"""How PyTorch's threads wait for each other: a moment awake, then asleep. Said before torch is imported.

In GNU's OpenMP, which PyTorch carries on Linux, a thread that has to wait asks 300,000 times in a row if it
may go on: milliseconds in which it keeps its core from whom it waits for, where another process wants that
core or a CPU quota runs out. (Where it knows of more threads than cores it asks 1,000 times; of other
processes it does not know.) What is computed does not change by a bit.

Measured on 2 cores (AMD EPYC, torch 2.13), two threads, quickstart.yaml with 2,500 images: best of 8 to 20
epochs in training images/s, and seconds of a whole `bncli eval`, the mean of 3. The machine was not idle: for
the first two lines these runs had real-time priority over all others.

    how often it asks      300,000    5,000    2,000    1,000    never
    training, free cores     5,440    5,300    5,320    5,290    5,030
    eval, free cores           5.7        -      5.6      6.3        -
    beside a busy process        -    2,100    2,490    2,630    2,810
"""

from collections.abc import MutableMapping

_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def shorten_waiting(environment: MutableMapping[str, str]) -> None:
    """Ask GNU's OpenMP for it, unless the user has chosen. Without effect once torch is imported."""
    if not any(name in environment for name in _CHOICES):
        environment["GOMP_SPINCOUNT"] = "2000"
