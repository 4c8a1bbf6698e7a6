"""Files that a framework wrote, compared with what the framework itself says of them."""

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bncli.batchnorm import LayerStats
from bncli.checkpoints import open_checkpoint
from bncli.errors import CheckpointError
from tests.frameworks.jax_answers import read_answers

FILES = Path(__file__).parents[2] / "frameworks" / "files"
MAX_SECONDS = 10  # for one damaged file; a hang would take for ever
AFFINE = ("weight", "bias")


def opened(path: Path) -> tuple[str, tuple[LayerStats, ...], tuple[str, ...]]:
    """The kind, the layers and the notes of a checkpoint."""
    with open_checkpoint(path) as checkpoint:
        return checkpoint.kind, checkpoint.layers(), checkpoint.notes


def answers(framework: str) -> dict[str, list[dict[str, Any]]]:
    return read_answers(FILES / framework)


def check_layers(layers: tuple[LayerStats, ...], expected: list[dict[str, Any]], relative: float = 0) -> None:
    """Every array equals the framework's own, to the bit where `relative` is 0, and so does what follows."""
    by_name = {layer.name: layer for layer in layers}
    assert sorted(by_name) == sorted(answer["name"] for answer in expected)
    for answer in expected:
        layer, arrays = by_name[answer["name"]], answer["arrays"]
        for what in ("running_mean", "running_var", *AFFINE):
            values = getattr(layer, what)
            assert (values is None) == (what not in arrays), (answer["name"], what)
            if values is not None:
                np.testing.assert_allclose(values.float().numpy(), arrays[what], rtol=relative, atol=0)
        if "input" in arrays:
            check_output(layer, answer)


def check_output(layer: LayerStats, answer: dict[str, Any]) -> None:
    """PyTorch's eval mode on what was read gives what the framework's gave, to float32 rounding."""
    given, expected = (torch.from_numpy(answer["arrays"][what].copy()) for what in ("input", "output"))
    assert layer.running_mean is not None and layer.running_var is not None
    tensors = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    mean, var, weight, bias = (None if tensor is None else tensor.float() for tensor in tensors)
    output = F.batch_norm(given, mean, var, weight, bias, eps=answer["eps"])
    scale = float(expected.abs().max())
    # the frameworks multiply in another order; bfloat16 has 8 bits
    tolerance = 2e-2 if layer.running_mean.dtype == torch.bfloat16 else 4e-6
    torch.testing.assert_close(output, expected, rtol=0, atol=tolerance * max(scale, 1.0))


def truncated(path: Path, target: Path) -> Iterator[Path]:
    """A file cut at every twentieth of its length."""
    data = path.read_bytes()
    for part in range(20):
        target.write_bytes(data[: len(data) * part // 20])
        yield target


def mutated(data: bytes, number: int) -> bytes:
    """Some bytes changed: bits, extremes, and runs."""
    generator = random.Random(number)
    changed = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 5))):
        place = generator.randrange(len(changed))
        changed[place] = generator.choice((0, 0x7F, 0x80, 0xFF, generator.randrange(256)))
    return bytes(changed)


def check_refused_or_read(path: Path) -> bool:
    """No other exception than ours, and in bounded time; whether it was refused."""
    start = time.monotonic()
    try:
        opened(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return True
    finally:
        assert time.monotonic() - start < MAX_SECONDS
    return False


def mutations(folder: Path, source: Path, count: int) -> int:
    """Read so many mutations of a file, or of the files in a directory; how many of them were refused."""
    refused = 0
    if source.is_file():
        data, target = source.read_bytes(), folder / source.name
        for number in range(count):
            target.write_bytes(mutated(data, number))
            refused += check_refused_or_read(target)
        return refused
    target = folder / source.name
    shutil.copytree(source, target)
    files = sorted(path for path in target.rglob("*") if path.is_file() and path.stat().st_size)
    for number in range(count):
        file = files[number % len(files)]
        data = file.read_bytes()
        file.write_bytes(mutated(data, number))
        refused += check_refused_or_read(target)
        file.write_bytes(data)
    return refused
