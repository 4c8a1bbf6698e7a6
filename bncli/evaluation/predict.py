"""The answer for single images: their most probable classes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bncli.batches import Batches, GetTensor, inputs_of, read_with
from bncli.batchnorm.modes import eval_mode, preserved_buffers
from bncli.errors import DataError
from bncli.forward import forward


@dataclass(frozen=True)
class ClassProbability:
    """A class and how probable the model finds it."""

    label: int  # index into the class names
    probability: float  # softmax of the logits, taken in float64


def predict(
    model: nn.Module, images: Batches, *, top: int = 1, get_input: GetTensor | None = None
) -> tuple[tuple[ClassProbability, ...], ...]:
    """For each image of a tensor (N, ...), or of batches, its `top` most probable classes, best first.

    Every image is computed in a batch of its own, in eval mode, so no other can have a part in its answer.
    Of equally probable classes the first one leads. The model is left as it was.

    Raises ValueError for `top` below 1, DataError where a logit is NaN.
    """
    if top < 1:
        raise ValueError(f"top must be 1 or more, got {top}")
    answers = []
    with eval_mode(model), preserved_buffers(model), torch.no_grad():
        for image in _one_by_one(read_with(images, get_input)):
            logits = forward(model, image)[0].cpu().double()  # (num_classes,)
            if logits.isnan().any():
                raise DataError("the network answers NaN; look for it in its weights and running statistics")
            probabilities, labels = logits.softmax(0).sort(descending=True, stable=True)
            best = zip(labels[:top].tolist(), probabilities[:top].tolist(), strict=True)
            answers.append(tuple(ClassProbability(label, probability) for label, probability in best))
    return tuple(answers)


def _one_by_one(images: Batches) -> Iterator[Tensor]:
    for inputs in inputs_of(images):
        for index in range(len(inputs)):
            yield inputs[[index]]
