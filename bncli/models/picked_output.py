"""One of several outputs of a network, named by a key, an attribute or a number."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from bncli.errors import BncliError
from bncli.wording import list_names, plural

LOGITS = "logits"


def pick_output(network: nn.Module, name: str | None = None, *, keep_helpers: bool = False) -> None:
    """Let the network return this output alone: see `find_output`.

    Without a name the output called logits, where there is one among several. So it is in transformers, and
    in train mode in torchvision's networks with auxiliary heads, which in eval mode return a single tensor.
    With `keep_helpers` a tuple stays whole without a name: training adds the losses of those heads.

    It is a hook, no module around the network: so the layers keep their names.
    """

    def pick(_: nn.Module, __: object, outputs: object) -> object:
        if name is not None:
            return find_output(outputs, name)
        if keep_helpers and isinstance(outputs, tuple):
            return outputs
        return _items(outputs).get(LOGITS, outputs)

    network.register_forward_hook(pick)


def find_output(outputs: object, name: str) -> object:
    """What a dict has under a key, a dataclass or a named tuple as an attribute, or any of them by number.

    Numbers count from 0, or from the end with a minus, in the order of the keys or fields. Dots go into what
    lies inside: `out.0`.

    Raises BncliError where there is nothing of that name.
    """
    found = _items(outputs)
    if name in found:
        return found[name]
    values = list(found.values())
    if _is_number(name) and -len(values) <= int(name) < len(values):
        return values[int(name)]
    first, dot, rest = name.partition(".")
    if dot and first and rest:
        return find_output(find_output(outputs, first), rest)
    raise BncliError(f"there is no output {name!r}; the network returns {describe_outputs(outputs)}")


def _items(outputs: object) -> dict[str, Any]:
    if isinstance(outputs, Mapping):
        return {str(key): value for key, value in outputs.items()}
    if isinstance(outputs, tuple | list):
        names = getattr(outputs, "_fields", range(len(outputs)))  # those of a named tuple
        return {str(key): value for key, value in zip(names, outputs, strict=True)}
    if is_dataclass(outputs):
        return {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    if isinstance(outputs, Tensor):
        return {}
    return {key: value for key, value in getattr(outputs, "__dict__", {}).items() if key[0] != "_"}


def _is_number(name: str) -> bool:
    digits = name.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 9


def describe_outputs(outputs: object) -> str:
    """What a network returned, with the names or numbers of what is in it."""
    kind = type(outputs).__name__
    article = "an" if kind[0].lower() in "aeiou" else "a"
    if isinstance(outputs, Tensor):
        return f"a single tensor of shape {tuple(outputs.shape)}"
    names = list(_items(outputs))
    if not names:
        return f"{article} {kind}"
    if isinstance(outputs, tuple | list) and not hasattr(outputs, "_fields"):
        return f"{article} {kind} of {plural(len(names), 'output')}: 0 to {len(names) - 1}"
    return f"{article} {kind} with {list_names(names)}"
