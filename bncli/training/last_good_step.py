"""A training step happens wholly or not at all: weights, momentum, running statistics and sums together.

The state after the last good step is kept in a second set of tensors. A step that ends in bad numbers, or is
broken off at any instruction, is undone by writing that state back, in place and bit for bit.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bncli.training.run import Run


class LastGoodStep:
    """A copy of everything in a run that a step changes."""

    def __init__(self, run: Run) -> None:
        """Make room for the copy; nothing is kept yet."""
        self._run = run
        self._tensors = [*run.model.parameters(), *run.model.buffers()]
        self._copies = [torch.empty_like(tensor) for tensor in self._tensors]
        self._momenta: dict[Tensor, Tensor] = {}  # by parameter; empty before the first step
        self._epoch: dict[str, Any] = {}
        self._step = 0

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
        for kept, tensor in zip(self._copies, self._tensors, strict=True):
            kept.copy_(tensor)
        for parameter, state in self._run.optimizer.state.items():
            momentum = state.get("momentum_buffer")
            if momentum is not None:
                if parameter in self._momenta:
                    self._momenta[parameter].copy_(momentum)
                else:
                    self._momenta[parameter] = momentum.clone()
        self._epoch = self._run.running_epoch.state_dict()
        self._step = self._run.step

    @torch.no_grad()
    def _restore(self) -> None:
        for tensor, kept in zip(self._tensors, self._copies, strict=True):
            tensor.copy_(kept)
        for parameter, state in list(self._run.optimizer.state.items()):
            if parameter in self._momenta:
                state["momentum_buffer"].copy_(self._momenta[parameter])
            else:  # there was none before the first step
                del self._run.optimizer.state[parameter]
        self._run.running_epoch.load_state_dict(self._epoch)
        self._run.step = self._step
