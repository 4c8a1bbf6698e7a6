"""Code of the user's that a name names, such as a network or a data set: found, imported and called.

    package.module:factory       a class or function that can be imported
    path/to/file.py:factory      the same in a file

It runs only because the user named it. Whatever goes wrong with it becomes one line that says where.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bncli.errors import BncliError
from bncli.network_name import is_file
from bncli.torchvision_compat import import_torchvision

MAX_NEAREST = 3

_OURS = str(Path(__file__).parent)

Factory = Callable[..., object]


class UnusableError(Exception):
    """What is wrong with a name, without the name, which whoever asked for it adds."""


@contextmanager
def running_foreign_code(name: str, seed: int = 0) -> Iterator[None]:
    """Let the code of a name be imported and called.

    Imports find what lies beside the user's file, and below the current folder behind all else. PyTorch's
    global random generator starts from `seed`, and is afterwards as it was. What is printed goes to stderr.
    """
    where = name.rpartition(":")[0]
    folder = str(Path(where).resolve().parent) if where and is_file(where) else None
    with _importable(folder), redirect_stdout(sys.stderr), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def find_foreign(where: str, attribute: str) -> Any:
    """What an attribute of a module or file is.

    Raises:
        UnusableError: there is no such module, file or attribute, or importing it raises.
    """
    # both, as in a program of the user's: torchvision may be beside a torch it was not built for
    with errors_of_others("importing it"):
        import_torchvision()
        module = _import_file(Path(where)) if is_file(where) else _import_module(where)
    return _attribute(module, where, attribute)


@contextmanager
def _importable(folder: str | None) -> Iterator[None]:
    """Let imports find what lies beside the user's file, and below the current folder behind all else.

    Behind all else, so that a file there never stands for a library.
    """
    before = sys.path.copy()
    sys.path[:] = ([folder] if folder else []) + before + [str(Path.cwd())]
    try:
        yield
    finally:
        sys.path[:] = before


def _import_file(path: Path) -> ModuleType:
    """Run a file as a module of a private name, which is no other module's."""
    if not path.is_file():
        near = nearest(path.name, [other.name for other in path.parent.glob("*.py")])
        raise UnusableError(f"there is no file {path}{near}")
    private = "_bncli_code_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(private, path)
    if spec is None or spec.loader is None:
        raise UnusableError(f"{path} is no Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[private] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[private]
        raise
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports one that is not
        raise UnusableError(
            f"there is no module {error.name}; looked where Python does and in {Path.cwd()}"
        ) from None


def _attribute(module: ModuleType, where: str, attribute: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            makers = [key for key, value in vars(found).items() if callable(value) and key[0] != "_"]
            raise UnusableError(f"{where} has no {attribute}{nearest(part, makers)}")
        found = getattr(found, part)
    return found


def check_arguments(factory: Factory, arguments: Mapping[str, object], option: str, section: str) -> None:
    """Say which arguments are missing and which are unknown, before anything is called.

    `option` gives one of them, as "--model-arg {}=VALUE" does; for training they are in `section`.

    Raises:
        UnusableError: some are.
    """
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # of some functions written in C; the call will tell
        return
    by_name = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    needed = [
        one.name
        for one in parameters
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    missing = [key for key in needed if key not in arguments]
    if missing:
        values = " ".join(option.format(key) for key in missing)
        to_train = f" (train: --set {section}.{missing[0]}=VALUE)" if not option.startswith("--set") else ""
        raise UnusableError(f"it needs {' and '.join(missing)}: {values}{to_train}")
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return
    for key in arguments:
        if key not in by_name:
            takes = f"; it takes {', '.join(by_name)}" if by_name else "; it takes none"
            raise UnusableError(f"it has no argument {key}{nearest(key, by_name) or takes}")


@contextmanager
def errors_of_others(doing: str) -> Iterator[None]:
    """Turn whatever foreign code raises into one line that says where."""
    try:
        yield
    except (UnusableError, BncliError):
        raise
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        frames = traceback.extract_tb(error.__traceback__)
        here = [
            frame
            for frame in frames
            if not frame.filename.startswith(_OURS) and "importlib" not in frame.filename
        ]
        where = f" ({here[-1].filename}, line {here[-1].lineno})" if here else ""
        what = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise UnusableError(f"{doing} failed: {what[:400]}{where}") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """`; the nearest: a, b` where there are names like this one."""
    near = difflib.get_close_matches(name, list(known), n=MAX_NEAREST, cutoff=0.6)
    return f"; the nearest: {', '.join(near)}" if near else ""
