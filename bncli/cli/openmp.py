"""How PyTorch's threads wait for each other: asleep, not spinning. To be said before torch is imported.

The OpenMP that PyTorch's CPU builds carry (GNU's) has each thread ask in a loop, for some milliseconds,
whether there is work again. Where another process wants the same core, or a CPU quota is used up, the
thread that asks keeps the one away that it waits for. Asleep, a thread leaves its core to others; it has to
be woken, which takes microseconds. What is computed does not change by a bit.

Measured on 2 cores (AMD EPYC, torch 2.13), training on 10,000 images of quickstart.yaml, best epoch of each
of three runs: see the table in .readme/measurements.md.
"""

from collections.abc import MutableMapping

_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # OpenMP's own, GNU's and LLVM's


def let_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Ask OpenMP for it, unless its user has chosen. Without effect once torch is imported."""
    if not any(name in environment for name in _CHOICES):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
