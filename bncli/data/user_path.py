"""A path as a configuration writes it: `~` is the home directory."""

from pathlib import Path

from bncli.errors import DataError


def user_path(text: str, key: str) -> Path:
    """Return the path; `key`, such as data.root, names it in errors.

    Raises:
        DataError: it names the home of a user who does not exist, or no path at all.
    """
    if "\0" in text:
        raise DataError(f"{key}: {text!r} is not a path")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise DataError(f"{key}: {text!r}: there is no such home directory; write the path out") from None
