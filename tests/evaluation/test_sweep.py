import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bncli.batchnorm.modes import buffers_digest
from bncli.determinism import FixedShape
from bncli.errors import DataError
from bncli.evaluation import sweep_batch_sizes
from bncli.evaluation.sweep import Hits, wilson_interval


def trained_net(guest: nn.Module | None = None) -> nn.Sequential:
    """Ready for images (N, 3, 8, 8), with a guest between its layers who did not see the training."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Identity(), *head)
    for _ in range(5):
        net(torch.randn(32, 3, 8, 8) + 0.5)
    if guest is not None:
        net[3] = guest
    return net


def test_accuracies_are_those_of_eval_mode_and_of_pytorchs_own_batch_norm() -> None:
    """The oracle: the same order and batches by hand, in eval and in train mode (there is no dropout)."""
    net, images, labels = trained_net(), torch.randn(50, 3, 8, 8), torch.randint(0, 4, (50,))
    points = sweep_batch_sizes(net, (images, labels), (7, 1, 16), seed=3)
    assert [point.batch_size for point in points] == [1, 7, 16]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3)).tolist()
    for point in points:
        size, right = point.batch_size, {True: 0, False: 0}
        for start in range(0, 50, size):
            batch = (order + order)[start : start + size]  # the last one is filled up from the start
            real = min(size, 50 - start)
            for training in (True, False):
                twin = copy.deepcopy(net).train(training)
                with torch.no_grad():
                    hits = twin(images[batch]).argmax(1) == labels[batch]
                right[training] += int(hits[:real].sum())
        assert point.eval_accuracy == right[False] / 50
        assert point.batch_statistics_accuracy == right[True] / 50
        for accuracy, interval in (
            (point.eval_accuracy, point.eval_interval),
            (point.batch_statistics_accuracy, point.batch_statistics_interval),
        ):
            assert interval[0] < accuracy < interval[1]


def test_dropout_stays_off_and_only_batch_norm_leaves_eval_mode() -> None:
    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return x

    net = nn.Sequential(nn.Dropout(0.9), trained_net(Watch()))
    images, labels = torch.randn(20, 3, 8, 8), torch.randint(0, 4, (20,))
    first = sweep_batch_sizes(net, (images, labels), (4,))
    assert sweep_batch_sizes(net, (images, labels), (4,)) == first


def test_a_data_set_sorted_by_class_is_shuffled() -> None:
    """Batches of one class each would have statistics of their own, and the network would know nothing."""

    class Centered(nn.Module):
        """Class 1 is bright, class 0 dark: visible only beside the other."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([torch.zeros(len(x), 1), self.norm(x)], 1)

    labels = torch.arange(64) // 32
    point = sweep_batch_sizes(Centered(), (labels[:, None].float(), labels), (32,))[0]
    assert point.batch_statistics_accuracy == 1


def test_where_batch_norm_refuses_a_single_value_there_is_no_accuracy() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4))
    points = sweep_batch_sizes(net, (torch.randn(9, 3, 2, 2), torch.randint(0, 4, (9,))), (1, 2))
    assert points[0].batch_statistics_accuracy is None
    assert points[0].batch_statistics_interval is None
    assert points[1].batch_statistics_accuracy is not None

    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        sweep_batch_sizes(Refuses(), (torch.randn(9, 3), torch.zeros(9)), (1,))


def test_of_a_fixed_shape_the_module_inside_gets_batch_statistics() -> None:
    net, images, labels = trained_net(), torch.randn(30, 3, 8, 8), torch.randint(0, 4, (30,))
    plain = sweep_batch_sizes(net, (images, labels), (2, 15))
    fixed = sweep_batch_sizes(FixedShape(net, rows=8), (images, labels), (2, 15))
    assert fixed == plain


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [2, 6, None])
def test_the_model_is_as_before_also_when_the_sweep_is_interrupted(
    error: type[BaseException], at: int | None
) -> None:
    class Interrupts(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == at:
                raise error
            return x

    net = trained_net(Interrupts()).train()
    net[1].eval()
    modes, digest = [module.training for module in net.modules()], buffers_digest(net)
    images, labels = torch.randn(20, 3, 8, 8), torch.randint(0, 4, (20,))
    random_state = torch.get_rng_state()
    if at is None:
        sweep_batch_sizes(net, (images, labels), (5,))
    else:
        with pytest.raises(error):
            sweep_batch_sizes(net, (images, labels), (5,))
    assert [module.training for module in net.modules()] == modes
    assert buffers_digest(net) == digest
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


def test_progress_counts_passes() -> None:
    calls: list[tuple[int, int]] = []
    images = torch.randn(8, 3, 8, 8)
    sweep_batch_sizes(
        trained_net(), (images, torch.zeros(8)), (2, 4), progress=lambda *call: calls.append(call)
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("count", "sizes", "error"),
    [
        (0, (1,), DataError),
        (5, (6,), DataError),
        (5, (), ValueError),
        (5, (0, 2), ValueError),
    ],
)
def test_what_cannot_be_swept_is_an_error(count: int, sizes: tuple, error: type[Exception]) -> None:
    with pytest.raises(error):
        sweep_batch_sizes(trained_net(), (torch.randn(count, 3, 8, 8), torch.zeros(count)), sizes)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilsons_interval_has_its_published_values(right: int, total: int, low: float, high: float) -> None:
    """81 of 263: Newcombe 1998, Statistics in Medicine 17, table I; the others follow from its formula."""
    assert wilson_interval(right / total, total) == pytest.approx((low, high), abs=5e-5)


def test_intervals_cover_the_truth_as_often_as_they_say_also_where_a_batch_errs_together() -> None:
    """Simulated: each batch of 8 has an accuracy of its own; Wilson's own interval is too narrow."""
    rng = np.random.default_rng(0)
    covered = naive = 0
    for _ in range(1000):
        right = rng.binomial(8, rng.beta(4, 1, size=60))  # mean accuracy 0.8
        hits = Hits(torch.tensor(right).double(), torch.full((60,), 8.0).double())
        low, high = hits.interval()
        covered += low <= 0.8 <= high
        low, high = wilson_interval(hits.accuracy, 480)
        naive += low <= 0.8 <= high
    assert 0.92 <= covered / 1000 <= 0.98
    assert naive / 1000 < 0.9


def test_independent_batches_keep_the_plain_interval() -> None:
    hits = Hits(torch.tensor([3.0, 3.0, 3.0]), torch.tensor([4.0, 4.0, 4.0]))
    assert hits.design_effect() == 1
    assert hits.interval() == wilson_interval(0.75, 12)
    # right 4, 0 and 2 of 4: sum of squares 8, times 3 / 2, over 12 * 0.5 * 0.5
    together = Hits(torch.tensor([4.0, 0.0, 2.0]), torch.tensor([4.0, 4.0, 4.0]))
    assert together.design_effect() == 4
    assert together.interval() == wilson_interval(0.5, 3)
    assert Hits(torch.tensor([5.0]), torch.tensor([5.0])).design_effect() == 1
    assert Hits(torch.tensor([1.0]), torch.tensor([5.0])).design_effect() == 1
