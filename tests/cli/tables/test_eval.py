"""The short answer of `bncli eval` for networks that are not as usual."""

import pytest
import torch
from torch import nn

from bncli.cli.tables.eval import EvalReport, show_eval
from bncli.evaluation import examine

IMAGES = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
RUNTIME = {"device": "cpu", "precision": "float32", "memory_format": "contiguous", "threads": 1}


def answer(network: nn.Module, capsys: pytest.CaptureFixture[str]) -> list[str]:
    for _ in range(3):
        network(IMAGES)
    found = examine(network, (IMAGES, torch.arange(24) % 4), num_images=16)
    report = EvalReport(
        checkpoint="last.pt",
        epoch=1,
        network={},
        dataset="synthetic",
        class_names=tuple("abcd"),
        found=found,
        runtime=RUNTIME,
        machine={},
    )
    capsys.readouterr()
    show_eval(report, details=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 15
    assert max(map(len, lines)) <= 80
    return lines


def row(lines: list[str], mode: str) -> str:
    (found,) = (line for line in lines if line.startswith(f"{mode} mode"))
    return " ".join(found.split())


def test_where_train_mode_refuses_one_image_the_cell_is_empty_and_a_line_says_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    lines = answer(nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4)), capsys)
    assert lines[1] == "16 images, each alone and in batches of 2 to 16:"
    assert " - / " in row(lines, "train")
    assert " - / " not in row(lines, "eval")
    assert "refuses an image alone" in " ".join(lines)


def test_a_network_without_batch_norm_is_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    lines = answer(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), capsys)
    assert "The network has no BatchNorm layer." in lines
    assert row(lines, "train").startswith("train mode 0 of 16")


def test_what_is_no_rounding_is_not_called_so_though_no_prediction_changes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Scaled(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :4] * (1 + len(images) / 100)

    lines = answer(Scaled(), capsys)
    assert "rounding)" not in row(lines, "eval")
    text = " ".join(lines)
    assert "no prediction changes with its batch, but logits change by more than rounding" in text
    assert "The first layer whose output depends on the batch is (model)." in text


def test_equal_logits_are_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    class Corner(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :4].clone()

    lines = answer(Corner(), capsys)
    assert row(lines, "eval").startswith("eval mode 0 of 16 none")
