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
import functools
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Mapping

from torch import nn

from bncli.config import ConvNetConfig
from bncli.config_file import config_from_dict
from bncli.errors import ConfigError
from bncli.foreign_code import (
    Factory,
    UnusableError,
    check_arguments,
    errors_of_others,
    find_foreign,
    nearest,
    running_foreign_code,
)
from bncli.models.convnet import build_model
from bncli.network_name import CONVNET, LIBRARIES, is_file
from bncli.torchvision_compat import import_torchvision

FORMS = "convnet, torchvision:NAME, timm:NAME, package.module:FACTORY or path/to/file.py:FACTORY"
# arguments that would fetch weights from the network, or load them from another file
_WEIGHTS = ("weights", "weights_backbone", "pretrained", "pretrained_backbone", "checkpoint_path")


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
        with running_foreign_code(name, seed):
            factory = _build_convnet if name == CONVNET else _find_factory(name, given)
            if num_classes is not None and _takes_num_classes(name, factory):
                given.setdefault("num_classes", num_classes)
            return _build_convnet(**given) if name == CONVNET else _call(factory, given)
    except UnusableError as error:
        raise ConfigError(f"model {name}", [str(error)]) from None


def check_network_name(name: str, arguments: Mapping[str, object] | None = None) -> None:
    """Raise ConfigError as `build_network` does for a wrong name or argument, before anything is made.

    The code that the name names is imported. How many classes there are need not be known yet.
    """
    if name == CONVNET:
        return
    given = dict(arguments or {})
    try:
        with running_foreign_code(name):
            factory = _find_factory(name, given)
            if _takes_num_classes(name, factory):
                given.setdefault("num_classes", 1)
            _check_arguments(factory, given)
    except UnusableError as error:
        raise ConfigError(f"model {name}", [str(error)]) from None


def _build_convnet(**arguments: object) -> nn.Module:
    sizes = {"num_classes": 10, "image_size": 32}
    for key, default in sizes.items():
        value = arguments.pop(key, default)
        if type(value) is not int or value < 1:
            raise UnusableError(f"{key}: expected a whole number of 1 or more, found {value!r}")
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
            raise UnusableError(f"{asked[0]}: the weights come from the checkpoint; leave it out")
        return _in_torchvision(rest, arguments) if kind == "torchvision" else _in_timm(rest)
    where, colon, attribute = name.rpartition(":")
    if not colon:
        raise UnusableError(_unknown(name))
    if not where or not attribute:
        raise UnusableError(f"expected {FORMS}")
    found = find_foreign(where, attribute)
    if isinstance(found, nn.Module):
        return lambda: copy.deepcopy(found)  # a network that is there already
    if not callable(found):
        raise UnusableError(f"{attribute} is of type {type(found).__name__}, neither a function nor a class")
    return found  # type: ignore[no-any-return]


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
    near = nearest(name, known) or nearest(f"torchvision:{name}", known)
    return f"no such network{near}; expected {FORMS}"


def _in_torchvision(name: str, arguments: dict[str, object]) -> Factory:
    models = import_torchvision().models
    known = models.list_models()
    if name not in known:
        raise UnusableError(f"torchvision has no such network{nearest(name, known)}")
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
        raise UnusableError('timm is not installed; pip install "bncli[timm]"')
    with errors_of_others("importing timm"):
        import_torchvision()  # timm imports it, and finds it broken beside a CPU-only torch
        timm = importlib.import_module("timm")
    if not timm.is_model(name):
        raise UnusableError(f"timm has no such network{nearest(name, timm.list_models())}")
    return functools.partial(timm.create_model, name, pretrained=False)


def _check_arguments(factory: Factory, arguments: dict[str, object]) -> None:
    check_arguments(factory, arguments, "--model-arg {}=VALUE", "model.arguments")


def _call(factory: Factory, arguments: dict[str, object]) -> nn.Module:
    _check_arguments(factory, arguments)
    with errors_of_others("making the network"):
        network = factory(**arguments)
    if not isinstance(network, nn.Module):
        raise UnusableError(f"what it made is of type {type(network).__name__}, not a torch.nn.Module")
    return network
