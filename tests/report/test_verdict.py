"""The three sentences: what it is, whether it is right, what to do."""

from collections.abc import Callable

import torch

from bncli.report import Content, Training
from bncli.report.verdict import is_bad, judge
from tests.report.conftest import layers_of


def test_of_a_sound_file_there_is_nothing_to_do_but_to_measure(content: Callable[..., Content]) -> None:
    made = content(layers_of({"a": 3, "b": 5}), how_to_measure="bncli report model.pt --measure")
    assert judge(made) == (
        "model.pt has 2 BatchNorm layers with 8 channels.",
        "15 rules found no error and no warning in the stored numbers; whether they fit the images,"
        " --measure tells.",
    )
    assert not is_bad(made)
    assert judge(content(layers_of({"a": 3})))[-1].endswith("no warning in the stored numbers.")


def test_the_gravest_finding_is_named_with_its_layer_and_the_advice(content: Callable[..., Content]) -> None:
    layers = layers_of({"a": 4, "b": 4}, running_var=[1.0, torch.nan, 1.0, -1.0])
    made = content(layers)
    last = judge(made)[-1]
    assert last.startswith("2 errors, first of all non_finite in a: channel 1 of 4: NaN")
    assert last.endswith(f"{made.findings[0].advice}")
    assert is_bad(made)


def test_of_a_run_the_accuracy_comes_first(content: Callable[..., Content]) -> None:
    epochs = [{"epoch": 1, "test_accuracy": 0.25}, {"epoch": 2, "test_accuracy": 0.5}]
    made = content(layers_of({"a": 3}), training=Training(epochs, 5))
    assert judge(made)[0] == (
        "After epoch 2 of 5 the network is right on 50.0% of the test images in eval mode. It has 1 BatchNorm"
        " layer with 3 channels."
    )
    unknown = content((), training=Training([{"epoch": 1}], None))
    assert judge(unknown) == ("After epoch 1 the network was not evaluated.",)
