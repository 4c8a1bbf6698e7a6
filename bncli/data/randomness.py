"""Random numbers as a function of where they are used, never of what was drawn before.

A resumed run therefore equals an uninterrupted one without any saved random-number state. The key
(stream, seed, epoch, step) goes through numpy's `SeedSequence`, which mixes all its bits into the 128-bit
state of PCG64, so neighbouring keys give unrelated streams. `torch.Generator` would not do: on the CPU
`manual_seed` keeps only the low 32 bits, so distinct steps of a long run would share their numbers.
Drawn on the CPU whatever the device, so every device sees the same.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What the numbers are for; a value must never change, nor be used again for something else."""

    ORDER = 1
    AUGMENT = 2
    FLIP = 3
    SYNTHETIC_TRAIN = 4
    SYNTHETIC_TEST = 5
    SAMPLE = 6
    NETWORK = 7


def generator(stream: Stream, seed: int, *where: int) -> np.random.Generator:
    """Return the generator of one place, for example `generator(Stream.ORDER, seed, epoch)`."""
    sequence = np.random.SeedSequence(seed, spawn_key=(int(stream), *where))
    return np.random.Generator(np.random.PCG64(sequence))
