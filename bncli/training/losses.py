"""The loss of what a network returns in train mode: logits, and for two networks those of helpers too.

GoogLeNet and Inception v3 have auxiliary classifiers in the middle, whose losses are added with the weight of
their papers; in eval mode they are not there.
"""

from torch import Tensor
from torch.nn import functional as F

# by the type that torchvision's networks return: (logits, of the helpers ...)
_AUXILIARY_WEIGHTS = {
    "GoogLeNetOutputs": 0.3,  # Szegedy et al. 2014, arXiv 1409.4842, section 5
    "InceptionOutputs": 0.4,  # of torchvision's own training, references/classification
}


def find_logits(outputs: object) -> Tensor | None:
    """Those that predict, (N, num_classes); None where it is unknown which they are."""
    if type(outputs).__name__ in _AUXILIARY_WEIGHTS and isinstance(outputs, tuple):
        outputs = outputs[0]
    return outputs if isinstance(outputs, Tensor) else None


def loss_and_logits(outputs: object, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """The mean loss over the images, in nats, and the logits (N, num_classes); labels are (N,)."""
    logits = find_logits(outputs)
    if logits is None:
        raise TypeError(f"a {type(outputs).__name__} holds no logits that are known")  # `prepare` has looked
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    if isinstance(outputs, tuple):
        weight = _AUXILIARY_WEIGHTS[type(outputs).__name__]
        for helper in outputs[1:]:
            if helper is not None:
                loss = loss + weight * F.cross_entropy(helper, labels, label_smoothing=label_smoothing)
    return loss, logits
