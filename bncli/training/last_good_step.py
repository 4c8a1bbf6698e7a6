"""Training steps happen wholly or not at all: weights, momentum, running statistics and sums together.

The state after the last step that is known to be good is kept in a second set of tensors. When steps after
it end in bad numbers, or one is broken off at any instruction, that state is written back, in place and bit
for bit.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from bncli.training.bad_numbers import all_finite
from bncli.training.run import Run


class LastGoodStep:
    """A copy of everything in a run that its steps change, and how many steps were taken since."""

    def __init__(self, run: Run) -> None:
        """Keep nothing yet: the next step does."""
        self._run = run
        self._copies: list[Tensor] = []
        self._momenta: list[Tensor] = []  # empty before the first step, as the optimiser's are
        self._had_gradients: list[bool] = []
        self._counts = (0, run.running_epoch.counts)
        self.num_unchecked = 0  # steps taken since

    @contextlib.contextmanager
    def or_back(self) -> Iterator[None]:
        """Count the block as a step, or go back if it raises, KeyboardInterrupt included.

        While the block runs, and for good if going back is itself interrupted, `run.is_whole` is False.
        """
        if self.num_unchecked == 0:
            self._keep()
        try:
            self._run.is_whole = False
            yield
            self.num_unchecked += 1
            self._run.is_whole = True
        except BaseException:
            self.go_back()
            raise

    def holds(self) -> bool:
        """Whether all numbers are finite: then the step taken last is the last good one.

        Waits for the device.
        """
        if self.num_unchecked and not all_finite(self._run.model, self._run.running_epoch.loss_sum):
            return False
        self.num_unchecked = 0
        return True

    def go_back(self) -> None:
        """Undo every step since the last good one."""
        self._run.is_whole = False
        self._restore()
        self.num_unchecked = 0
        self._run.is_whole = True

    def _tensors(self) -> list[Tensor]:
        model, average = self._run.model, self._run.average
        averaged = average.tensors() if average is not None else []
        return [*model.parameters(), *model.buffers(), *averaged, *self._run.running_epoch.tensors()]

    @torch.no_grad()
    def _keep(self) -> None:
        tensors, momenta = self._tensors(), self._run.optimizer.momenta()
        if len(self._copies) + len(self._momenta) != len(tensors) + len(momenta):
            self._copies, self._momenta = (
                [torch.empty_like(tensor) for tensor in each] for each in (tensors, momenta)
            )
        # one call for all: the copies of a small network take longer to start than to make
        torch._foreach_copy_([*self._copies, *self._momenta], [*tensors, *momenta])
        self._had_gradients = self._run.optimizer.had_gradients()
        self._counts = (self._run.step, self._run.running_epoch.counts)

    @torch.no_grad()
    def _restore(self) -> None:
        torch._foreach_copy_(self._tensors(), self._copies)
        self._run.optimizer.forget_momenta(self._had_gradients)
        if self._momenta:
            torch._foreach_copy_(self._run.optimizer.momenta(), self._momenta)
        self._run.step, self._run.running_epoch.counts = self._counts
