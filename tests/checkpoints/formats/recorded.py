"""What every framework's files are compared with: the framework's own answers, recorded beside the files."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bncli.checkpoints import open_checkpoint
from bncli.errors import CheckpointError
from tests.frameworks.recorded import FILES, probe

LEAVES = ("running_mean", "running_var", "weight", "bias")


def files_of(framework: str) -> list[str]:
    """The files with recorded answers."""
    return list(answers_of(framework))


def answers_of(framework: str) -> dict[str, Any]:
    """What the framework says, by file."""
    return dict(json.loads((FILES / framework / "expected.json").read_text()))


def check_answers(framework: str, file: str) -> None:
    """Names and order, numbers to the bit, hyperparameters, eval-mode outputs, and what is said."""
    said = answers_of(framework)[file]
    with open_checkpoint(FILES / framework / file) as checkpoint:
        layers = {layer.name: layer for layer in checkpoint.layers() if layer.running_mean is not None}
        notes = checkpoint.notes
    assert list(layers) == [expected["name"] for expected in said["layers"]]
    for expected in said["layers"]:
        layer = layers[expected["name"]]
        assert layer.convention.framework == said["framework"]
        for leaf in LEAVES:
            found = getattr(layer, leaf)
            assert (None if found is None else found.double().tolist()) == expected[leaf], leaf
        assert layer.eps == (expected["eps"] if expected["eps_in_file"] else None)
        assert layer.hyperparameters_known == expected["momentum_in_file"]
        if expected["momentum_in_file"]:
            assert layer.momentum == pytest.approx(expected["momentum"], rel=1e-12, abs=1e-15)
        x = torch.from_numpy(probe(layer.num_features))
        arrays = [
            None if found is None else found.float() for found in (getattr(layer, leaf) for leaf in LEAVES)
        ]
        output = F.batch_norm(x, *arrays, training=False, eps=expected["eps"])
        np.testing.assert_allclose(output.numpy(), expected["output"], rtol=3e-6, atol=3e-6)
    for note in said["notes"]:
        assert any(note in found for found in notes), notes


def damaged(content: bytes, num_flipped: int, seed: int = 0) -> Iterator[bytes]:
    """The content cut off at every twentieth part, and with a few bytes replaced so many times."""
    for part in range(20):
        yield content[: len(content) * part // 20]
    random = Random(seed)
    for _ in range(num_flipped):
        data = bytearray(content)
        for _ in range(random.choice((1, 1, 2, 8))):
            data[random.randrange(len(data))] = random.choice((0, 1, 127, 128, 255, random.randrange(256)))
        yield bytes(data)


def survives(path: Path, content: bytes) -> bool:
    """Whether damaged content is read; where not, the reader says so in one line."""
    path.write_bytes(content)
    try:
        with open_checkpoint(path) as checkpoint:
            for layer in checkpoint.layers():
                assert layer.eps is None or math.isfinite(layer.eps)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return False
    return True
