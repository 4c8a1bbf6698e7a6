"""Test-time augmentation: logits averaged over views of each image, reported apart from plain accuracy.

`flip`: the image and its mirror image. `shifts`: both also shifted by one pixel up-left and down-right, with
reflection padding, as in airbench (https://github.com/KellerJordan/cifar10-airbench, level 2). Images are
tensors (N, C, H, W) of any kind of number, at least 2 pixels high and wide.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from bncli.batches import Batches, GetTensor
from bncli.distributed.wrapped import unwrapped
from bncli.evaluation.evaluate import evaluate
from bncli.forward import forward
from bncli.wording import plural

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Views = Literal["flip", "shifts"]


@dataclass(frozen=True)
class AugmentedEvaluation:
    """How well a classifier does on views of each image, averaged."""

    views: str
    num_views: int
    num_images: int
    accuracy: float  # fraction in [0, 1]; a row of logits with a NaN counts as wrong
    loss: float  # mean cross-entropy of the averaged logits, nats
    seconds: float  # wall-clock time of the pass, loading included

    def __str__(self) -> str:
        """Accuracy and loss in one line."""
        return (
            f"accuracy {self.accuracy:.2%} of {plural(self.num_images, 'image')},"
            f" {plural(self.num_views, 'view')} of each ({self.views}), loss {self.loss:.4f}"
        )


def evaluate_augmented(
    model: nn.Module,
    batches: Batches,
    views: Views,
    *,
    group: "ProcessGroup | None" = None,
    get_input: GetTensor | None = None,
    get_labels: GetTensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> AugmentedEvaluation:
    """Evaluate like `evaluate`, with the weighted mean of the views' logits in place of an image's own.

    The unshifted pair weighs 1/2 in all, each image of a pair the same; the model is left as it was.
    `progress` is given the number of images done after every batch. `group` is that of `evaluate`.

    Raises DataError if there are no images, or a label is not a class of the model.
    """
    averaged = _Averaged(unwrapped(model), views)
    found = evaluate(
        averaged, batches, group=group, get_input=get_input, get_labels=get_labels, progress=progress
    )
    num_views = len(view_weights(views)) * 2
    return AugmentedEvaluation(views, num_views, found.num_images, found.accuracy, found.loss, found.seconds)


class _Averaged(nn.Module):
    """A classifier that sees views of every image."""

    def __init__(self, model: nn.Module, views: Views) -> None:
        super().__init__()
        self.model, self.views = model, views

    def forward(self, images: Tensor) -> Tensor:
        return augmented_logits(self.model, images, self.views)


def augmented_logits(model: nn.Module, images: Tensor, views: Views) -> Tensor:
    """The weighted mean (N, num_classes) over the views, in the model's mode; float32 at least."""
    total: Tensor | None = None
    for shift, weight in view_weights(views).items():
        moved = shifted(images, shift)
        for view in (moved, moved.flip(3)):
            logits = forward(model, view)
            part = weight * logits.to(torch.promote_types(logits.dtype, torch.float32))
            total = part if total is None else total + part
    assert total is not None
    return total


def view_weights(views: Views) -> dict[int, float]:
    """The weight of each image of the mirrored pair, by the pair's shift in pixels."""
    return {0: 0.5} if views == "flip" else {0: 0.25, -1: 0.125, 1: 0.125}


def shifted(images: Tensor, pixels: int) -> Tensor:
    """Content moved down and right by `pixels` (up and left where negative); what is missing is mirrored."""
    for dim in (2, 3):
        size = images.shape[dim]
        source = (torch.arange(size, device=images.device) - pixels).abs()
        # the last pixel is the mirror's axis and not repeated, as in PyTorch's reflection padding
        source = torch.where(source >= size, 2 * (size - 1) - source, source)
        images = images.index_select(dim, source)
    return images
