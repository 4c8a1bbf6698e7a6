"""Whether a data set lies where a file says that it does, asked before the file is believed.

A checkpoint or a run directory may come from a stranger, and what it names is a path of its own choosing. So
the path is only followed where the data are certainly the right ones: CIFAR-10 by its published MD5s, image
folders by the digest that the checkpoint records. Until then nothing is written, nothing fetched, and no
image opened unless the classes are the network's.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bncli.config import Cifar10Config, DataConfig, ImageFolderConfig
from bncli.data import cifar10_files
from bncli.data.user_path import user_path
from bncli.errors import DataError

if TYPE_CHECKING:
    from bncli.data.dataset import Progress

DataRecord = tuple[str | None, tuple[str, ...]]
"""What a checkpoint says of its data: the digest, and the class names."""

# where looking at a path may ask another machine (an automounter's), or the kernel; "" is the root itself
_NOT_LOOKED_AT = {"", "net", "Network", "afs", "proc", "sys", "dev"}


def check_recorded_root(
    data: DataConfig, record: Callable[[], DataRecord], progress: "Progress | None" = None
) -> None:
    """Check that the data set lies in `data.root`; `record` is only asked for image folders.

    Raises:
        DataError: it does not, or nothing tells; the message is the reason alone.
    """
    if not isinstance(data, Cifar10Config | ImageFolderConfig):
        raise DataError("nothing tells whether it holds the same data")
    if not _is_looked_at(user_path(data.root, "data.root")):
        raise DataError("bncli does not look into such a folder")
    if isinstance(data, Cifar10Config):
        folders = recorded_batches(data.root)
        if not folders:
            raise DataError("it does not hold CIFAR-10")
        if not any(map(cifar10_files.is_whole, folders)):
            raise DataError("what it holds is not CIFAR-10 as published")
    else:
        digest, class_names = record()
        if digest is None:
            raise DataError("the file holds no digest to compare the images with")
        from bncli.data.imagefolder import check_digest

        check_digest(data, digest, class_names, progress)


def recorded_batches(root: str) -> list[Path]:
    """Return the folders at a recorded root that may hold CIFAR-10.

    Raises:
        DataError: the root is no path.
    """
    path = user_path(root, "data.root")
    return list(cifar10_files.batch_folders(path)) if _is_looked_at(path) else []


def _is_looked_at(path: Path) -> bool:
    """False for places at which a look is more than a look; decided by the name alone."""
    parts = Path(os.path.normpath(path.absolute())).parts  # links are not followed, which would be a look
    return not str(path).startswith("\\\\") and (parts[1:2] or ("",))[0] not in _NOT_LOOKED_AT
