"""A network by its name: ours, torchvision's, timm's, or what a function of the user's own returns.

    convnet                      ours; its arguments are the keys of `model:`, and num_classes, image_size
    torchvision:resnet18         any name of torchvision.models.list_models()
    timm:mobilenetv3_small_100   any name of timm.list_models(), where timm is installed
    package.module:factory       a class or function that can be imported
    path/to/file.py:factory      the same in a file

Nothing is downloaded, and the only foreign code that runs is what the name names. A name must therefore come
from the user, never from a checkpoint.
"""

import copy
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bncli.config import ConvNetConfig
from bncli.config_file import config_from_dict
from bncli.errors import BncliError, ConfigError
from bncli.models.convnet import build_model
from bncli.network_name import CONVNET, LIBRARIES, is_file
from bncli.torchvision_compat import import_torchvision

FORMS = "convnet, torchvision:NAME, timm:NAME, package.module:FACTORY or path/to/file.py:FACTORY"
MAX_NEAREST = 3
# arguments that would fetch weights from the network, or load them from another file
_WEIGHTS = ("weights", "weights_backbone", "pretrained", "pretrained_backbone", "checkpoint_path")

Factory = Callable[..., object]


class _UnusableError(Exception):
    """What is wrong with a name, without the name, which `build_network` adds."""


def build_network(
    name: str,
    arguments: Mapping[str, object] | None = None,
    *,
    seed: int = 0,
    num_classes: int | None = None,
) -> nn.Module:
    """The network that a name and its arguments mean, on the CPU, with weights drawn from `seed`.

    `num_classes` is given to networks that take it, where the arguments do not say it. PyTorch's global
    random generator is left as it was. What the user's own code prints goes to stderr.

    Raises:
        ConfigError: there is no such network, it needs other arguments, or what makes it raises or makes no
            `nn.Module`.
    """
    given = dict(arguments or {})
    try:
        with _importable(_folder_of(name)), redirect_stdout(sys.stderr), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            factory = _build_convnet if name == CONVNET else _find_factory(name, given)
            if num_classes is not None and _takes_num_classes(name, factory):
                given.setdefault("num_classes", num_classes)
            return _build_convnet(**given) if name == CONVNET else _call(factory, given)
    except _UnusableError as error:
        raise ConfigError(f"model {name}", [str(error)]) from None


def _build_convnet(**arguments: object) -> nn.Module:
    sizes = {"num_classes": 10, "image_size": 32}
    for key, default in sizes.items():
        value = arguments.pop(key, default)
        if type(value) is not int or value < 1:
            raise _UnusableError(f"{key}: expected a whole number of 1 or more, found {value!r}")
        sizes[key] = value
    config = config_from_dict({"model": arguments | {"name": CONVNET}}, source=f"model {CONVNET}").model
    assert isinstance(config, ConvNetConfig)
    return build_model(config, sizes["num_classes"], image_size=sizes["image_size"])


def _find_factory(name: str, arguments: dict[str, object]) -> Factory:
    """What makes the network of a name; the arguments are looked at, and torchvision's completed."""
    kind, colon, rest = name.partition(":")
    if kind in LIBRARIES and colon:
        asked = [key for key in _WEIGHTS if arguments.get(key) not in (None, False, "")]
        if asked:
            raise _UnusableError(f"{asked[0]}: the weights come from the checkpoint; leave it out")
        return _in_torchvision(rest, arguments) if kind == "torchvision" else _in_timm(rest)
    where, colon, attribute = name.rpartition(":")
    if not colon:
        raise _UnusableError(_unknown(name))
    if not where or not attribute:
        raise _UnusableError(f"expected {FORMS}")
    # both, as in a program of the user's: torchvision may be beside a torch it was not built for
    with _errors_of_others("importing it"):
        import_torchvision()
        module = _import_file(Path(where)) if is_file(where) else _import_module(where)
    return _attribute(module, where, attribute)


def _takes_num_classes(name: str, factory: Factory) -> bool:
    if name == CONVNET or name.partition(":")[0] in LIBRARIES:
        return True  # those of libraries take it by way of **kwargs
    try:
        return "num_classes" in inspect.signature(factory).parameters
    except (TypeError, ValueError):  # of some functions written in C
        return False


def _unknown(name: str) -> str:
    """What a name without a colon may have meant."""
    if is_file(name):
        return f"which function or class makes the network? Name it: {name}:FACTORY"
    known = [CONVNET, *(f"torchvision:{one}" for one in import_torchvision().models.list_models())]
    near = _nearest(name, known) or _nearest(f"torchvision:{name}", known)
    return f"no such network{near}; expected {FORMS}"


def _in_torchvision(name: str, arguments: dict[str, object]) -> Factory:
    models = import_torchvision().models
    known = models.list_models()
    if name not in known:
        raise _UnusableError(f"torchvision has no such network{_nearest(name, known)}")
    builder = models.get_model_builder(name)
    # the weights of a backbone are fetched by default, unlike those of a network
    for key in ("weights", "weights_backbone"):
        if key in inspect.signature(builder).parameters:
            arguments[key] = None
    return functools.partial(_quietly, builder)


def _quietly(builder: Factory, **arguments: object) -> object:
    with warnings.catch_warnings():
        # googlenet and inception_v3 announce another initialisation, which a checkpoint makes irrelevant
        warnings.simplefilter("ignore", FutureWarning)
        return builder(**arguments)


def _in_timm(name: str) -> Factory:
    if importlib.util.find_spec("timm") is None:
        raise _UnusableError('timm is not installed; pip install "bncli[timm]"')
    with _errors_of_others("importing timm"):
        import_torchvision()  # timm imports it, and finds it broken beside a CPU-only torch
        timm = importlib.import_module("timm")
    if not timm.is_model(name):
        raise _UnusableError(f"timm has no such network{_nearest(name, timm.list_models())}")
    return functools.partial(timm.create_model, name, pretrained=False)


def _folder_of(name: str) -> str | None:
    """The folder of the file that a name names; None for the other names."""
    where = name.rpartition(":")[0]
    return str(Path(where).resolve().parent) if where and is_file(where) else None


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
        near = _nearest(path.name, [other.name for other in path.parent.glob("*.py")])
        raise _UnusableError(f"there is no file {path}{near}")
    private = "_bncli_network_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(private, path)
    if spec is None or spec.loader is None:
        raise _UnusableError(f"{path} is no Python file (its name must end in .py)")
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
        raise _UnusableError(
            f"there is no module {error.name}; looked where Python does and in {Path.cwd()}"
        ) from None


def _attribute(module: ModuleType, where: str, attribute: str) -> Factory:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            makers = [key for key, value in vars(found).items() if callable(value) and key[0] != "_"]
            raise _UnusableError(f"{where} has no {attribute}{_nearest(part, makers)}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return lambda: copy.deepcopy(found)  # a network that is there already
    if not callable(found):
        raise _UnusableError(f"{attribute} is of type {type(found).__name__}, neither a function nor a class")
    return found  # type: ignore[no-any-return]


def _call(factory: Factory, arguments: dict[str, object]) -> nn.Module:
    _check_arguments(factory, arguments)
    with _errors_of_others("making the network"):
        network = factory(**arguments)
    if not isinstance(network, nn.Module):
        raise _UnusableError(f"what it made is of type {type(network).__name__}, not a torch.nn.Module")
    return network


def _check_arguments(factory: Factory, arguments: Mapping[str, object]) -> None:
    """Say which arguments are missing and which are unknown, before anything is called."""
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
        values = " ".join(f"--model-arg {key}=VALUE" for key in missing)
        raise _UnusableError(
            f"it needs {' and '.join(missing)}: {values} (in a configuration: model.arguments)"
        )
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return
    for key in arguments:
        if key not in by_name:
            takes = f"; it takes {', '.join(by_name)}" if by_name else "; it takes none"
            raise _UnusableError(f"it has no argument {key}{_nearest(key, by_name) or takes}")


@contextmanager
def _errors_of_others(doing: str) -> Iterator[None]:
    """Turn whatever foreign code raises into one line that says where."""
    try:
        yield
    except (_UnusableError, BncliError):
        raise
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        frames = traceback.extract_tb(error.__traceback__)
        here = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
        where = f" ({here[-1].filename}, line {here[-1].lineno})" if here else ""
        what = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise _UnusableError(f"{doing} failed: {what[:400]}{where}") from None


def _nearest(name: str, known: Iterable[str]) -> str:
    """`; the nearest: a, b` where there are names like this one."""
    near = difflib.get_close_matches(name, list(known), n=MAX_NEAREST, cutoff=0.6)
    return f"; the nearest: {', '.join(near)}" if near else ""
