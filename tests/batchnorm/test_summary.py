import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bncli.batchnorm.layers import Summary, summarize


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=9))
def test_the_summary_is_that_of_the_standard_library(values: list[float]) -> None:
    summary = summarize(torch.tensor(values, dtype=torch.float64))
    assert summary is not None
    assert (summary.min, summary.max) == (min(values), max(values))
    assert summary.median == pytest.approx(statistics.median(values), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("missing", [None, torch.zeros(0)])
def test_nothing_has_no_summary(missing: torch.Tensor | None) -> None:
    assert summarize(missing) is None


@pytest.mark.parametrize("position", [0, 1, 2])
def test_one_nan_is_never_hidden(position: int) -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    values[position] = math.nan
    summary = summarize(values)
    assert summary is not None
    assert all(map(math.isnan, (summary.min, summary.median, summary.max)))


def test_infinities_count_as_values() -> None:
    inf = math.inf
    assert summarize(torch.tensor([inf, 1.0, -inf])) == Summary(-inf, 1.0, inf)
    assert summarize(torch.tensor([inf, inf])) == Summary(inf, inf, inf)
