"""Epochs that leave out images which the network knows already: `train.skip_easy`.

InfoBatch (Qin et al. 2024, arXiv 2303.04947): of the images with the lowest losses half are left out, at
random, and the other half counts double, so that the gradient of an epoch is the same in expectation. An
image's loss is that of the last time it was seen, in whatever augmentation, so it costs nothing to know.
"""

from typing import Any

import torch
from torch import Tensor

from bncli.data import BatchPlan


class ImageLosses:
    """The loss of every training image when it was seen last, in nats; infinite before that."""

    def __init__(self, num_images: int, device: torch.device) -> None:
        self.latest = torch.full((num_images,), torch.inf, device=device)
        # by them the running epoch's images are chosen, also when it is resumed in its midst
        self.at_start = self.latest.clone()

    def begin_epoch(self) -> None:
        """From now on images are chosen by what is known now."""
        self.at_start.copy_(self.latest)

    def keep(self, places: Tensor, losses: Tensor) -> None:
        """Remember losses (B,) of the images at `places` (B,)."""
        self.latest.index_copy_(0, places, losses.detach().to(self.latest.dtype))

    def state_dict(self) -> dict[str, Tensor]:
        """A copy, on the CPU."""
        return {"latest": self.latest.cpu().clone(), "at_start": self.at_start.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            KeyError, TypeError, RuntimeError: when it is that of another data set, or none.
        """
        for tensor, saved in ((self.latest, state["latest"]), (self.at_start, state["at_start"])):
            if saved.shape != tensor.shape:
                raise RuntimeError(f"losses of {tuple(saved.shape)} images, expected {tuple(tensor.shape)}")
            tensor.copy_(saved)


def smaller_batches(plan: BatchPlan, share: float) -> tuple[int, ...]:
    """The batch sizes of an epoch that leaves out this share of the images: as many steps, smaller ones."""
    return tuple(int(size * (1 - share)) for size in plan.batch_sizes)
