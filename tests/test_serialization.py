import json
from pathlib import Path

import pytest
import torch

from bncli.evaluation import Evaluation
from bncli.serialization import to_json, to_plain


def test_results_become_plain_values() -> None:
    result = Evaluation(2, 0.5, 0.25, (None, 0.5), 1.0, 2.0)
    assert to_plain(result) == {
        "num_images": 2,
        "accuracy": 0.5,
        "loss": 0.25,
        "per_class_accuracy": [None, 0.5],
        "seconds": 1.0,
        "images_per_second": 2.0,
    }
    assert to_plain({"a": (torch.tensor([1, 2]), Path("x"))}) == {"a": [[1, 2], "x"]}


def test_json_has_no_nan_and_no_infinity() -> None:
    text = to_json([float("nan"), float("inf"), torch.tensor([1.0, float("-inf")])])
    assert json.loads(text) == [None, None, [1.0, None]]


def test_what_has_no_plain_form_is_refused() -> None:
    with pytest.raises(TypeError, match="no plain form of object"):
        to_plain(object())
