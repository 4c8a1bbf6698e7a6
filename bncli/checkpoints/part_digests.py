"""SHA-256 of every part of a checkpoint, so that a flipped bit is found and the part is named.

One digest for each tensor, by its dotted place in the checkpoint, and one over everything else. They cover
what `torch.load` returns: type, shape, dtype and bits of tensors, keys, values and their order. Bytes of the
zip container that change nothing of that, such as timestamps, padding and checksums, are not covered.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bncli.batchnorm.bits import as_bytes

PLAIN_VALUES = "plain values"  # the name of everything that is no tensor


def digest_parts(content: Mapping[str, Any]) -> dict[str, str]:
    """Hexadecimal digests by the name of the part, in the order of the content.

    Raises:
        ValueError: on a tensor that no checkpoint of bncli holds, such as a sparse one.
    """
    digests: dict[str, str] = {}
    plain = hashlib.sha256()
    for name, value in _leaves(content, ""):
        if isinstance(value, Tensor):
            digests[name] = _tensor_digest(name, value)
        # repr tells 1 from 1.0 and from True, and quotes, so that no value imitates another line
        text = "" if isinstance(value, Tensor) else repr(value)
        plain.update(f"{name!r} {type(value).__name__} {text}\n".encode(errors="surrogatepass"))
    return {PLAIN_VALUES: plain.hexdigest(), **digests}


def file_sha256(path: str | Path) -> str:
    """The digest of a file's bytes, hexadecimal. Raises OSError when it cannot be read."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(content: Mapping[str, Any], digests: Mapping[str, str]) -> tuple[str, ...]:
    """The parts whose digests are not those that were stored; parts missing or too many count too."""
    found = digest_parts(content)
    return tuple(name for name in found | dict(digests) if found.get(name) != digests.get(name))


def tensors_of(content: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint with its dotted name."""
    return ((name, value) for name, value in _leaves(content, "") if isinstance(value, Tensor))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All values that hold no others, in order, each with its dotted name; containers tell their type."""
    if isinstance(value, Mapping):
        yield name, f"{type(value).__name__} of {len(value)}"
        for key, item in value.items():
            # a key that is no text, such as the optimiser's numbers, is told apart from its text
            yield from _leaves(item, f"{name}.{key if isinstance(key, str) else repr(key)}".lstrip("."))
            yield name, key
    elif isinstance(value, list | tuple):
        yield name, f"{type(value).__name__} of {len(value)}"
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}.{index}")
    else:
        yield name, value


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has its numbers in its own memory: not sparse, quantized or repeating its storage."""
    dense = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type != "meta"
    # one that repeats its storage could pretend to be of any size
    return dense and tensor.nbytes <= tensor.untyped_storage().nbytes()


def _tensor_digest(name: str, tensor: Tensor) -> str:
    if not is_plain(tensor):
        raise ValueError(f"{name} is no plain tensor")
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(as_bytes(tensor.detach().cpu()).numpy().data)
    return digest.hexdigest()
