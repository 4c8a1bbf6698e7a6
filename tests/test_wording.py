import math
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from bncli.wording import expected_value, gigabytes, list_names, plural


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "0 tensors"), (1, "1 tensor"), (2, "2 tensors"), (1234, "1,234 tensors")]
)
def test_one_thing_is_singular(count: int, expected: str) -> None:
    assert plural(count, "tensor") == expected


def test_a_noun_that_takes_more_than_an_s_says_so() -> None:
    assert [plural(count, "batch", "batches") for count in (1, 2)] == ["1 batch", "2 batches"]


def test_a_long_list_of_names_is_cut_and_counted() -> None:
    names = [f"layer{i}" for i in range(10)]
    assert list_names(names[:2]) == "layer0, layer1"
    assert list_names(names[:8]).count("layer") == 8
    assert list_names(names) == ", ".join(names[:8]) + ", ... (10 in all)"


def test_bytes_are_said_in_decimal_gigabytes() -> None:
    assert gigabytes(1_500_000_000) == "1.5 GB"
    assert gigabytes(2**40, 0) == "1,100 GB"


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, "x", "a whole number"),
        (int, 1.5, "a whole number"),
        (int, None, "a whole number"),
        (float, "x", "a number"),
        (float, [], "a number"),
        (Annotated[float, Field(allow_inf_nan=False)], math.inf, "a finite number"),
        (bool, 5, "true or false"),
        (bool, "perhaps", "true or false"),
        (str, 5, "text"),
        (tuple[int, ...], 3, "a list"),
        (Annotated[tuple[int, ...], Field(min_length=1)], [], "a list of at least 1"),
        (Annotated[tuple[int, ...], Field(max_length=2)], [1, 2, 3], "a list of at most 2"),
        (Annotated[int, Field(ge=1)], 0, "at least 1"),
        (Annotated[int, Field(le=100_000)], 100_001, "at most 100,000"),
        (Annotated[float, Field(gt=0)], 0, "above 0"),
        (Annotated[float, Field(lt=0.5)], 0.5, "below 0.5"),
        (Literal["a", "b"], "c", "'a' or 'b'"),
    ],
)
def test_what_pydantic_expects_is_said_in_plain_words(kind: Any, value: object, expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(value)
    assert expected_value(caught.value.errors()[0]) == expected
