"""A training step happens wholly or not at all: weights, momentum, running statistics and sums together.

The state after the last good step is kept in a second set of tensors. A step that ends in bad numbers, or is
broken off at any instruction, is undone by writing that state back, in place and bit for bit.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from bncli.training.run import Run


class LastGoodStep:
    """A copy of everything in a run that a step of its running epoch changes."""

    def __init__(self, run: Run) -> None:
        """Make room for the copy; nothing is kept yet."""
        self._run = run
        self._tensors = [*run.model.parameters(), *run.model.buffers(), *run.running_epoch.tensors()]
        self._copies = [torch.empty_like(tensor) for tensor in self._tensors]
        self._momenta: list[Tensor] = []  # empty before the first step, as the optimiser's are
        self._counts = (0, run.running_epoch.counts)

    @contextlib.contextmanager
    def or_nothing(self) -> Iterator[None]:
        """Undo whatever the block did to the run if it raises, KeyboardInterrupt included.

        While the block runs, and for good if undoing is itself interrupted, `run.is_whole` is False.
        """
        self._keep()
        self._run.is_whole = False
        try:
            yield
            self._run.is_whole = True
        except BaseException:
            self._run.is_whole = False
            self._restore()
            self._run.is_whole = True
            raise

    @torch.no_grad()
    def _keep(self) -> None:
        momenta = self._run.optimizer.momenta()
        if len(self._momenta) != len(momenta):
            self._momenta = [torch.empty_like(momentum) for momentum in momenta]
        # one call for all: the copies of a small network take longer to start than to make
        torch._foreach_copy_([*self._copies, *self._momenta], [*self._tensors, *momenta])
        self._counts = (self._run.step, self._run.running_epoch.counts)

    @torch.no_grad()
    def _restore(self) -> None:
        torch._foreach_copy_(self._tensors, self._copies)
        if self._momenta:
            torch._foreach_copy_(self._run.optimizer.momenta(), self._momenta)
        else:
            self._run.optimizer.forget_momenta()
        self._run.step, self._run.running_epoch.counts = self._counts
