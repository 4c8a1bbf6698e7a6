import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bncli.batchnorm.bits import differing_rows, max_ulp_diff

NUMBERS = st.floats(width=32, allow_nan=False)


def steps(start: float, count: int, dtype: type = np.float32) -> float:
    """The oracle: NumPy's next number, so many times."""
    for _ in range(count):
        start = np.nextafter(dtype(start), dtype(math.inf))
    return start


@given(NUMBERS.filter(lambda x: x < 3e38), st.integers(0, 30))
def test_distance_is_the_number_of_steps_to_the_next_number(start: float, count: int) -> None:
    first, second = torch.tensor([1.0, start]), torch.tensor([1.0, steps(start, count)])
    assert max_ulp_diff(first, second) == count
    assert max_ulp_diff(second, first) == count


@given(st.floats(allow_nan=False, max_value=1e300), st.integers(0, 30))
def test_distance_in_float64_too(start: float, count: int) -> None:
    first = torch.tensor([start], dtype=torch.float64)
    second = torch.tensor([steps(start, count, np.float64)], dtype=torch.float64)
    assert max_ulp_diff(first, second) == count


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [
        (torch.bfloat16, 0x7F7F),
        (torch.float16, 0x7BFF),
        (torch.float32, 0x7F7FFFFF),
        (torch.float64, 0x7FEFFFFFFFFFFFFF),
    ],
)
def test_the_whole_range_is_counted_without_overflow(dtype: torch.dtype, largest: int) -> None:
    """IEEE 754 numbers of one sign lie in the order of their bits, from 0 to that of the largest."""
    top = torch.tensor([torch.finfo(dtype).max], dtype=dtype)
    assert max_ulp_diff(top, torch.zeros_like(top)) == largest
    assert max_ulp_diff(top, -top) == 2 * largest
    assert max_ulp_diff(top, top * 2) == 1  # infinity comes next
    tiny = torch.tensor([torch.finfo(dtype).eps], dtype=dtype)
    assert max_ulp_diff(torch.ones_like(tiny), 1 + tiny) == 1


def test_zeros_of_either_sign_are_one_number_and_equal_nans_are_equal() -> None:
    first, second = torch.tensor([0.0, math.nan, math.inf]), torch.tensor([-0.0, -math.nan, math.inf])
    assert max_ulp_diff(first, second) == 0
    assert max_ulp_diff(torch.tensor([math.nan]), torch.tensor([1.0])) is None
    assert max_ulp_diff(torch.zeros(0, 3), torch.zeros(0, 3)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_differing_rows_are_found_by_their_bits(dtype: torch.dtype) -> None:
    first = torch.tensor([[0.0, 1.0], [2.0, math.nan], [3.0, 4.0]], dtype=dtype)
    second = first.clone()
    assert differing_rows(first, second).tolist() == [False, False, False]
    second[0, 0], second[2, 1] = -0.0, 5.0
    assert differing_rows(first, second).tolist() == [True, False, True]
