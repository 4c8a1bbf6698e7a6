"""A whole pickled module (`torch.save(model)`), walked without its class.

A module's pickle is its `__dict__`: `_parameters`, `_buffers` and `_modules` by name, and the plain
attributes, of which BatchNorm's `momentum` and `eps` are of interest. TorchScript keeps tensors and
submodules as plain attributes, and momentum and eps in its code.
"""

from dataclasses import dataclass, field, replace
from math import isfinite

from bncli.batchnorm import Hyperparameters
from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.formats.inert_pickle import Inert
from bncli.checkpoints.stored_tensor import StoredTensor

MAX_NAME = 4096  # characters
MAX_NAMES = 2**26  # characters of all names: modules may hold each other, and so grow without bounds
MAX_HIDDEN = 100  # buffers of one module that its state dict leaves out
MAX_FEATURES = 2**24  # channels of one layer: what is computed for each must fit into memory


@dataclass
class PickledModule:
    """What a walk finds; names as `named_modules` and `state_dict` give them, a shared module once."""

    names: list[str] = field(default_factory=list)  # of all modules
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    hyperparameters: dict[str, Hyperparameters] = field(default_factory=dict)  # of BatchNorm layers
    instance_norms: set[str] = field(default_factory=set)  # they look like BatchNorm in a state dict
    uninitialised: list[str] = field(default_factory=list)  # BatchNorm layers that are lazy still
    num_characters: int = 0  # of all names so far

    def join(self, name: str, key: str) -> str:
        """The name of what a module calls `key`."""
        self.num_characters += len(name) + len(key) + 1
        if len(key) > MAX_NAME or self.num_characters > MAX_NAMES:
            raise UnreadableFileError("names without bounds")
        return f"{name}.{key}" if name else key


def is_module(value: object) -> bool:
    """Whether a pickled object is a module: only a module has `_modules`, or TorchScript's class names."""
    if not isinstance(value, Inert):
        return False
    return isinstance(value.attributes.get("_modules"), dict) or _is_script(value)


def is_uninitialised(value: object) -> bool:
    """Whether it is a buffer that a lazy layer has not made yet."""
    return (
        isinstance(value, Inert)
        and value.kind is not None
        and value.kind.path == "torch.nn.parameter.UninitializedBuffer"
    )


def read_module(root: Inert) -> PickledModule:
    """Walk a module and its submodules, in module order.

    Raises:
        UnreadableFileError: where names grow without bounds.
    """
    found = PickledModule()
    seen: set[int] = set()
    waiting: list[tuple[str, Inert]] = [("", root)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:  # shared, or a cycle
            continue
        seen.add(id(module))
        if len(name) > MAX_NAME:
            raise UnreadableFileError("modules that are nested without bounds")
        _read_one(found, name, module)
        children = [(found.join(name, key), child) for key, child in _children(module)]
        waiting.extend(reversed(children))
    return found


def _is_script(value: Inert) -> bool:
    return value.kind is not None and value.kind.module.startswith("__torch__")


def _children(module: Inert) -> list[tuple[str, Inert]]:
    held = module.attributes if _is_script(module) else module.attributes["_modules"]
    items = held.items() if isinstance(held, dict) else ()
    return [(str(key), child) for key, child in items if is_module(child) and isinstance(child, Inert)]


def _read_one(found: PickledModule, name: str, module: Inert) -> None:
    attributes = module.attributes
    found.names.append(name)
    class_name = module.kind.name if module.kind else ""
    if "InstanceNorm" in class_name:
        found.instance_norms.add(name)
    if _is_script(module):
        groups: tuple[object, ...] = (attributes,)
    else:
        groups = (attributes.get("_parameters"), attributes.get("_buffers"))
    hidden = attributes.get("_non_persistent_buffers_set")
    hidden = hidden if isinstance(hidden, list) and len(hidden) <= MAX_HIDDEN else []
    for group in groups:
        for key, value in group.items() if isinstance(group, dict) else ():
            if isinstance(value, StoredTensor) and key not in hidden:
                found.tensors[found.join(name, str(key))] = value
    buffers = attributes.get("_buffers")
    if class_name.startswith("LazyBatchNorm"):  # with its first batch it becomes a BatchNorm
        found.uninitialised.append(name or "the top")
    has_buffer = isinstance(buffers, dict) and "running_mean" in buffers
    if "InstanceNorm" not in class_name and (has_buffer or "BatchNorm" in class_name):
        known = checked_hyperparameters(
            attributes.get("num_features"), attributes.get("eps"), attributes.get("momentum", "missing")
        )
        if has_buffer and "Frozen" in class_name:
            known = _frozen(buffers, attributes.get("eps"))
        if known is not None:
            found.hyperparameters[name] = known


def _frozen(buffers: object, eps: object) -> Hyperparameters | None:
    """What a class such as FrozenBatchNorm2d tells: eps, and that it never updates its statistics."""
    mean = buffers.get("running_mean") if isinstance(buffers, dict) else None
    if not isinstance(mean, StoredTensor) or len(mean.shape) != 1:
        return None
    # a momentum that is allowed stands for the one that such a class does not have
    known = checked_hyperparameters(mean.shape[0], eps, None)
    return None if known is None else replace(known, is_frozen=True)


def checked_hyperparameters(num_features: object, eps: object, momentum: object) -> Hyperparameters | None:
    """Hyperparameters that a file claims, or None where they are none that BatchNorm could compute with."""
    if type(num_features) is not int or not 1 <= num_features <= MAX_FEATURES:
        return None
    if not _is_number(eps) or not _is_number(0.0 if momentum is None else momentum):
        return None
    eps, momentum = float(eps), None if momentum is None else float(momentum)  # type: ignore[arg-type]
    if eps < 0 or (momentum is not None and not 0 <= momentum <= 1):
        return None
    return Hyperparameters(num_features=num_features, eps=eps, momentum=momentum)


def _is_number(value: object) -> bool:
    if type(value) is int:
        return abs(value) < 2**53
    return type(value) is float and isfinite(value)
