"""How a convolution walks over an image: its strides, and the zeros around the image.

They are in no state dict, so a conversion can only compare them with those of the network that it is for.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """One convolution; the axes of the image in their order."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # zeros before and behind the image, for each axis


def same_padding(
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """What TensorFlow and JAX call 'same', for images whose sides are multiples of the strides.

    With strides it is less before than behind: 0 and 1 for a kernel of 3 and a stride of 2.
    """
    totals = [
        max(step * (length - 1) + 1 - jump, 0)
        for length, jump, step in zip(kernel, stride, dilation, strict=True)
    ]
    return tuple((total // 2, total - total // 2) for total in totals)
