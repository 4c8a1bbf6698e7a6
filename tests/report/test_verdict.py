"""The three sentences: what it is, whether it is right, what to do."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bncli.evaluation import Gap
from bncli.evaluation.gap import LayerGap
from bncli.evaluation.outcomes import PairedDifference, Score
from bncli.report import Content, Measurement, Training
from bncli.report.verdict import judge, remedy, state_of
from bncli.training.convergence import Convergence, EpochPoint, LayerHistory
from tests.report.conftest import layers_of


def test_of_a_sound_file_there_is_nothing_to_do_but_to_measure(content: Callable[..., Content]) -> None:
    made = content(layers_of({"a": 3, "b": 5}), how_to_measure="bncli report model.pt --measure")
    assert judge(made) == (
        "model.pt has 2 BatchNorm layers with 8 channels.",
        "15 rules found no error and no warning in the stored numbers; whether they fit the images,"
        " --measure tells.",
    )
    assert state_of(made) == "good"
    assert judge(content(layers_of({"a": 3})))[-1].endswith("no warning in the stored numbers.")


def test_the_gravest_finding_is_named_with_its_layer_and_the_advice(content: Callable[..., Content]) -> None:
    layers = layers_of({"a": 4, "b": 4}, running_var=[1.0, torch.nan, 1.0, -1.0])
    made = content(layers)
    last = judge(made)[-1]
    assert last.startswith("2 errors, first of all in a: channel 1 of 4: NaN")
    assert last.endswith(f"What to do: {made.findings[0].advice}")
    assert state_of(made) == "bad"


def test_of_a_run_the_accuracy_comes_first(content: Callable[..., Content]) -> None:
    epochs = [{"epoch": 1, "test_accuracy": 0.25}, {"epoch": 2, "test_accuracy": 0.5}]
    made = content(layers_of({"a": 3}), training=Training(epochs, 5))
    assert judge(made)[0] == (
        "After epoch 2 of 5 the network is right on 50.0% of the test images in eval mode. It has 1 BatchNorm"
        " layer with 3 channels."
    )
    unknown = content((), training=Training([{"epoch": 1}], None))
    assert judge(unknown) == ("After epoch 1 the network was not evaluated.",)


def test_a_warning_alone_is_to_be_looked_at(content: Callable[..., Content]) -> None:
    changes = {"running_mean": [0.0] * 4, "running_var": [1.0] * 4, "num_batches_tracked": 5}
    made = content(layers_of({"a": 4, "b": 4}, **changes))
    assert {finding.severity for finding in made.findings} == {"warning"}
    assert state_of(made) == "doubtful"


def gap(*layers: LayerGap, gained: int, worst: str | None) -> Gap:
    """Of 100 images 50 are right, and `gained` more with population statistics."""
    before, after = Score(0.5, 1.0), Score(0.5 + gained / 100, 0.5)
    explained = PairedDifference(100, max(gained, 0), max(-gained, 0), gained / 100, 0.01, -0.5, 0.1)
    beyond = PairedDifference(100, 0, 0, 0.0, 0.01, 0.0, 0.1)
    return Gap(100, 80, 100, before, after, after, after, explained, beyond, layers, worst)


def measured(content: Callable[..., Content], found: Gap) -> Content:
    made = content(layers_of({"a": 3, "b": 5}), how_to_repair="bncli recalibrate model.pt")
    return replace(made, measurement=Measurement("synthetic", 100, (), found, None))


LOSS = PairedDifference(100, 1, 0, 0.01, 0.01, -68.77, 1.0)
VAR, MEAN = "its running_var", "its running_mean"


@pytest.mark.parametrize(
    ("numbers", "fault"),
    [
        ((4.605, 0.02, 100.0), f"{VAR} is 100 times the variance; {MEAN} is right."),
        ((3.0, 3.0, 1.0), f"{MEAN} is off by 3 standard deviations of it, and {VAR} is right."),
        # half of the channels are 100 times too large and half as much too small: on average they are right
        ((4.605, 0.0, 1.0), f"{VAR} is wrong by factors of about 100; {MEAN} is right."),
        ((torch.nan, torch.nan, 1.0), "running statistics hold NaN, infinity or a negative variance."),
    ],
)
def test_the_layer_to_blame_is_named_and_in_what_way_it_is_wrong(
    content: Callable[..., Content], numbers: tuple[float, float, float], fault: str
) -> None:
    made = measured(
        content, gap(LayerGap("a", 0.01, 0.01, 1.0, 0.0), LayerGap("b", *numbers, 0.4), gained=40, worst="b")
    )
    assert judge(made)[1].startswith(
        "Its running statistics are wrong: with those measured anew on 80 training images it is right on"
        " 90.0%. Layer b is to blame: repaired alone, it gains 40.0 points."
    )
    assert judge(made)[1].endswith(fault)
    assert judge(made)[2].endswith("only images show it.")
    assert remedy(made) == "bncli recalibrate model.pt"
    assert state_of(made) == "bad"


def test_several_layers_and_none_that_gains_anything_alone(content: Callable[..., Content]) -> None:
    layers = [LayerGap("a", 1.0, 1.0, 1.0, 0.1), LayerGap("b", 1.0, 1.0, 1.0, 0.2)]
    several = judge(measured(content, gap(*layers, gained=40, worst="b")))[1]
    assert "Several layers are to blame, b most of all: repaired alone, it gains 20.0 points." in several
    none = judge(measured(content, gap(*layers, gained=40, worst=None)))[1]
    assert none.endswith("Many layers are wrong: to repair one alone gains nothing.")


def test_statistics_that_are_right_need_nothing(content: Callable[..., Content]) -> None:
    made = measured(content, gap(LayerGap("a", 0.01, 0.01, 1.0, None), gained=1, worst=None))
    assert made.measurement is not None
    assert judge(made)[1] == (
        "Its running statistics are right: measured anew on 80 training images, they give 51.0%, and a change"
        " of +1.0 points is within chance."
    )
    assert judge(made)[2].endswith("there is nothing to repair.")
    assert (state_of(made), remedy(made)) == ("good", "")
    far = measured(content, gap(LayerGap("a", 0.9, 0.9, 1.0, None), gained=1, worst=None))
    assert far.measurement is not None
    assert judge(far)[1] == far.measurement.gap.verdict  # which claims less
    costly = replace(made.measurement.gap, running=Score(0.5, 69.27), explained=LOSS)
    at_loss = measured(content, costly)
    assert judge(at_loss)[1] == (
        "Its running statistics are wrong: with those measured anew on 80 training images its loss is 0.5"
        " instead of 69.27, though its accuracy does not show it (+1.0 points)."
    )
    assert (state_of(at_loss), remedy(at_loss)) == ("bad", "bncli recalibrate model.pt")
    lost = judge(measured(content, gap(LayerGap("a", 0.01, 0.01, 1.0, None), gained=-20, worst=None)))[1]
    assert "they would lose accuracy, -20.0 points" in lost


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ((0.05, 1.02), "Its running statistics have caught up with the batches. After"),
        ((0.05, 1.5), "Its running statistics do not match the last epoch's batches. After"),
        ((None, None), "What the batches of epoch 3 were like is unknown"),
    ],
)
def test_of_a_run_it_says_whether_the_averages_have_caught_up(
    content: Callable[..., Content], point: tuple[float | None, float | None], words: str
) -> None:
    history = Convergence("run", (LayerHistory("a", (EpochPoint(3, *point, 1.0, 1.0),)),))
    made = content(layers_of({"a": 3}), training=Training([{"epoch": 3}], None), convergence=history)
    assert judge(made)[1].startswith(words)
