"""The answer for single images: their most probable classes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bncli.batchnorm.modes import eval_mode, preserved_buffers
from bncli.errors import DataError
from bncli.forward import forward


@dataclass(frozen=True)
class ClassProbability:
    """A class and how probable the model finds it."""

    label: int  # index into the class names
    probability: float  # softmax of the logits, taken in float64


def predict(model: nn.Module, images: Tensor, *, top: int = 1) -> tuple[tuple[ClassProbability, ...], ...]:
    """For each of images (N, ...) its `top` most probable classes, the best first, or all if fewer exist.

    Every image is computed in a batch of its own, in eval mode, so no other can have a part in its answer.
    Of equally probable classes the first one leads. The model is left as it was.

    Raises ValueError for `top` below 1, DataError where a logit is NaN.
    """
    if top < 1:
        raise ValueError(f"top must be 1 or more, got {top}")
    answers = []
    with eval_mode(model), preserved_buffers(model), torch.no_grad():
        for index in range(len(images)):
            logits = forward(model, images[[index]])[0].cpu().double()  # (num_classes,)
            if logits.isnan().any():
                raise DataError("the network answers NaN; look for it in its weights and running statistics")
            probabilities, labels = logits.softmax(0).sort(descending=True, stable=True)
            best = zip(labels[:top].tolist(), probabilities[:top].tolist(), strict=True)
            answers.append(tuple(ClassProbability(label, probability) for label, probability in best))
    return tuple(answers)
