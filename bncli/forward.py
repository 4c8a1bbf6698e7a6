"""One batch through any classifier: on its device, with its output checked."""

from itertools import chain

import torch
from torch import Tensor, nn

from bncli.errors import BncliError


def model_device(model: nn.Module) -> torch.device | None:
    """The device of the first parameter or buffer; None for a model that has neither."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return None if tensor is None else tensor.device


def forward(model: nn.Module, inputs: Tensor) -> Tensor:
    """The logits (N, num_classes) of inputs (N, ...), on the model's device, in the model's mode.

    Raises BncliError if the model returns anything else than one row of numbers per input.
    """
    logits = model(inputs.to(model_device(model), non_blocking=True))
    if not isinstance(logits, Tensor):
        raise BncliError(
            f"the model returned a {type(logits).__name__}, expected logits: a tensor (N, num_classes)"
        )
    if logits.dim() != 2 or len(logits) != len(inputs) or logits.shape[1] == 0:
        raise BncliError(
            f"the model returned shape {tuple(logits.shape)} for {len(inputs)} inputs, "
            f"expected logits of shape ({len(inputs)}, num_classes)"
        )
    return logits


def is_too_few_values(error: ValueError) -> bool:
    """Whether this is BatchNorm in train mode refusing to measure a single value per channel."""
    return "Expected more than 1 value per channel" in str(error)
