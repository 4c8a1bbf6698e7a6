"""What a file of anyone's holds: its format, and its content with `StoredTensor` for tensors.

Formats are recognised by their first bytes, whatever the file is called. Nothing in the file is executed
and nothing is written to it.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path

from bncli.checkpoints.byte_source import (
    ByteSource,
    DirectoryError,
    ForeignFileError,
    UnreadableFileError,
    open_source,
)
from bncli.checkpoints.folder import Folder
from bncli.checkpoints.formats import (
    distributed_folder,
    equinox_file,
    exported_program,
    flax_file,
    haiku_file,
    keras_file,
    mindspore_file,
    mxnet_file,
    named_arrays,
    numpy_arrays,
    onnx_file,
    orbax_folder,
    paddle_file,
    tensorflow_file,
    torch_legacy,
    torch_zip,
)
from bncli.checkpoints.formats.beside import linked_place
from bncli.checkpoints.formats.foreign import describe_directory, recognise_name
from bncli.checkpoints.formats.safetensors_file import is_safetensors, read_safetensors
from bncli.checkpoints.formats.shard_index import read_index
from bncli.checkpoints.formats.torch_pickle import FindStorage, TorchMeanings
from bncli.checkpoints.stored_tensor import StoredTensor

# Each gives the kind of what is its own and a ForeignNetwork (or what a state dict's file would hold), and
# None for all else, which it must not raise for.
ZIP_READERS: tuple[Callable[[torch_zip.ZipArchive], tuple[str, object] | None], ...] = (
    keras_file.read_if_keras_zip,
    exported_program.read_if_exported,
    numpy_arrays.read_if_npz,
)
FILE_READERS: tuple[Callable[[ByteSource, bytes], tuple[str, object] | None], ...] = (
    keras_file.read_if_hdf5,
    flax_file.read_if_flax,
    haiku_file.read_if_npy,
    equinox_file.read_if_equinox,
    onnx_file.read_if_onnx,
    mxnet_file.read_if_mxnet,
    mindspore_file.read_if_mindspore,
    paddle_file.read_if_paddle,
    numpy_arrays.read_if_pickle,
)
# of formats of several files: what is called opens one beside the file, by its plain name
COMPANION_READERS: tuple[
    Callable[[ByteSource, bytes, Callable[[str], ByteSource]], tuple[str, object] | None], ...
] = (
    keras_file.read_if_keras_shards,
    tensorflow_file.read_if_tensorflow_file,
)
FOLDER_READERS: tuple[Callable[[Folder], tuple[str, object] | None], ...] = (
    keras_file.read_if_keras_folder,
    tensorflow_file.read_if_tensorflow_folder,
    orbax_folder.read_if_orbax,
    distributed_folder.read_if_distributed,
)
_INDEX = ".index"  # of a TensorFlow checkpoint, which is named without it


def read_source(
    source: str,
    stack: ExitStack,
    meanings: Callable[[FindStorage], TorchMeanings] = TorchMeanings,
) -> tuple[str, object]:
    """The kind and the content of a file, of a URL, or of a directory that is a checkpoint.

    Raises:
        UnreadableFileError: when it is damaged, or of a format that bncli does not read.
        CheckpointError: naming it, when it cannot be read.
    """
    if "://" not in source and Path(source).is_dir():
        folder = Folder(Path(source), stack)
        found = _first(read(folder) for read in FOLDER_READERS)
        if found is not None:
            return found
        if folder.left_out:
            raise ForeignFileError(f"{describe_directory(source, folder.names)}{folder.left_out}")
    elif "://" not in source and not Path(source).exists() and Path(f"{source}{_INDEX}").is_file():
        source += _INDEX
    return read_content(open_file(source, stack), stack, meanings)


def open_file(source: str, stack: ExitStack) -> ByteSource:
    """A path or URL, opened as long as the stack is.

    Raises:
        UnreadableFileError: when it is a directory; says which file in it was meant, or what it is.
        CheckpointError: naming it, when it cannot be read.
    """
    try:
        return stack.enter_context(open_source(source))
    except DirectoryError as error:
        raise ForeignFileError(describe_directory(source, error.names)) from None


def read_content(
    file: ByteSource,
    stack: ExitStack,
    meanings: Callable[[FindStorage], TorchMeanings] = TorchMeanings,
) -> tuple[str, object]:
    """The kind of a file, and its content with `StoredTensor` for tensors.

    `meanings` are those of PyTorch's pickles.

    Raises:
        UnreadableFileError: when it is damaged, or of a format that bncli does not read.
    """
    start = file.read_at(0, min(file.size, 300))
    if not start:
        raise UnreadableFileError("an empty file, not a checkpoint")
    if start.startswith(torch_zip.SIGNATURE):
        archive = torch_zip.ZipArchive(file, strictly=False)
        found = _first(read(archive) for read in ZIP_READERS)
        return found or torch_zip.read_torch_archive(archive, meanings)

    def open_beside(name: str) -> ByteSource:
        return open_file(linked_place(file.name, name), stack)

    found = _first(
        chain(
            (read(file, start) for read in FILE_READERS),
            (read(file, start, open_beside) for read in COMPANION_READERS),
        )
    )
    if found is not None:
        return found
    if is_safetensors(start):
        tensors = _read_safetensors(file)
        named = named_arrays.recognise(tensors)  # of MindSpore, for example
        return "safetensors", tensors if named is None else named.network()
    if start.lstrip()[:1] == b"{":
        kinds = []

        def read_shard(name: str) -> Mapping[str, object]:
            kind, content = _read_shard(file.name, name, stack)
            kinds.append(kind)
            return content

        tensors = read_index(file, read_shard)
        return "safetensors index" if set(kinds) <= {"safetensors"} else "torch index", tensors
    return "torch legacy", torch_legacy.read_torch_legacy(file, meanings)


def _first(found: Iterable[tuple[str, object] | None]) -> tuple[str, object] | None:
    return next((one for one in found if one is not None), None)


def _read_safetensors(file: ByteSource) -> Mapping[str, StoredTensor]:
    try:
        return read_safetensors(file)
    except UnreadableFileError:
        known = recognise_name(file.name)  # the numbers of TensorFlow may begin as a header does
        if known is None:
            raise
        raise ForeignFileError(known.sentence) from None


def _read_shard(index: str, name: str, stack: ExitStack) -> tuple[str, Mapping[str, object]]:
    """One file of an index: a state dict at the top of a torch file, or safetensors."""
    path = linked_place(index, name)
    with named(path):
        file = open_file(path, stack)
        if file.read_at(0, 1) == b"{":
            raise UnreadableFileError("an index, where a file with tensors was expected")
        kind, content = read_content(file, stack)
        if not isinstance(content, dict):
            raise UnreadableFileError("no state dict, as a file of an index has to be")
    return kind, content


@contextmanager
def named(source: str) -> Iterator[None]:
    """Put the file's name before what is wrong with it."""
    try:
        yield
    except UnreadableFileError as error:
        raise error.public(f"{source}: {error}") from None


@contextmanager
def without_collector() -> Iterator[None]:
    """Pause the collector of cycles: among the many new objects it would search for ever and find none."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
