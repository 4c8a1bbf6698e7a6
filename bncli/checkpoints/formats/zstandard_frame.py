"""Data that zstd compressed, with a limit to what it may expand to."""

import importlib.util

from bncli.checkpoints.byte_source import ForeignFileError, UnreadableFileError

MAX_WINDOW = 2**26  # bytes that the decompressor may keep
_PIECE = 2**20


def decompress(data: bytes, limit: int) -> bytes:
    """The content of one frame.

    Raises:
        UnreadableFileError: on damage, on more than `limit` bytes, and where the library is not installed.
    """
    if importlib.util.find_spec("zstandard") is None:
        raise ForeignFileError('compressed by zstd; to read it: pip install "bncli[jax]"')
    import zstandard

    content = bytearray()
    try:
        machine = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        with machine.stream_reader(data) as stream:
            while len(content) <= limit:
                piece = stream.read(min(_PIECE, limit + 1 - len(content)))
                if not piece:
                    break
                content += piece
    except (zstandard.ZstdError, MemoryError):
        raise UnreadableFileError("a damaged file: what is compressed in it does not decompress") from None
    if len(content) > limit:
        raise UnreadableFileError(f"a damaged file: compressed data of more than {limit:,} bytes")
    return bytes(content)
