"""From a recorded configuration to the data section that is loaded, and what is said about the rest."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bncli.errors import DataError

if TYPE_CHECKING:
    from bncli.config import DataConfig
    from bncli.data import Progress
    from bncli.data.recorded_root import DataRecord
    from bncli.recorded_config import FollowedConfig

_SHOWN = 200  # characters of a path or an address


@dataclass(frozen=True)
class Unfollowed:
    """The places that a file names and that are not followed; false where there are none."""

    root: str | None  # with the reason
    others: tuple[str, ...]
    cache: str | None

    def __bool__(self) -> bool:
        """Whether there is anything to say."""
        return bool(self.root or self.others or self.cache)

    @property
    def matters(self) -> bool:
        """Whether there is where data were found all the same."""
        return bool(self.root or self.cache)

    def of(self, path: Path) -> str:
        """One sentence, which names the file."""
        named = ", ".join([*filter(None, [self.root]), *self.others, *filter(None, [self.cache])])
        return (
            f"{path} names {named}: not followed, as a file may come from anybody; --set KEY=... follows it"
        )


def followed_data(
    followed: "FollowedConfig", record: "Callable[[], DataRecord]", progress: "Progress | None"
) -> "tuple[DataConfig, Unfollowed]":
    """The data section to load, and what is not followed of the recorded one.

    `record` gives the digest and the classes that the checkpoint records; it is asked where they are needed.
    """
    from bncli.data.recorded_root import check_recorded_root

    data, root, reason = followed.config.data, followed.recorded_root, None
    if root is not None:
        there = data.model_copy(update={"root": root})  # with the cache that is the user's own
        try:
            check_recorded_root(there, record, progress)
            data = there
        except DataError as error:
            reason = f"data.root={_shown(root)} ({error})"
    others = dict(followed.unfollowed_places())
    cache = others.pop("data.cache", None)
    return data, Unfollowed(
        reason,
        tuple(f"{key}={_shown(value)}" for key, value in others.items()),
        None if cache is None else f"data.cache={_shown(cache)}",
    )


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
