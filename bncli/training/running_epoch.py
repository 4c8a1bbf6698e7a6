"""What an epoch has seen so far: sums that a checkpoint in its midst saves, to continue bit for bit."""

from typing import Any

import torch
from torch import Tensor, nn

from bncli.batchnorm import EpochStatistics


class RunningEpoch:
    """The sums over the steps of one epoch. Create it before the epoch's first step."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.num_steps = 0
        self.num_images = 0
        self.seconds = 0.0  # of the sessions before this one
        # sums stay on the device: reading them would make it wait in every step
        self.loss_sum = torch.zeros((), device=device)  # nats, over images
        self.num_correct = torch.zeros((), dtype=torch.int64, device=device)
        self.statistics = EpochStatistics(model)

    def add(self, loss: Tensor, num_correct: Tensor, num_images: int) -> None:
        """Count one step, after it is taken: its mean loss in nats and its correct predictions.

        `statistics` has observed every forward pass of it already.
        """
        self.loss_sum += loss * num_images
        self.num_correct += num_correct
        self.num_images += num_images
        self.num_steps += 1

    def tensors(self) -> list[Tensor]:
        """All that a step changes in place."""
        return [self.loss_sum, self.num_correct, *self.statistics.sums()]

    @property
    def counts(self) -> tuple[int, int, int]:
        """All else that a step changes."""
        return self.num_steps, self.num_images, self.statistics.num_steps

    @counts.setter
    def counts(self, counts: tuple[int, int, int]) -> None:
        self.num_steps, self.num_images, self.statistics.num_steps = counts

    def metrics(self) -> dict[str, Any]:
        """The training half of the epoch's line in metrics.jsonl, but for its times."""
        return {
            "train_loss": self.loss_sum.item() / self.num_images,
            "train_accuracy": self.num_correct.item() / self.num_images,
            "layers": [
                {
                    "name": layer.name,
                    "running_mean_norm": layer.running_mean_norm,
                    "running_var_norm": layer.running_var_norm,
                    "mean_shift": layer.mean_shift_in_batch_deviations,
                    "var_ratio": layer.var_ratio,
                }
                for layer in self.statistics.finish()
            ],
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors on their device and plain values; a copy, which later steps do not change."""
        return {
            "num_steps": self.num_steps,
            "num_images": self.num_images,
            "seconds": self.seconds,
            "loss_sum": self.loss_sum.clone(),
            "num_correct": self.num_correct.clone(),
            "statistics": self.statistics.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, bit for bit.

        Raises:
            KeyError, ValueError, RuntimeError: when it is the state of another model.
        """
        self.statistics.load_state_dict(state["statistics"])
        self.loss_sum.copy_(state["loss_sum"])
        self.num_correct.copy_(state["num_correct"])
        self.num_steps, self.num_images = int(state["num_steps"]), int(state["num_images"])
        self.seconds = float(state["seconds"])
