"""Which data set it is, in 64 letters: a run may only be resumed on the images and labels it began with."""

import hashlib

from bncli.data.dataset import Dataset

_CHUNK = 128  # images; small, so that a memory-mapped set is never in memory as a whole


def digest_dataset(dataset: Dataset) -> str:
    """SHA-256 (hexadecimal) over classes, images, labels and their order, of both splits."""
    digest = hashlib.sha256(repr(dataset.class_names).encode(errors="surrogatepass"))
    for split in (dataset.train, dataset.test):
        digest.update(f"{tuple(split.images.shape)}\n".encode())
        for images in split.images.split(_CHUNK):
            digest.update(images.cpu().contiguous().numpy().data)
        digest.update(split.labels.cpu().contiguous().numpy().data)
    return digest.hexdigest()
