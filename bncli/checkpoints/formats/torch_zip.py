"""Files of `torch.save` since version 1.6, and of `torch.jit.save`: a zip archive.

`NAME/data.pkl` is a pickle of everything but the numbers, which lie in `NAME/data/KEY`, one entry for every
storage, not compressed. Reference: caffe2/serialize/inline_container.h.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial

from bncli.checkpoints.byte_source import MAX_READ, ByteSource, ForeignFileError, UnreadableFileError
from bncli.checkpoints.formats.foreign import UNKNOWN, recognise_zip
from bncli.checkpoints.formats.inert_pickle import read_pickle
from bncli.checkpoints.formats.torch_pickle import FindStorage, PlainMeanings, TorchMeanings
from bncli.checkpoints.stored_tensor import Storage

SIGNATURE = b"PK\x03\x04"
MAX_DIRECTORY = 16 * 2**20  # bytes: 200,000 entries with names of 30 characters
MAX_INFLATED = 4 * MAX_READ  # bytes, of all compressed entries
_HEADER = struct.Struct("<4s22xHH")  # of an entry: signature, ..., lengths of its name and of its padding
_PADDING = 256  # torch.save aligns numbers to 64 bytes; one read gets header, padding and numbers
_WHOLE = 2**20  # storages up to this size are read whole, because only then their checksum can be checked


def read_torch_zip(
    source: ByteSource,
    meanings: Callable[[FindStorage], TorchMeanings] = TorchMeanings,
    *,
    strictly: bool = False,
) -> tuple[str, object]:
    """The kind of the file and what its pickle says, with `StoredTensor` for tensors.

    `strictly` is for files that bncli wrote itself: every entry's checksum is computed, that of a storage
    when all of it is read (`Storage.read_whole`), and only what `torch.save` writes for plain tensors, texts
    and numbers has a meaning.

    Raises:
        UnreadableFileError: when it is damaged, or another kind of zip archive.
    """
    archive = ZipArchive(source, strictly=strictly)
    if not strictly or archive.is_script:  # which is never bncli's own
        return read_torch_archive(archive, meanings)
    pickle = archive.find_pickle()
    archive.check_layout()
    content = archive.read_pickle(pickle, PlainMeanings)
    archive.check_rest()
    return "torch zip", content


def read_torch_archive(
    archive: "ZipArchive", meanings: Callable[[FindStorage], TorchMeanings] = TorchMeanings
) -> tuple[str, object]:
    """The same of an archive of anyone's that is open already."""
    pickle = archive.find_pickle()
    return "torchscript" if archive.is_script else "torch zip", archive.read_pickle(pickle, meanings)


class ZipArchive:
    """The entries of a zip archive, read by position and with their checksums checked."""

    def __init__(self, source: ByteSource, *, strictly: bool) -> None:
        self.source = source
        self._strictly = strictly
        self._storages: dict[str, Storage] = {}  # those found, of a file that is read strictly
        self._num_inflated = 0  # bytes
        self._last: tuple[str, bytes] = ("", b"")  # of entries read whole: tensors may share a storage
        try:
            with _CarefulFile(source.stream().detach()) as stream, zipfile.ZipFile(stream) as archive:
                self.infos = archive.infolist()
                self.start_of_directory: int = archive.start_dir
                self.entries = {info.filename: info for info in self.infos}
        except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, OSError, struct.error):
            raise UnreadableFileError("not a checkpoint: a damaged or truncated zip archive") from None

    @property
    def is_script(self) -> bool:
        """Whether it holds code, as torch.jit writes it."""
        return any("/code/" in name for name in self.entries)

    def find_pickle(self) -> zipfile.ZipInfo:
        """The entry with the pickle; all of torch's lie in one folder with it."""
        found = [name for name in self.entries if name == "data.pkl" or name.endswith("/data.pkl")]
        if not found:
            known = recognise_zip(self.entries, self.source.name)
            if known:
                raise ForeignFileError(known.sentence)
            names = ", ".join(list(self.entries)[:4]) or "nothing"
            raise ForeignFileError(f"not a checkpoint, but a zip archive with {names}; {UNKNOWN}")
        pickle = self.entries[min(found, key=len)]
        self.check_byte_order(pickle.filename.removesuffix("data.pkl"))
        return pickle

    def check_byte_order(self, folder: str) -> None:
        """Raise UnreadableFileError for numbers of a big-endian machine; a file in the folder tells."""
        order = self.entries.get(f"{folder}byteorder")
        if order is not None and order.file_size == 3:  # "big", not "little"
            raise UnreadableFileError(
                "it was written on a big-endian machine; load it there and save it again"
            )

    def read_pickle(
        self, pickle: zipfile.ZipInfo, meanings: Callable[[FindStorage], TorchMeanings]
    ) -> object:
        """What the pickle says, with `StoredTensor` for tensors."""
        find_storage = partial(self.find_storage, pickle.filename.removesuffix("data.pkl"))
        with self.stream(pickle) as stream:
            return read_pickle(stream, meanings(find_storage))

    def check_layout(self) -> None:
        """Check that nothing is compressed, nothing twice there, and all in one folder, as torch.save writes.

        Raises:
            UnreadableFileError: where it is otherwise.
        """
        if any(info.compress_type != zipfile.ZIP_STORED for info in self.infos):
            raise UnreadableFileError("its entries are compressed, which torch.save does not do")
        if any(info.compress_size != info.file_size for info in self.infos):
            raise UnreadableFileError("a damaged file: an entry with two sizes")
        # entries that share bytes are small on disk and huge in memory
        if sum(info.file_size for info in self.infos) > self.source.size:
            raise UnreadableFileError("a damaged file: its entries are said to be larger than the file")
        folders = {name.partition("/")[0] for name in self.entries}
        if len(folders) != 1 or len(self.entries) != len(self.infos):
            raise UnreadableFileError("a damaged file: not one folder of entries with a name each")

    def check_rest(self) -> None:
        """Compute the checksum of every entry that is no storage of a tensor: those have their own check.

        Raises:
            UnreadableFileError: when one does not fit.
        """
        for info in self.infos:
            if info.filename not in self._storages:
                self._check_stored(info)

    def find_storage(self, folder: str, key: str, num_elements: int, itemsize: int) -> Storage:
        """The storage under a key of `find_persistent`, which wants so many elements of it."""
        info = self.entries.get(f"{folder}data/{key}")
        if info is None:
            raise UnreadableFileError(
                f"a damaged file: there is no entry data/{key[:40]} with the numbers of a tensor"
            )
        size = num_elements * itemsize
        if size > info.file_size or (self._strictly and size != info.file_size):
            raise UnreadableFileError(
                f"a damaged file: storage {key[:40]} is said to hold {num_elements} values, but holds"
                f" {info.file_size // itemsize}"
            )
        if not self._strictly:
            return self.storage(info)
        found = self._storages.get(info.filename)
        if found is None:
            start = self.position(info)
            read = partial(self._read_stored, start)
            found = Storage(info.file_size, read, info.filename, partial(self._check, info))
            self._storages[info.filename] = found
        return found

    def storage(self, info: zipfile.ZipInfo) -> Storage:
        """An entry's whole content, of a file that is not read strictly."""
        position = partial(self.position, info) if info.compress_type == zipfile.ZIP_STORED else None
        check = partial(self._check, info)
        return Storage(info.file_size, partial(self.read, info), info.filename, check, position=position)

    def _read_stored(self, position: int, start: int, size: int) -> bytes:
        return self.source.read_at(position + start, size)

    def read(self, info: zipfile.ZipInfo, start: int, size: int) -> bytes:
        """A range of an entry's content."""
        if info.compress_type != zipfile.ZIP_STORED:
            if self._last[0] != info.filename:  # torch never compresses; archivers do
                self._last = (info.filename, self.stream(info).read())
            return self._last[1][start : start + size]
        if info.file_size <= _WHOLE:
            return self._read_whole(info)[start : start + size]
        if (start, size) == (0, info.file_size):
            return self._read_whole(info)
        return self.source.read_at(self.position(info) + start, size)

    def _read_whole(self, info: zipfile.ZipInfo) -> bytes:
        """A stored entry in one read of header and content."""
        if self._last[0] == info.filename:
            self.source.count(info.file_size)
            return self._last[1]
        room = _HEADER.size + len(info.orig_filename) * 4 + _PADDING + info.file_size
        block = self.source.read_at(info.header_offset, min(room, self.source.size - info.header_offset))
        start = self._length_of_header(info, block[: _HEADER.size])
        content = block[start : start + info.file_size]
        if len(content) < info.file_size:
            content = self.source.read_at(info.header_offset + start, info.file_size)
        self._check(info, zlib.crc32(content))
        self._last = (info.filename, content)
        return content

    def head(self, info: zipfile.ZipInfo, size: int) -> bytes:
        """The first bytes of a compressed entry, without unpacking the rest; no checksum tells of them."""
        if info.compress_type != zipfile.ZIP_DEFLATED:
            raise UnreadableFileError(
                f"its entry {info.filename} is compressed in a way that bncli does not read"
            )
        packed = self.source.read_at(self.position(info), min(info.compress_size, size + 1024))
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size)
        except zlib.error:
            raise UnreadableFileError(
                f"a damaged file: its entry {info.filename} does not decompress"
            ) from None

    def stream(self, info: zipfile.ZipInfo) -> io.BufferedReader | io.BytesIO:
        """An entry's whole content as a file, its checksum checked."""
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UnreadableFileError(
                f"its entry {info.filename} is compressed in a way that bncli does not read"
            )
        if info.compress_type == zipfile.ZIP_DEFLATED:
            return io.BytesIO(self._inflate(info, self.position(info)))
        start = self._check_stored(info)
        return self.source.stream(start, start + info.file_size)

    def _check_stored(self, info: zipfile.ZipInfo) -> int:
        """Compute the checksum of an entry that is not compressed; its position."""
        start, checksum = self.position(info), 0
        for position in range(start, start + info.file_size, 2**20):
            size = min(2**20, start + info.file_size - position)
            checksum = zlib.crc32(self.source.read_at(position, size), checksum)
        self._check(info, checksum)
        return start

    def _inflate(self, info: zipfile.ZipInfo, start: int) -> bytes:
        self._num_inflated += info.file_size
        if info.file_size > MAX_READ or self._num_inflated > MAX_INFLATED:
            raise UnreadableFileError("too much of it is compressed; write it again without compression")
        machine = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            packed = self.source.read_at(start, info.compress_size)
            content = machine.decompress(packed, info.file_size + 1)  # never more, whatever it expands to
        except zlib.error:
            content = b""
        if len(content) != info.file_size:
            raise UnreadableFileError(f"a damaged file: its entry {info.filename} does not decompress")
        self._check(info, zlib.crc32(content))
        return content

    def position(self, info: zipfile.ZipInfo) -> int:
        """Where the content of an entry begins in the file."""
        header = self.source.read_at(info.header_offset, _HEADER.size)
        if self._strictly:
            name = info.orig_filename.encode()
            found = self.source.read_at(info.header_offset + _HEADER.size, len(name))
            if found != name or _HEADER.unpack(header)[1] != len(name):
                raise UnreadableFileError(f"a damaged file: its entry {info.filename} has two names")
        return info.header_offset + self._length_of_header(info, header)

    def _length_of_header(self, info: zipfile.ZipInfo, header: bytes) -> int:
        signature, name, padding = _HEADER.unpack(header)
        if signature != SIGNATURE:
            raise UnreadableFileError(f"a damaged file: its entry {info.filename} is not where it should be")
        if info.flag_bits & 0x1:
            raise UnreadableFileError(f"its entry {info.filename} is encrypted")
        return _HEADER.size + int(name) + int(padding)

    def _check(self, info: zipfile.ZipInfo, checksum: int) -> None:
        # 0 is what torch.serialization.set_crc32_options(False) leaves
        if checksum != info.CRC and (self._strictly or info.CRC != 0):
            raise UnreadableFileError(
                f"a damaged file: the checksum of its entry {info.filename} does not fit"
            )


class _CarefulFile(io.BufferedReader):
    """What `zipfile` reads the directory from: it would read as many bytes at once as the file claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise UnreadableFileError(
                f"a zip directory of {size:,} bytes; bncli reads up to {MAX_DIRECTORY:,}"
            )
        return super().read(size)
