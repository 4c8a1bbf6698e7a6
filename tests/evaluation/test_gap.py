import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bncli.batchnorm import buffers_digest, recalibrate
from bncli.errors import BncliError, DataError
from bncli.evaluation import Gap, LayerGap, measure_gap
from bncli.evaluation import gap as gap_module
from bncli.evaluation.outcomes import PairedDifference, Score

Batch = tuple[Tensor, Tensor]
LAYERS = ("0.1", "1.1", "2.1")


def block(channels_in: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels, momentum=0.3),
        nn.ReLU(),
        nn.Dropout(0.1),
    )


def draw(num_images: int, seed: int) -> Batch:
    """Four classes: noise on one of four fixed patterns, in random order."""
    patterns = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (num_images,), generator=generator)
    return patterns[labels] + 1.2 * torch.randn(num_images, 2, 6, 6, generator=generator), labels


TRAIN, TEST = draw(400, 1), draw(300, 2)


def test_batches() -> Iterator[Batch]:
    return zip(TEST[0].split(64), TEST[1].split(64), strict=True)


test_batches.__test__ = False  # type: ignore[attr-defined]


def training_batches() -> Iterator[Tensor]:
    return iter(TRAIN[0].split(50))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        block(2, 6), block(6, 8), block(8, 8), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for step in range(80):
        where = torch.arange(step * 50, step * 50 + 50) % 400
        loss = F.cross_entropy(model(TRAIN[0][where]), TRAIN[1][where])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    recalibrate(model, training_batches)
    return model


@pytest.fixture
def model(trained: nn.Module) -> nn.Module:
    return copy.deepcopy(trained)


def gap_of(model: nn.Module) -> Gap:
    return measure_gap(model, test_batches, training_batches)


def score_by_hand(model: nn.Module) -> tuple[float, float]:
    with torch.no_grad():
        logits = torch.cat([model(images) for images, _ in test_batches()])
    right = (logits.argmax(1) == TEST[1]).double().mean()
    return float(right), float(F.cross_entropy(logits.double(), TEST[1]))


def spoil(model: nn.Module, name: str, how: str) -> None:
    layer = model.get_submodule(name)
    if how == "reset":
        layer.reset_running_stats()
    elif how == "shifted":
        layer.running_mean += 3 * layer.running_var.sqrt()
    elif how == "too wide":
        layer.running_var *= 400


@pytest.mark.parametrize("how", ["shifted", "too wide"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_ruined_layer_is_named_whichever_it_is(model: nn.Module, name: str, how: str) -> None:
    spoil(model, name, how)
    gap = gap_of(model)
    assert gap.batch_norm_is_to_blame
    assert gap.worst_layer == name
    recovered = {layer.name: layer.recovered for layer in gap.layers}
    # the others were in order: repairing this one alone is all there is to do
    assert recovered[name] == pytest.approx(gap.explained.accuracy, abs=1e-12)
    assert gap.num_trial_images == 300


def test_a_healthy_network_has_no_gap_and_no_worst_layer(model: nn.Module) -> None:
    gap = gap_of(model)
    assert not gap.batch_norm_is_to_blame
    assert gap.worst_layer is None
    assert gap.num_trial_images == 0
    assert all(layer.recovered is None for layer in gap.layers)
    assert all(layer.self_consistency < 1e-6 for layer in gap.layers)
    assert gap.running == gap.exact


def test_the_four_scores_are_those_of_buffers_swapped_by_hand(model: nn.Module) -> None:
    for name in LAYERS:
        model.get_submodule(name).running_mean += 0.5
        model.get_submodule(name).running_var *= 1.7
    gap = gap_of(model)
    assert (gap.running.accuracy, gap.running.loss) == pytest.approx(score_by_hand(model), abs=1e-6)

    by_batch = copy.deepcopy(model)
    for name in LAYERS:
        by_batch.get_submodule(name).train()
    assert (gap.batch.accuracy, gap.batch.loss) == pytest.approx(score_by_hand(by_batch), abs=1e-6)

    # precise: all inputs of all layers at once, each batch normalised by itself
    precise = copy.deepcopy(model)
    inputs = capture(by_batch, LAYERS)
    for name in LAYERS:
        put(precise, name, inputs[name])
    assert (gap.precise.accuracy, gap.precise.loss) == pytest.approx(score_by_hand(precise), abs=1e-6)

    # exact: one layer after the other, the earlier ones on their new statistics
    exact = copy.deepcopy(model)
    for name in LAYERS:
        put(exact, name, capture(exact, (name,))[name])
    assert (gap.exact.accuracy, gap.exact.loss) == pytest.approx(score_by_hand(exact), abs=1e-6)
    assert gap.explained.accuracy == pytest.approx(gap.exact.accuracy - gap.running.accuracy)
    assert gap.beyond.accuracy == pytest.approx(gap.batch.accuracy - gap.exact.accuracy)
    accuracies = [score.accuracy for score in (gap.running, gap.batch, gap.precise, gap.exact)]
    assert gap.points == max(accuracies) - accuracies[0]
    assert len({gap.running, gap.batch, gap.precise, gap.exact}) == 4


def capture(model: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].double())
        )
        for name in names
    ]
    with torch.no_grad():
        for images in training_batches():
            model(images)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values) for name, values in seen.items()}


def put(model: nn.Module, name: str, values: Tensor) -> None:
    layer = model.get_submodule(name)
    layer.running_mean.copy_(values.mean((0, 2, 3)))
    layer.running_var.copy_(values.var((0, 2, 3), unbiased=False))


def test_self_consistency_is_the_distance_from_the_real_input_in_eval_mode(model: nn.Module) -> None:
    spoil(model, "1.1", "shifted")
    spoil(model, "1.1", "too wide")
    inputs = capture(model, LAYERS)
    for found in gap_of(model).layers:
        layer, values = model.get_submodule(found.name), inputs[found.name]
        mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3), unbiased=False)
        shift = (layer.running_mean.double() - mean) / (var + layer.eps).sqrt()
        ratio = (layer.running_var.double() + layer.eps) / (var + layer.eps)
        expected = (shift.square() + ratio.log().square()).mean().sqrt()
        assert found.self_consistency == pytest.approx(float(expected), rel=1e-6, abs=1e-9)
        expected_shift = pytest.approx(float(shift.square().mean().sqrt()), rel=1e-6, abs=1e-9)
        assert found.mean_shift_in_input_deviations == expected_shift
        assert found.var_ratio == pytest.approx(float(ratio.log().mean().exp()), rel=1e-6)


def test_what_a_repair_recovers_is_that_of_one_layer_replaced_by_hand(model: nn.Module) -> None:
    for name in LAYERS:
        spoil(model, name, "shifted")
    before, _ = score_by_hand(model)
    for found in gap_of(model).layers:
        alone = copy.deepcopy(model)
        put(alone, found.name, capture(alone, (found.name,))[found.name])
        assert found.recovered == pytest.approx(score_by_hand(alone)[0] - before, abs=1e-9)


def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    spoil(model, "1.1", "too wide")
    model.train()
    model[0][1].eval()
    flags = [module.training for module in model.modules()]
    digest = buffers_digest(model)
    phases: list[str] = []

    def stop_in_the_trials(phase: str, _: int, __: int | None) -> None:
        phases.append(phase)
        if phase.endswith("repaired"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_gap(model, test_batches, training_batches, progress=stop_in_the_trials)
    assert gap_of(model).worst_layer == "1.1"
    assert any("batch statistics" in phase for phase in phases)
    assert [module.training for module in model.modules()] == flags
    assert buffers_digest(model) == digest
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_nan_in_a_layer_is_found(model: nn.Module) -> None:
    model[1][1].running_var[0] = float("nan")
    gap = gap_of(model)
    assert gap.worst_layer == "1.1"
    assert gap.exact.accuracy > 0.9


def test_test_images_unlike_the_training_images_are_no_fault_of_the_statistics(model: nn.Module) -> None:
    def darker() -> Iterator[Batch]:
        return ((0.2 * images - 2, labels) for images, labels in test_batches())

    gap = measure_gap(model, darker, training_batches)
    assert not gap.batch_norm_is_to_blame
    assert gap.beyond.is_gain


def test_many_layers_are_shortlisted_with_the_first_inconsistent_one() -> None:
    scores = [0.0, 0.2, *(1.0 + index for index in range(30)), float("nan")]
    layers = [LayerGap(str(index), score, 0.0, 1.0, None) for index, score in enumerate(scores)]
    chosen = gap_module._shortlist(layers)
    worst = {str(len(scores) - 1), *(str(index) for index in range(len(scores) - 2, 1, -1))}
    assert len(chosen) == gap_module.MAX_TRIALS
    assert "1" in chosen  # the first that is off, though all later ones are further off
    assert str(len(scores) - 1) in chosen  # what is no number is the worst
    assert "0" not in chosen
    assert chosen - {"1"} <= worst


def worst_of(*layers: tuple[str, float, float | None]) -> str | None:
    """Of layers with name, self-consistency, and what their repair recovers."""
    return gap_module._worst([LayerGap(name, score, 0, 1, recovered) for name, score, recovered in layers])


def test_the_layer_whose_repair_recovers_most_is_named_or_the_earliest_of_about_equals() -> None:
    assert worst_of(("a", 0.5, 0.1), ("b", 0.5, 0.2), ("c", 0.5, 0.15)) == "b"
    assert worst_of(("a", 0.5, 0.0), ("b", 0.5, 0.198), ("c", 0.5, 0.2)) == "b"
    assert worst_of(("a", 0.5, 0.185), ("b", 0.5, 0.2)) == "a"
    assert worst_of(("a", 0.5, 0.175), ("b", 0.5, 0.2)) == "b"
    assert worst_of(("a", 0.04, 0.2), ("b", 0.5, 0.2)) == "b"  # a is ten times as consistent
    assert worst_of(("a", float("nan"), 0.1), ("b", 0.5, 0.2)) == "a"
    assert worst_of(("a", 1.0, 0.0), ("b", 1.0, -0.1), ("c", 1.0, None)) is None
    assert worst_of() is None


def test_batches_of_a_single_value_are_refused_with_the_fix() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.BatchNorm1d(4)).eval()

    def one_by_one() -> Iterator[Batch]:
        return zip(TEST[0][:3].split(1), TEST[1][:3].split(1), strict=True)

    with pytest.raises(BncliError, match="larger batches"):
        measure_gap(model, one_by_one, training_batches)


def test_a_network_without_running_statistics_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten(), nn.Linear(72, 4))
    with pytest.raises(BncliError, match="no running statistics"):
        gap_of(model)
    with pytest.raises(DataError):
        measure_gap(nn.Sequential(nn.BatchNorm2d(2)), lambda: iter(()), training_batches)


class Backwards(nn.Module):
    """Registers its layers in another order than it runs them, which is that of their names."""

    def __init__(self, trained: nn.Module) -> None:
        super().__init__()
        self.head = copy.deepcopy(trained[3:])
        self.apex, self.body, self.stem = (copy.deepcopy(trained[index]) for index in (2, 1, 0))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.apex(self.body(self.stem(images))))


def test_earlier_means_run_earlier_not_registered_earlier(trained: nn.Module) -> None:
    model = Backwards(trained).eval()
    model.body[1].running_var *= 400
    gap = gap_of(model)
    assert [layer.name for layer in gap.layers] == ["stem.1", "body.1", "apex.1"]
    assert gap.worst_layer == "body.1"


def test_few_images_acquit_no_layer_whose_statistics_do_not_fit() -> None:
    score = Score(0.5, 1.0)
    few = PairedDifference(32, 3, 2, 1 / 32, 0.07, 0.0, 0.1)
    layers = (LayerGap("swapped", 1.1, 0.8, 1.5, None), LayerGap("sound", 0.05, 0.04, 1.0, None))
    found = Gap(32, 200, 0, score, score, score, score, few, few, layers, None)
    assert found.verdict.startswith(
        "32 test images are too few to tell: exact population statistics give +3.12"
    )
    assert "do not fit their layers' inputs in swapped: try bncli recalibrate" in found.verdict
    many = replace(few, num_images=5000, accuracy_standard_error=0.003)
    assert replace(found, explained=many).verdict.startswith("No gain beyond chance")


def test_statistics_that_cost_loss_alone_are_stale(model: nn.Module) -> None:
    with torch.no_grad():
        model[-1].weight.zero_()  # all classes look alike, and what is added below favours the third
        model[-1].weight[2].fill_(1.0)
    before = gap_of(model)
    assert not before.batch_norm_is_to_blame
    model.get_submodule("2.1").running_var.mul_(1e-4)  # a hundred times as sure, and no prediction changes
    gap = gap_of(model)
    assert gap.explained.num_gained == gap.explained.num_lost == 0
    assert gap.running.loss > 10 * gap.exact.loss
    assert gap.batch_norm_is_to_blame
    assert gap.to_dict()["loss_is_to_blame"] is True
    assert gap.verdict.startswith(
        "The running statistics are stale: exact population statistics lower the loss"
    )
    assert gap.verdict.endswith("Run bncli recalibrate, or train for more steps.")
