"""Files that real frameworks wrote, with the frameworks' own answers: made by tests/frameworks/make_*.py."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bncli.batchnorm import LayerStats
from bncli.checkpoints import OpenCheckpoint, open_checkpoint

FILES = Path(__file__).parents[2] / "frameworks" / "files"


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
    arrays = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    mean, var, weight, bias = (None if array is None else array.to(torch.float64) for array in arrays)
    ours = F.batch_norm(rows(input_of(answer["shape"])).to(torch.float64), mean, var, weight, bias, eps=eps)
    rounding = torch.finfo(getattr(torch, answer.get("computes_in", "float32"))).eps
    torch.testing.assert_close(ours.to(torch.float32), theirs, rtol=8 * rounding, atol=16 * rounding)
