"""A local directory that holds one checkpoint in many files.

A link is followed where it stays inside the directory, or leads into `blobs` of the cache of a hub
(`models--X/snapshots/REVISION` is made of such links). All others are left out: a stranger's directory must
not make us read any other file.
"""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bncli.checkpoints.byte_source import MAX_READ, ByteSource, UnreadableFileError, open_source
from bncli.wording import plural

MAX_FILES = 500_000  # below a directory: one for each tensor in the formats that do so
MAX_LEVELS = 60


@dataclass(frozen=True)
class Folder:
    """The files below a directory; those that are opened stay open as long as the stack is."""

    path: Path
    stack: ExitStack

    @property
    def names(self) -> frozenset[str]:
        """All files, as `sub/file` with slashes on every system.

        Raises:
            UnreadableFileError: when it cannot be listed, or is far too large.
        """
        return self._found[0]

    @property
    def left_out(self) -> str:
        """Which links are not followed, to go behind a sentence; '' where there are none."""
        links = sorted(self._found[1])
        if not links:
            return ""
        listed = f"{plural(len(links), 'link')} in it not followed, such as {links[0][:100]}"
        return f"; {listed}, which leads elsewhere or nowhere"

    @cached_property
    def _found(self) -> tuple[frozenset[str], frozenset[str]]:
        """Files, and links that lead elsewhere."""
        found, elsewhere = set[str](), set[str]()
        levels = [("", 0)]
        while levels:
            place, level = levels.pop()
            try:
                entries = list(os.scandir(self.path / place))
            except OSError as error:
                raise UnreadableFileError(f"cannot be listed: {error.strerror or error}") from None
            for entry in entries:
                name = f"{place}/{entry.name}" if place else entry.name
                if entry.is_symlink():
                    (found if self._stays(entry) else elsewhere).add(name)
                elif entry.is_dir(follow_symlinks=False) and level < MAX_LEVELS:
                    levels.append((name, level + 1))
                elif entry.is_file(follow_symlinks=False):
                    found.add(name)
            if len(found) + len(elsewhere) + len(levels) > MAX_FILES:
                raise UnreadableFileError(f"a directory of more than {MAX_FILES:,} files")
        return frozenset(found), frozenset(elsewhere)

    def _stays(self, link: os.DirEntry[str]) -> bool:
        """Whether a link leads to a file in the directory, or to a blob of the cache that it is part of."""
        target = Path(os.path.realpath(link.path))
        return target.is_file() and any(target.is_relative_to(place) for place in self._places)

    @cached_property
    def _places(self) -> tuple[Path, ...]:
        own = Path(os.path.realpath(self.path))
        return (own, own.parent.parent / "blobs") if own.parent.name == "snapshots" else (own,)

    def open(self, name: str) -> ByteSource:
        """One of `names`.

        Raises:
            UnreadableFileError: when it is none of them.
        """
        self._check(name)
        return self.stack.enter_context(open_source(str(self.path / name)))

    def reopened(self, name: str) -> ByteSource:
        """One of `names`, which is open only while some of it is read: there may be very many.

        Raises:
            UnreadableFileError: when it is none of them.
        """
        self._check(name)
        with open_source(str(self.path / name)) as file:
            size = file.size
        return ByteSource(name, size, lambda start, count: self.read_at(name, start, count))

    def read(self, name: str, limit: int = MAX_READ) -> bytes:
        """The content of one of `names`, in memory.

        Raises:
            UnreadableFileError: when it is none of them, or larger than `limit` bytes.
        """
        self._check(name)
        with open_source(str(self.path / name)) as file:
            if file.size > limit:
                raise UnreadableFileError(f"its {name[:100]} has {file.size:,} bytes; bncli reads {limit:,}")
            return file.read_at(0, file.size)

    def read_at(self, name: str, start: int, size: int) -> bytes:
        """Some bytes of one of `names`, which is open only so long.

        Raises:
            UnreadableFileError: when it is none of them, or ends before that.
        """
        self._check(name)
        with open_source(str(self.path / name)) as file:
            return file.read_at(start, size)

    def _check(self, name: str) -> None:
        if name in self._found[1]:
            raise UnreadableFileError(f"its {name[:100]} is a link that leads elsewhere; bncli follows none")
        if name not in self.names:
            raise UnreadableFileError(f"there is no file {name[:100]} in the directory")
