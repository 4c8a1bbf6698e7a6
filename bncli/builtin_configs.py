"""The built-in configurations: files of configs/ that have a name, such as `cifar10`, wherever bncli is used.

In an installed wheel they lie inside the package, in a source checkout beside it. Each file opens with
comments that say what it is for (`# What:`), how long it takes (`# Time:`), how to launch it and what to
change.
"""

import difflib
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

from bncli.errors import ConfigError

DEFAULT_NAME = "quickstart"  # its values are the defaults of all keys

_PACKAGE = Path(__file__).parent


def builtin_configs() -> dict[str, Path]:
    """The file of every built-in configuration by name, in alphabetical order."""
    installed = _PACKAGE / "builtin_configs"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config_file(name: str | Path) -> Path:
    """The file that a name or a path stands for.

    A name has no suffix and no slash. A file of that name in the current directory goes before the built-in
    configuration; a directory does not. Everything else is a path.

    Raises:
        ConfigError: there is neither such a file nor such a built-in configuration; says which there are.
    """
    path, known = Path(name), builtin_configs()
    if path.is_file():
        return path
    if str(name) in known:
        return known[str(name)]
    if path.exists():  # a directory, or a pipe: reading it says so
        return path
    if path.stem in known:
        raise ConfigError(str(name), [f"no such file; the built-in configuration is called {path.stem}"])
    if path.suffix or path.name != str(name):
        raise ConfigError(str(name), ["no such file"])
    raise ConfigError(str(name), [f"no such file or built-in configuration; {nearest(str(name), known)}"])


def nearest(name: str, known: Iterable[str]) -> str:
    """What an unknown name may have meant, and which built-in configurations there are."""
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}built-in: {', '.join(builtin_configs())}"


def header_of(text: str) -> list[str]:
    """The comment lines that a configuration file opens with, each as it stands there."""
    return [line.rstrip() for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]


def describe_builtin_config(path: Path) -> dict[str, str]:
    """What the header of a built-in configuration says: `what`, `time`, `launch` and `change`."""
    fields = (line.removeprefix("# ").partition(": ") for line in header_of(path.read_text(encoding="utf-8")))
    return {name.lower(): text for name, _, text in fields}
