"""CIFAR-10 (Krizhevsky 2009): found, unpacked or downloaded; `cifar10_files` reads it, by its MD5s.

The batches are looked for in `root` and just above and below it first. Otherwise they come from a local
archive, or from a download of the archive into `root`. The archive's MD5 is checked before it is opened, it
is unpacked into a temporary folder, and only whole files move to their final place, so an interrupted run
leaves nothing that the next one could trust by mistake.
"""

import hashlib
import http.client
import pickle
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import IO

import torch

from bncli.config import Cifar10Config
from bncli.data import cifar10_files as files
from bncli.data.dataset import Dataset, Progress, Split
from bncli.data.memory import require_memory
from bncli.data.user_path import user_path
from bncli.errors import DataError

_CHUNK = 1 << 20  # bytes
_ARCHIVE_BYTES = 170_498_071  # of cifar-10-python.tar.gz
_TIMEOUT = 30.0  # seconds without a single byte
_BROKEN_ARCHIVE = (tarfile.TarError, EOFError, zlib.error, OSError)


def load_cifar10(
    config: Cifar10Config,
    progress: Progress | None = None,
    *,
    may_download: bool = True,
    only_train: bool = False,
) -> Dataset:
    """Load CIFAR-10: 50,000 training and 10,000 test images, (3, 32, 32) uint8, ten classes.

    Without `may_download` nothing is fetched but from a `url` that the configuration names. With `only_train`
    no test image is read, unless that was done ahead, and the training split is the test split too.

    Raises:
        DataError: the data is neither at `root` nor to be had from `archive` or `url`, or it is damaged.
    """
    root = user_path(config.root, "data.root")
    if root.is_file():
        fix = "name the folder of cifar-10-batches-py, or set data.archive to a local cifar-10-python.tar.gz"
        raise DataError(f"data.root: {root} is a file; {fix}")
    folders = list(files.batch_folders(root))
    if not any(map(files.is_read_ahead, folders)):
        # both splits, a file and what is unpickled of it
        require_memory(3 * 50_000 * 3072, what="data: CIFAR-10", fix="end other programs, or raise the limit")
    for folder in folders:
        dataset = _read(folder, only_train=only_train)
        if dataset is not None:
            return dataset
    home = files.download_root(root)
    _provide(home, root, config, progress, may_download=may_download)
    dataset = _read(home / files.FOLDER, only_train=only_train)
    if dataset is None:
        raise DataError(
            f"{home}: the archive does not hold the files of CIFAR-10 as published (by their MD5)"
        )
    return dataset


def _read(folder: Path, *, only_train: bool) -> Dataset | None:
    """Read the splits; None where a file is missing or has another MD5."""
    try:
        arrays = files.read_arrays(folder, only_train=only_train)
    except (OSError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise DataError(f"{folder}: cannot be read: {_reason(error)}") from error
    if arrays is None:
        return None
    train = Split(torch.from_numpy(arrays.train_images), torch.from_numpy(arrays.train_labels))
    test = train
    if not only_train:
        test = Split(torch.from_numpy(arrays.test_images), torch.from_numpy(arrays.test_labels))
    return Dataset("cifar10", train, test, arrays.class_names)


def _provide(
    home: Path, root: Path, config: Cifar10Config, progress: Progress | None, *, may_download: bool
) -> None:
    """Put the batches into `home`, from an archive or a download."""
    archive: Path | None
    if config.archive is not None:
        archive = _named_archive(config.archive)
    else:
        archive = next(filter(_is_archive, files.archives(root)), None)
    begun = any(files.begun_folders(root))  # incomplete or damaged: better named than downloaded anew
    if archive is None and config.url is None and (begun or not may_download):
        raise DataError(_not_there(root))
    try:
        home.mkdir(parents=True, exist_ok=True)
        # made before a long download, so that a folder that cannot be written is noticed at once
        with tempfile.TemporaryDirectory(dir=home, prefix=".cifar10-") as folder:
            if archive is None:
                archive = home / files.ARCHIVE
                _download(config.url or files.URL, archive, files.ARCHIVE_MD5, Path(folder), progress)
            _unpack(archive, Path(folder), home)
    except OSError as error:
        found = f"data.root: cannot write CIFAR-10 to {home}: {_reason(error)}"
        raise DataError(f"{found}; choose another folder") from error


def _not_there(root: Path) -> str:
    """What is wrong at `root`, and what to type."""
    folder = root if root.name == files.FOLDER else root / files.FOLDER
    folder = next(files.begun_folders(root), folder)
    missing = files.missing_files(folder)
    if not folder.is_dir():
        found = f"there is no {folder}, nor one above or below"
    elif missing:
        found = f"{folder} lacks {', '.join(missing)}"
    else:
        found = f"{folder} is damaged (the MD5 of its files is not the published one)"
    return (
        f"{found}; give --set data.root=FOLDER that holds {files.FOLDER}, or --set data.archive=FILE for a"
        f" local {files.ARCHIVE}, or --set data.url={files.URL} to download it"
    )


def _is_archive(path: Path) -> bool:
    try:
        return _md5(path) == files.ARCHIVE_MD5
    except OSError:
        return False


def _named_archive(text: str) -> Path:
    """The archive that the configuration names, with the right MD5."""
    archive, expected = user_path(text, "data.archive"), files.ARCHIVE_MD5
    try:
        if archive.exists() and not archive.is_file():
            raise OSError("not a file")  # a pipe could be waited for without end
        found = _md5(archive)
    except OSError as error:
        raise DataError(f"data.archive: cannot read {archive}: {_reason(error)}") from error
    if found != expected:
        wanted = f"expected {expected} (cifar-10-python.tar.gz)"
        raise DataError(f"data.archive: {archive} has MD5 {found}, {wanted}; download it again")
    return archive


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _download(url: str, archive: Path, md5: str, folder: Path, progress: Progress | None) -> None:
    """Download to `folder`, check, then move to `archive`, where the next run would find it."""
    part = folder / archive.name
    with part.open("wb") as file:
        try:
            found = _stream(url, file, progress)
        except (
            OSError,
            http.client.HTTPException,
            ValueError,
        ) as error:  # a bad URL is a ValueError
            raise DataError(_cannot_download(url, _reason(error), md5)) from error
    if found != md5:
        raise DataError(_cannot_download(url, f"the file has MD5 {found}, expected {md5}", md5))
    part.replace(archive)


def _stream(url: str, file: IO[bytes], progress: Progress | None) -> str:
    """Copy `url` to `file`; return the MD5 of what came."""
    digest = hashlib.md5(usedforsecurity=False)
    if not url.lower().startswith(("http://", "https://")):
        raise ValueError("data.url must begin with http:// or https://; for a file there is data.archive")
    request = urllib.request.Request(url, headers={"User-Agent": "bncli"})
    try:
        # a redirection to any other scheme finds no handler that would follow it
        response = _opener().open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection, and our exception would hold it
        raise
    with response:
        total = int(response.headers.get("Content-Length") or 0)
        done = 0
        while chunk := response.read1(_CHUNK):  # read() would wait for a whole chunk on a slow host
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            if done > _ARCHIVE_BYTES:  # a host that never ends would fill the disk
                raise OSError(f"it sends more than the archive's {_ARCHIVE_BYTES:,} bytes")
            if progress is not None:
                progress("download CIFAR-10 (bytes)", done, max(total, done))
    if done < total:
        raise OSError(f"the connection broke off after {done} of {total} bytes")
    return digest.hexdigest()


def _opener() -> urllib.request.OpenerDirector:
    """Opens http and https, and nothing else: no files, no ftp, no data in the address itself."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _cannot_download(url: str, reason: str, md5: str) -> str:
    return (
        f"cannot download CIFAR-10 from {url}: {reason}; set data.url to another mirror, or data.archive to "
        f"a local cifar-10-python.tar.gz (MD5 {md5}), or data.root to a folder with cifar-10-batches-py"
    )


def _unpack(archive: Path, folder: Path, root: Path) -> None:
    """Unpack the needed files into `folder`, then move each as a whole to its place in `root`.

    No name and no link in the archive is followed: what has another name than a needed file is left out.
    (`TarFile.extractall(filter="data")` would do, but Python 3.11 has it from 3.11.4 on.)
    """
    needed = (*files.TRAIN, *files.TEST, *files.META)
    places = {f"{files.FOLDER}/{name}": folder / name for name in needed}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                place = places.get(member.name.removeprefix("./"))
                content = tar.extractfile(member) if place is not None and member.isreg() else None
                if place is not None and content is not None:
                    with content, place.open("wb") as file:
                        shutil.copyfileobj(content, file)
    except _BROKEN_ARCHIVE as error:
        raise DataError(f"{archive}: cannot be unpacked: {_reason(error)}") from error
    for name in needed:
        if not (folder / name).is_file():
            raise DataError(f"{archive}: holds no {files.FOLDER}/{name}")
    target = root / files.FOLDER
    target.mkdir(exist_ok=True)
    for name in needed:
        (folder / name).replace(target / name)


def _reason(error: Exception) -> str:
    """Say on one line what went wrong."""
    return " ".join(str(error).split()) or type(error).__name__
