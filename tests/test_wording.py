import pytest

from bncli.wording import gigabytes, list_names, plural


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
