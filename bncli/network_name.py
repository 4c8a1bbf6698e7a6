"""What the name of a network says before anything of it is imported: see `bncli.models.named`."""

import os
from pathlib import Path

from bncli.builtin_configs import builtin_configs

CONVNET = "convnet"
LIBRARIES = ("torchvision", "timm")


def is_file(where: str) -> bool:
    """Whether what stands before the last colon of a name is a path, not a module."""
    return where.endswith(".py") or "/" in where


def with_whole_path(name: str, folder: Path) -> str:
    """The name with an absolute path where it has a path; a relative one begins at `folder`."""
    where, colon, maker = name.rpartition(":")
    if not colon or not is_file(where):
        return name
    path = os.path.normpath(folder.absolute() / os.path.expanduser(where))  # noqa: PTH111 (no error of a user who is not there)
    return f"{path}:{maker}"


def runs_foreign_code(name: str) -> bool:
    """Whether code is imported for a name that is none of bncli, torchvision or timm.

    The Python files beside the built-in configurations are bncli's.
    """
    where, _, _ = name.rpartition(":")
    if name == CONVNET or name.partition(":")[0] in LIBRARIES:
        return False
    return where not in {str(path.with_suffix(".py")) for path in builtin_configs().values()}


def is_same_name(name: str, recorded: str) -> bool:
    """Whether a name that the user gives means a recorded one; files may have moved since."""
    (where, _, maker), (former, _, former_maker) = (one.rpartition(":") for one in (name, recorded))
    if is_file(where) and is_file(former):
        return (Path(where).name, maker) == (Path(former).name, former_maker)
    return name == recorded


def is_inside(name: str, folder: Path) -> bool:
    """Whether the code of a name lies in a folder, as far as it is found from the current one."""
    where = name.rpartition(":")[0]
    code = Path(where) if is_file(where) else Path.cwd().joinpath(*where.split("."))
    return code.resolve().is_relative_to(folder.resolve())
