import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bncli.errors import DataError
from bncli.evaluation import Outcomes, PairedDifference, compare_outcomes, evaluate, measure_outcomes


def outcomes(right: list[bool], losses: list[float] | None = None) -> Outcomes:
    values = losses if losses is not None else [0.0] * len(right)
    return Outcomes(torch.tensor(right), torch.tensor(values, dtype=torch.float64))


def flips(gained: int, lost: int, same: int = 1000) -> PairedDifference:
    first = [False] * gained + [True] * lost + [True] * same
    second = [True] * gained + [False] * lost + [True] * same
    return compare_outcomes(outcomes(first), outcomes(second))


def exact_p_value(gained: int, lost: int) -> float:
    """McNemar's exact test: a fair coin for every image that changed, two-sided."""
    num, most = gained + lost, max(gained, lost)
    tail = sum(math.comb(num, k) for k in range(most, num + 1)) / 2**num
    return min(1.0, 2 * tail)


@pytest.fixture
def classifier() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()


def test_outcomes_are_each_images_own_loss_and_hit(classifier: nn.Module) -> None:
    images, labels = torch.randn(10, 3, 2, 2), torch.arange(10) % 4
    found = measure_outcomes(classifier, [(images[:7], labels[:7]), (images[7:], labels[7:])])
    with torch.no_grad():
        logits = classifier(images)
    torch.testing.assert_close(found.losses, F.cross_entropy(logits, labels, reduction="none").double())
    assert torch.equal(found.right, logits.argmax(1) == labels)


def test_their_score_is_that_of_evaluate(classifier: nn.Module) -> None:
    batches = [(torch.randn(n, 3, 2, 2), torch.randint(4, (n,))) for n in (5, 1, 9)]
    score = measure_outcomes(classifier, batches).score
    expected = evaluate(classifier, batches)
    assert score.accuracy == expected.accuracy
    assert score.loss == pytest.approx(expected.loss, rel=1e-12)


def test_measuring_computes_in_the_models_mode_and_leaves_the_buffers(classifier: nn.Module) -> None:
    batch = (torch.randn(16, 3, 2, 2), torch.zeros(16, dtype=torch.int64))
    classifier[3].p = 0.0
    plain = measure_outcomes(classifier, [batch]).losses
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    classifier.train()
    trained = measure_outcomes(classifier, [batch]).losses
    assert not torch.allclose(plain, trained)
    assert classifier.training
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())


def test_a_pass_ends_with_the_batch_that_reaches_the_number_of_images(classifier: nn.Module) -> None:
    batches = [(torch.randn(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64)) for _ in range(5)]
    seen: list[int] = []
    found = measure_outcomes(classifier, batches, num_images=8, progress=seen.append)
    assert len(found.right) == 8
    assert seen == [4, 8]
    assert len(measure_outcomes(classifier, batches, num_images=9).right) == 12


def test_no_images_are_refused(classifier: nn.Module) -> None:
    with pytest.raises(DataError, match="no images"):
        measure_outcomes(classifier, [])


def test_the_paired_difference_is_the_mean_of_the_differences_with_its_standard_error() -> None:
    torch.manual_seed(3)
    first = Outcomes(torch.rand(50) < 0.5, torch.rand(50).double())
    second = Outcomes(torch.rand(50) < 0.6, torch.rand(50).double())
    found = compare_outcomes(first, second)
    hits = second.right.double() - first.right.double()
    losses = second.losses - first.losses
    for values, mean, error in (
        (hits, found.accuracy, found.accuracy_standard_error),
        (losses, found.loss, found.loss_standard_error),
    ):
        expected = values.sum() / 50
        assert mean == pytest.approx(float(expected))
        variance = ((values - expected) ** 2).sum() / 49
        assert error == pytest.approx(float((variance / 50).sqrt()))
    assert found.num_gained == int((second.right & ~first.right).sum())
    assert found.num_lost == int((first.right & ~second.right).sum())
    assert found.accuracy == pytest.approx(second.score.accuracy - first.score.accuracy)


@pytest.mark.parametrize(("gained", "lost"), [(5, 0), (6, 0), (12, 4), (60, 40), (70, 40), (0, 9), (3, 3)])
def test_gain_and_loss_agree_with_the_exact_test(gained: int, lost: int) -> None:
    difference = flips(gained, lost)
    significant = exact_p_value(gained, lost) < 0.05
    assert difference.is_gain == (significant and gained > lost)
    assert difference.is_loss == (significant and lost > gained)


def test_the_same_outcomes_differ_by_nothing() -> None:
    difference = flips(0, 0)
    assert difference.accuracy == difference.accuracy_standard_error == 0
    assert not difference.is_gain
    assert not difference.is_loss


def test_outcomes_of_other_numbers_of_images_are_not_compared() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        compare_outcomes(outcomes([True]), outcomes([True, False]))


def test_a_single_image_has_no_standard_error() -> None:
    found: float = compare_outcomes(outcomes([True]), outcomes([False])).accuracy_standard_error
    assert math.isnan(found)


def test_scores_count_every_image_once() -> None:
    score = outcomes([True, False, True, True], [1.0, 2.0, 3.0, 6.0]).score
    assert (score.accuracy, score.loss) == (0.75, 3.0)
    assert isinstance(outcomes([True]).losses, Tensor)
