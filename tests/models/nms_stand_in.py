"""torchvision's non-maximum suppression, where its C extension was built for another torch: see
`bncli.torchvision_compat`. Elsewhere torchvision's own is used.

Detectors call it last, behind all their layers; without it they cannot be computed at all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from bncli.torchvision_compat import import_torchvision


@contextmanager
def detectors_computable() -> Iterator[None]:
    """Let torchvision's detectors be computed on the CPU."""
    extension = import_torchvision().extension
    if extension._has_ops():
        yield
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        library.impl("nms", _nms, "CPU")
        with mock.patch.object(extension, "_has_ops", lambda: True):
            yield
    finally:
        library._destroy()


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices (K,) of the boxes that are kept, best first: a box goes that overlaps a better one too much."""
    order, kept = scores.argsort(descending=True), []
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[order, :2])
        high = torch.minimum(boxes[best, 2:], boxes[order, 2:])
        overlap = (high - low).clamp_min(0).prod(1)
        order = order[overlap / (areas[best] + areas[order] - overlap) <= iou_threshold]
    return torch.stack(kept) if kept else torch.zeros(0, dtype=torch.int64)
