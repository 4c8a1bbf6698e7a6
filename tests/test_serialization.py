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
        "confidence": None,
    }
    assert to_plain({"a": (torch.tensor([1, 2]), Path("x"))}) == {"a": [[1, 2], "x"]}


def test_json_has_no_nan_and_no_infinity() -> None:
    text = to_json([float("nan"), float("inf"), torch.tensor([1.0, float("-inf")])])
    assert json.loads(text) == [None, None, [1.0, None]]


def test_what_has_no_plain_form_is_refused() -> None:
    with pytest.raises(TypeError, match="no plain form of object"):
        to_plain(object())


def test_lines_hold_the_same_document_with_an_entry_each() -> None:
    value = {"a": [], "b": [{"c": [1, {"d": None}]}, 2.5], "e": {"f": {"g": "ä\n"}}, "h": float("nan")}
    text = to_json(value, in_lines=True)
    assert json.loads(text) == json.loads(to_json(value)) == {**value, "h": None}
    assert text.splitlines() == [
        "{",
        '  "a": [],',
        '  "b": [',
        '    {"c": [1, {"d": null}]},',
        "    2.5",
        "  ],",
        '  "e": {',
        '    "f": {"g": "\\u00e4\\n"}',
        "  },",
        '  "h": null',
        "}",
    ]
