import math

import numpy as np
import torch

from bncli.determinism.difference import Difference, predictions


def test_a_difference_is_measured_in_bits_numbers_and_predictions() -> None:
    first = torch.tensor([[1.0, 2.0, -4.0], [0.5, 0.25, 0.0]])
    second = torch.tensor([[1.0, 2.5, -4.0], [0.5, 0.75, 0.0]])
    found = Difference.between(first, second)
    assert not found.bitwise_equal
    assert found.max_abs_diff == 0.5
    assert found.max_rel_diff == 0.5 / 0.75  # of the second row; in the first it is 0.5 / 4
    ulp = [
        abs(int(np.float32(a).view(np.int32)) - int(np.float32(b).view(np.int32))) for a, b in [(0.25, 0.75)]
    ]
    assert found.max_ulp == max(*ulp, 2**21)
    assert found.flips.tolist() == [False, True]


def test_what_is_equal_differs_by_nothing() -> None:
    logits = torch.tensor([[math.nan, 1.0], [math.inf, -math.inf], [0.0, 0.0]])
    found = Difference.between(logits, logits.clone())
    measures = (found.bitwise_equal, found.max_abs_diff, found.max_rel_diff, found.max_ulp)
    assert measures == (True, 0, 0, 0)
    assert not found.flips.any()


def test_a_nan_against_a_number_is_infinitely_far() -> None:
    for other in (0.0, 1.0, math.inf):
        found = Difference.between(torch.tensor([[math.nan, 0.0]]), torch.tensor([[other, 0.0]]))
        measures = (found.bitwise_equal, found.max_abs_diff, found.max_rel_diff, found.max_ulp)
        assert measures == (False, math.inf, math.inf, None)
        assert found.flips.tolist() == [True]


def test_the_sign_of_zero_is_a_bit_but_no_number() -> None:
    found = Difference.between(torch.tensor([[0.0, 0.0]]), torch.tensor([[-0.0, 0.0]]))
    measures = (found.bitwise_equal, found.max_abs_diff, found.max_rel_diff, found.max_ulp)
    assert measures == (False, 0, 0, 0)


def test_logits_of_different_types_have_no_distance_in_bits() -> None:
    found = Difference.between(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.float64))
    assert (found.bitwise_equal, found.max_abs_diff, found.max_ulp) == (False, 0, None)


def test_a_row_with_a_nan_predicts_nothing() -> None:
    assert predictions(torch.tensor([[0.0, 2.0], [math.nan, 1.0]])).tolist() == [1, -1]


def test_an_infinity_against_a_number_is_infinitely_far_though_they_have_a_distance_in_bits() -> None:
    found = Difference.between(torch.tensor([[math.inf, 0.0]]), torch.tensor([[1.0, 0.0]]))
    assert (found.max_abs_diff, found.max_rel_diff) == (math.inf, math.inf)
    assert found.max_ulp == 0x7F800000 - 0x3F800000
