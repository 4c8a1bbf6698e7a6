"""Accuracy at chance with confident predictions is noticed; honest guessing is not."""

import pytest
import torch
from torch import Tensor, nn

from bncli.evaluation.evaluate import evaluate
from bncli.evaluation.examine import Examination


class Given(nn.Module):
    """Returns its input as logits."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits


def examined(logits: Tensor, labels: Tensor) -> Examination:
    evaluation = evaluate(Given(), (logits, labels))
    oracle = logits.double().softmax(1).amax(1).mean()
    assert evaluation.confidence == pytest.approx(float(oracle), rel=1e-5)
    return Examination(evaluation, (), None, (), (), None, None)  # type: ignore[arg-type]


def labels(num_images: int, num_classes: int) -> Tensor:
    return torch.arange(num_images) % num_classes


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_a_permuted_order_is_noticed_and_the_right_one_is_not(num_classes):
    truth = labels(400, num_classes)
    logits = 8 * torch.eye(num_classes)[truth]
    assert not examined(logits, truth).is_confident_at_chance
    assert examined(logits, (truth + 1) % num_classes).is_confident_at_chance


def test_a_part_of_the_classes_of_a_large_network_is_enough():
    truth = labels(60, 6)
    assert examined(12 * torch.eye(1000)[truth + 500], truth).is_confident_at_chance
    assert examined(12 * torch.eye(1000)[truth], truth).chance == pytest.approx(1 / 6)


@pytest.mark.parametrize("num_classes", [2, 10])
def test_a_network_that_guesses_and_says_so_is_not_noticed(num_classes):
    truth = labels(400, num_classes)
    noise = 0.3 * torch.randn(400, num_classes)
    assert not examined(noise, truth).is_confident_at_chance


def test_better_than_chance_is_not_noticed_however_sure():
    truth = labels(400, 10)
    guesses = torch.where(torch.arange(400) % 10 < 9, (truth + 1) % 10, truth)
    guesses[torch.arange(400) % 3 == 0] = truth[torch.arange(400) % 3 == 0]
    assert not examined(9 * torch.eye(10)[guesses], truth).is_confident_at_chance


def test_too_few_images_and_no_numbers_are_not_noticed():
    assert not examined(3 * torch.eye(2)[[0]], torch.tensor([1])).is_confident_at_chance
    assert not Examination(
        evaluate(Given(), (torch.full((50, 4), torch.nan), labels(50, 4))), (), None, (), (), None, None
    ).is_confident_at_chance
