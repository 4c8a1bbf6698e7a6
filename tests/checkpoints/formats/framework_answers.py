"""Files that real frameworks wrote, compared with the frameworks' own answers.

Scripts in tests/frameworks made both. What they recorded has three forms: `expected.json` (recorded.py),
arrays in `answers.f32` (jax_answers.py), and archives of Keras (keras_corpus.py).
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bncli.batchnorm import LayerStats
from bncli.checkpoints import OpenCheckpoint, open_checkpoint
from tests.frameworks.jax_answers import read_answers
from tests.frameworks.recorded import FILES, probe

LEAVES = ("running_mean", "running_var", "weight", "bias")


def opened(path: Path) -> tuple[str, tuple[LayerStats, ...], tuple[str, ...]]:
    """The kind, the layers and the notes of a checkpoint."""
    with open_checkpoint(path) as checkpoint:
        return checkpoint.kind, checkpoint.layers(), checkpoint.notes


def in_eval_mode(layer: LayerStats, x: Tensor, eps: float) -> Tensor:
    """PyTorch's eval mode on what was read, for an input (N, C), in its type."""
    arrays = (getattr(layer, leaf) for leaf in LEAVES)
    mean, var, weight, bias = (None if array is None else array.to(x.dtype) for array in arrays)
    return F.batch_norm(x, mean, var, weight, bias, eps=eps)


# ---- expected.json


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
        output = in_eval_mode(layer, torch.from_numpy(probe(layer.num_features)), expected["eps"])
        np.testing.assert_allclose(output.numpy(), expected["output"], rtol=3e-6, atol=3e-6)
    for note in said["notes"]:
        assert any(note in found for found in notes), notes


# ---- answers.f32 of JAX


def answers(framework: str) -> dict[str, list[dict[str, Any]]]:
    return read_answers(FILES / framework)


def check_layers(layers: tuple[LayerStats, ...], expected: list[dict[str, Any]], relative: float = 0) -> None:
    """Every array equals the framework's own, to the bit where `relative` is 0, and so does what follows."""
    by_name = {layer.name: layer for layer in layers}
    assert sorted(by_name) == sorted(answer["name"] for answer in expected)
    for answer in expected:
        layer, arrays = by_name[answer["name"]], answer["arrays"]
        for what in LEAVES:
            values = getattr(layer, what)
            assert (values is None) == (what not in arrays), (answer["name"], what)
            if values is not None:
                np.testing.assert_allclose(values.float().numpy(), arrays[what], rtol=relative, atol=0)
        if "input" in arrays:
            _check_output(layer, answer)


def _check_output(layer: LayerStats, answer: dict[str, Any]) -> None:
    """PyTorch's eval mode on what was read gives what the framework's gave, to float32 rounding."""
    given, expected = (torch.from_numpy(answer["arrays"][what].copy()) for what in ("input", "output"))
    assert layer.running_mean is not None
    output = in_eval_mode(layer, given, answer["eps"])
    scale = float(expected.abs().max())
    # the frameworks multiply in another order; bfloat16 has 8 bits
    tolerance = 2e-2 if layer.running_mean.dtype == torch.bfloat16 else 4e-6
    torch.testing.assert_close(output, expected, rtol=0, atol=tolerance * max(scale, 1.0))


# ---- archives of Keras


@dataclass(frozen=True)
class Corpus:
    """The files of one framework, unpacked."""

    folder: Path
    nets: dict[str, list[dict[str, Any]]]
    files: dict[str, dict[str, Any]]

    def answers(self, name: str) -> list[dict[str, Any]]:
        """What the framework says of each layer in a file."""
        told = self.files[name]
        layers = self.nets[told["net"]]
        return [layer for layer in layers if layer["name"] in told.get("only", [layer["name"]])]

    def open(self, name: str) -> tuple[OpenCheckpoint, tuple[LayerStats, ...]]:
        with open_checkpoint(self.folder / name) as checkpoint:
            return checkpoint, checkpoint.layers()


def unpack(name: str, folder: Path) -> Corpus:
    with zipfile.ZipFile(FILES / name / "files.zip") as archive:
        archive.extractall(folder)
    answers = json.loads((FILES / name / "answers.json").read_text())
    return Corpus(folder, answers["nets"], answers["files"])


def file_names(name: str) -> list[str]:
    """Those with answers, for parametrize."""
    return list(json.loads((FILES / name / "answers.json").read_text())["files"])


def pair(
    layers: tuple[LayerStats, ...], answers: list[dict[str, Any]]
) -> list[tuple[LayerStats, dict[str, Any]]]:
    """Each answer with the layer of the same mean, whatever the order and the names; all must be there."""
    assert len(layers) == len(answers)
    pairs = []
    for answer in answers:
        mean = torch.tensor(answer["moving_mean"])
        same = [
            layer
            for layer in layers
            if layer.num_features == len(mean) and torch.equal(numbers(layer.running_mean), mean)
        ]
        assert len(same) == 1, answer["name"]
        pairs.append((same[0], answer))
    return pairs


def numbers(tensor: Tensor | None) -> Tensor:
    """As float32."""
    assert tensor is not None
    return tensor.to(torch.float32)


def check_values(layer: LayerStats, answer: dict[str, Any]) -> None:
    """Bit for bit what the framework has, and its eval mode computed again."""
    for leaf, ours in (
        ("gamma", layer.weight), ("beta", layer.bias),
        ("moving_mean", layer.running_mean), ("moving_variance", layer.running_var),
    ):  # fmt: skip
        if leaf in answer:
            assert torch.equal(numbers(ours), torch.tensor(answer[leaf])), (answer["name"], leaf)
        else:
            assert ours is None, (answer["name"], leaf)


def input_of(shape: list[int]) -> Tensor:
    """What the script gave to each layer."""
    count = torch.tensor(shape).prod()
    return ((torch.arange(int(count)) * 7 % 23 - 9) / 4).to(torch.float32).reshape(shape)


def check_output(layer: LayerStats, answer: dict[str, Any], eps: float) -> None:
    """That PyTorch's batch norm on what was read gives what the framework gave."""
    axes = [axis % len(answer["shape"]) for axis in answer["axis"]]
    others = [axis for axis in range(len(answer["shape"])) if axis not in axes]

    def rows(x: Tensor) -> Tensor:
        return x.permute(*others, *axes).reshape(-1, layer.num_features)

    theirs = rows(torch.tensor(answer["output"]).reshape(answer["shape"]))
    ours = in_eval_mode(layer, rows(input_of(answer["shape"])).to(torch.float64), eps)
    rounding = torch.finfo(getattr(torch, answer.get("computes_in", "float32"))).eps
    torch.testing.assert_close(ours.to(torch.float32), theirs, rtol=8 * rounding, atol=16 * rounding)
