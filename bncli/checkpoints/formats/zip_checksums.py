"""The CRC-32 of a zip archive's entries, where some bytes of them are replaced in a copy.

An entry's checksum stands in the archive's directory, and in the header before the entry or in the descriptor
behind it. `torch.load` does not look at them, but bncli, Python's zipfile and `unzip -t` do.
Reference: PKWARE's APPNOTE.TXT, 4.3.
"""

import struct
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

from bncli.checkpoints.byte_source import ByteSource, Patch, UnreadableFileError
from bncli.checkpoints.formats.torch_zip import ZipArchive
from bncli.checkpoints.stored_tensor import PIECE

_HEADER = struct.Struct("<6xH6xL12x")  # of an entry: flags, CRC-32
_IN_HEADER = 14  # bytes before the CRC-32
_DESCRIPTOR_FOLLOWS = 0x8  # flag: the header was written before the CRC-32 was known
_DESCRIPTOR = b"PK\x07\x08"  # which may be missing
_IN_DIRECTORY = 16
_ENTRY_OF_DIRECTORY = struct.Struct(
    "<4s12xL8xHHH12x"
)  # signature, CRC-32, lengths of name, extra and comment


def patch_checksums(source: ByteSource, patches: Sequence[Patch]) -> list[Patch]:
    """The patches of the checksums that `patches` of entries' content call for.

    `patches` are in the file's order and apart from each other, in entries that are not compressed.

    Raises:
        UnreadableFileError: when one of these entries is damaged, or entries share bytes.
    """
    archive = ZipArchive(source, strictly=False)
    infos = sorted(archive.infos, key=lambda info: info.header_offset)
    _check_apart(archive, infos)
    starts = [info.header_offset for info in infos]
    changed: dict[str, list[Patch]] = {}
    for patch in patches:
        info = infos[bisect_right(starts, patch.position) - 1]
        changed.setdefault(info.filename, []).append(patch)
    found: list[Patch] = []
    for info, place in _directory(archive):
        if info.filename in changed:
            found += _patch_one(archive, info, place, changed[info.filename])
    return found


def _check_apart(archive: ZipArchive, infos: list[zipfile.ZipInfo]) -> None:
    """Refuse entries that share bytes or a name: a change of one would change another."""
    apart = all(
        first.header_offset + _HEADER.size + first.compress_size <= second.header_offset
        for first, second in pairwise(infos)
    )
    if not apart or len(archive.entries) != len(infos):
        raise UnreadableFileError("a damaged file: entries that share bytes or a name")


def _directory(archive: ZipArchive) -> Iterator[tuple[zipfile.ZipInfo, int]]:
    """The entries, each with the position of what the archive's directory says of it."""
    place = archive.start_of_directory
    directory = archive.source.read_at(place, archive.source.size - place)
    offset = 0
    for info in archive.infos:
        signature, checksum, *lengths = _ENTRY_OF_DIRECTORY.unpack_from(directory, offset)
        if signature != b"PK\x01\x02" or checksum != info.CRC:
            raise UnreadableFileError("a damaged file: the zip archive's directory is not where it should be")
        yield info, place + offset
        offset += _ENTRY_OF_DIRECTORY.size + sum(lengths)


def _patch_one(
    archive: ZipArchive, info: zipfile.ZipInfo, place: int, patches: list[Patch]
) -> Iterator[Patch]:
    """The places of one entry's checksum, with the new one."""
    source, start = archive.source, archive.position(info)
    old, new = _checksums(source, start, info.file_size, patches)
    if info.compress_size != info.file_size or info.CRC not in (old, 0):
        raise UnreadableFileError(f"a damaged file: the checksum of its entry {info.filename} does not fit")
    if old != info.CRC:  # torch.serialization.set_crc32_options(False): there is none
        return
    before, after = old.to_bytes(4, "little"), new.to_bytes(4, "little")
    yield Patch(place + _IN_DIRECTORY, after)
    flags, in_header = _HEADER.unpack(source.read_at(info.header_offset, _HEADER.size))
    if in_header == old:
        yield Patch(info.header_offset + _IN_HEADER, after)
    if flags & _DESCRIPTOR_FOLLOWS:
        end = start + info.file_size
        descriptor = source.read_at(end, 8)
        if descriptor == _DESCRIPTOR + before:
            yield Patch(end + 4, after)
        elif descriptor[:4] == before:
            yield Patch(end, after)
        else:
            raise UnreadableFileError(
                f"a damaged file: what stands behind its entry {info.filename} is not its checksum"
            )


def _checksums(source: ByteSource, start: int, size: int, patches: list[Patch]) -> tuple[int, int]:
    """The CRC-32 of a run of bytes as it is, and as it is with the patches."""
    old = new = 0
    waiting = patches[::-1]
    for position in range(start, start + size, PIECE):
        piece = source.read_at(position, min(PIECE, start + size - position))
        old = zlib.crc32(piece, old)
        changed = bytearray(piece)
        while waiting and waiting[-1].position < position + len(piece):
            patch = waiting.pop()
            first = patch.position - position
            part = patch.data[: len(piece) - first]
            changed[first : first + len(part)] = part
            if len(part) < len(patch.data):  # the rest lies in the next piece
                waiting.append(Patch(patch.position + len(part), patch.data[len(part) :]))
        new = zlib.crc32(changed, new)
    return old, new
