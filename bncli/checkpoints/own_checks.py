"""What the parts of a checkpoint must be, checked before anything is built from them."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bncli.errors import CheckpointError

MAX_IMAGE_SIZE = 512  # pixels, as in the configuration


def check_content(content: Mapping[str, Any], source: str) -> None:
    """Check type and range of every part but the configuration.

    Raises:
        CheckpointError: naming the first part that is wrong, and what it must be.
        KeyError: a part is missing.
    """
    norm = content["normalization"]
    claims = {
        "state_dict": ("tensors by name", _is_state_dict(content["state_dict"])),
        "normalization": (
            "mean and std of three channels, finite, std above 0",
            isinstance(norm, dict)
            and all(_are_three_numbers(norm.get(key)) for key in ("mean", "std"))
            and min(norm["std"]) > 0,
        ),
        "class_names": ("a list of different texts", _are_names(content["class_names"])),
        "image_size": (
            f"a whole number from 1 to {MAX_IMAGE_SIZE}",
            _is_count(content["image_size"]) and 1 <= content["image_size"] <= MAX_IMAGE_SIZE,
        ),
        "epoch": ("a whole number of 0 or more", _is_count(content["epoch"])),
        "step": ("a whole number of 0 or more", _is_count(content["step"])),
        "seconds": ("a number of 0 or more", _is_number(content["seconds"]) and content["seconds"] >= 0),
        "runtime": ("names and values", isinstance(content["runtime"], dict)),
        "machine": ("names and values", isinstance(content["machine"], dict)),
    }
    for key in ("test_accuracy", "best_accuracy"):
        claims[key] = ("a fraction from 0 to 1", content[key] is None or _is_fraction(content[key]))
    claims["test_loss"] = ("a number", content["test_loss"] is None or type(content["test_loss"]) is float)
    optimizer = content.get("optimizer")
    claims["optimizer"] = ("a state dict or nothing", optimizer is None or isinstance(optimizer, dict))
    averaging = content.get("averaging")
    claims["averaging"] = (
        "two state dicts, last and average, or nothing",
        averaging is None
        or (
            isinstance(averaging, dict)
            and set(averaging) == {"last", "average"}
            and all(map(_is_state_dict, averaging.values()))
        ),
    )
    layers = content.get("batch_norm_layers")
    claims["batch_norm_layers"] = ("names and values, or nothing", layers is None or isinstance(layers, dict))
    for key, (expected, holds) in claims.items():
        if not holds:
            found = repr(content[key])
            found = found if len(found) <= 60 else found[:57] + "..."
            raise CheckpointError(
                f"{source}: not a usable checkpoint: {key}: expected {expected}, found {found}"
            )


def check_tensors(found: Mapping[str, Tensor], skeleton: Mapping[str, Tensor], source: str) -> None:
    """Check that tensors are those of the network whose state dict, without numbers, is the skeleton.

    Raises:
        CheckpointError: one is missing, too many, or of another shape or type.
    """
    problem = None
    for name in dict.fromkeys([*skeleton, *found]):
        if name not in found:
            problem = f"{name} is missing"
        elif name not in skeleton:
            problem = f"{name} is unknown"
        elif skeleton[name].shape != found[name].shape or skeleton[name].dtype != found[name].dtype:
            expected, given = ([value.dtype, tuple(value.shape)] for value in (skeleton[name], found[name]))
            problem = f"{name}: expected {expected[0]} {expected[1]}, found {given[0]} {given[1]}"
        if problem:
            raise CheckpointError(f"{source}: its tensors do not fit its configuration: {problem}")


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items()
    )


def _is_number(value: Any) -> bool:
    return _is_count(value) or (type(value) is float and math.isfinite(value))


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_three_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value))


def _are_names(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return False
    return 0 < len(value) == len(set(value))
