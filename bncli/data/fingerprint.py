"""Which data set it is, in few letters: a run may only be resumed on the images and labels it began with.

Images that are not in memory are not all read for it: they are told by the names and sizes of their files.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bncli.data.dataset import Dataset
from bncli.data.streamed import StreamedSplit
from bncli.indexed import Indexed, in_order

_LISTED = "listing:"
_CHUNK = 128  # images; small, so that a memory-mapped set is never in memory as a whole


@dataclass(frozen=True)
class SplitContent:
    """A split as the digest sees it: its images need not be in memory at once."""

    shape: tuple[int, ...]  # (N, 3, H, W)
    pixels: Iterable[Any]  # buffers of bytes, which together are the uint8 images
    labels: Any  # (N,) int64, as a buffer


def digest_dataset(dataset: Dataset) -> str:
    """SHA-256 (hexadecimal) over classes, images, labels and their order, of both splits.

    Of images that are streamed it is over what is known of them without reading them: see `is_of_listing`.
    """
    splits = (dataset.train, dataset.test)
    if any(isinstance(split, StreamedSplit) for split in splits):
        listed = (
            SplitContent(
                (len(split), *split.image_shape), [getattr(split, "identity", b"")], _labels_of(split)
            )
            for split in splits
        )
        return _LISTED + digest_splits(dataset.class_names, listed)
    return digest_splits(dataset.class_names, map(_content, (dataset.train, dataset.test)))


def is_of_listing(digest: str) -> bool:
    """Whether it was made without the images themselves."""
    return digest.startswith(_LISTED)


def digest_splits(class_names: tuple[str, ...], splits: Iterable[SplitContent]) -> str:
    """Return the same of a data set whose images come one after the other."""
    digest = hashlib.sha256(repr(class_names).encode(errors="surrogatepass"))
    for split in splits:
        digest.update(f"{split.shape}\n".encode())
        for pixels in split.pixels:
            digest.update(pixels)
        digest.update(split.labels)
    return digest.hexdigest()


def content_of(shape: tuple[int, ...], pixels: Iterable[bytes], labels: list[int]) -> SplitContent:
    """Return a split whose images are decoded while they are asked for."""
    return SplitContent(shape, pixels, np.array(labels, np.int64).data)


def _content(split: Indexed) -> SplitContent:
    batches = split.batches_of(in_order(len(split), _CHUNK))
    chunks = (images.cpu().contiguous().numpy().data for images, _ in batches)
    return SplitContent((len(split), *split.image_shape), chunks, _labels_of(split))


def _labels_of(split: Indexed) -> Any:
    return b"" if split.labels is None else split.labels.cpu().contiguous().numpy().data


def _identity_of(split: Indexed) -> bytes:
    return split.identity if isinstance(split, StreamedSplit) else b""
