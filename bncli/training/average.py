"""Weights averaged over the last steps, and the network they make once its statistics are measured.

While the learning rate is high weights wander about a better place than any they are at, and their average is
nearer to it (Polyak and Juditsky 1992; Izmailov et al. 2018). But an averaged network has other activations
than those it was averaged from, so their running statistics are not its own, nor is an average of them: its
own are measured on training images.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bncli.batchnorm import batch_norm_layers, has_running_statistics
from bncli.errors import BncliError, DivergedError, PeerLostError, StoppedError
from bncli.training.setup import Setup, training_sample

# For the statistics. 2,000 repair a ruined network as well as it ever was (README: A demonstration), and take
# 1 % of the time of an epoch over 50,000 images; 5,000 would take 3 %
NUM_MEASURED_IMAGES = 2_000


class AveragedWeights:
    """The exponential moving average of a network's weights, over about `num_steps` steps."""

    def __init__(self, model: nn.Module, num_steps: float) -> None:
        self._weights = dict(model.named_parameters())
        self._average = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._num_steps = num_steps

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Count the weights as they are after step `step`, from 1; waits for no device.

        The first steps count alike, as in a plain mean, until there are `num_steps` of them: the random
        weights that a network starts with have no part in it.
        """
        share = min(1.0, max(1 / self._num_steps, 1 / step))
        torch._foreach_lerp_(self.tensors(), list(self._weights.values()), share)

    def tensors(self) -> list[Tensor]:
        """All that a step changes in place."""
        return list(self._average.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The average by the names of the weights."""
        return self._average

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`, bit for bit.

        Raises:
            KeyError, ValueError: when it is the average of another network.
        """
        for name, average in self._average.items():
            if (state[name].shape, state[name].dtype) != (average.shape, average.dtype):
                raise ValueError(f"the average of {name} is not like its weight")
            average.copy_(state[name])


def averaged_network(
    setup: Setup, average: AveragedWeights, model: nn.Module, stop: Callable[[], bool]
) -> nn.Module:
    """A copy of `model` with the averaged weights and population statistics of its own.

    They are measured on training images, unaugmented, in batches of the size that BatchNorm sees in training,
    by all processes together.

    Raises:
        StoppedError: when `stop`, which is asked after every batch, says so, in any process.
        DivergedError: when the averaged network reaches a number that is not finite.
    """
    from bncli.batchnorm import recalibrate

    def ask(number: int, of: int, num_images: int) -> None:
        if stop():
            raise StoppedError

    network = copy.deepcopy(model)
    network.load_state_dict(average.state_dict(), strict=False)
    if not has_running_statistics(network):
        return network
    try:
        with setup.runtime.autocast():
            sample = training_sample(
                setup.train_split, setup.runtime, setup.norm_batch_size, NUM_MEASURED_IMAGES, setup.ranks
            )
            recalibrate(network, sample, method="precise", group=setup.ranks.group, progress=ask)
    except (StoppedError, PeerLostError):
        raise
    except BncliError as error:
        raise DivergedError(
            f"the average of the weights cannot be measured: {error}; the last step is saved; start again"
            " with a lower train.learning_rate, or without train.ema_epochs"
        ) from None
    return network


def describe_measurement(setup: Setup, network: nn.Module) -> dict[str, Any]:
    """How `averaged_network` got its statistics, for the checkpoint's `recalibration`."""
    return {
        "method": "precise",
        "num_images": min(NUM_MEASURED_IMAGES, len(setup.dataset.train)),
        "batch_size": setup.norm_batch_size,
        "recalibrated_layers": [name for name, _ in batch_norm_layers(network)],
    }
