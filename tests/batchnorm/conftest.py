"""What tests of the method exact share."""

import pytest

from bncli.batchnorm.population.exact.dataflow import Cut
from bncli.batchnorm.population.exact.restart import Restarts


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> dict[Restarts, float]:
    """What each measurement spends on trying cuts, in forward passes of one image."""
    spent: dict[Restarts, float] = {}
    attempt = Restarts._try

    def watched(self: Restarts, cut: Cut) -> bool:
        # two images, from the start and from the cut
        spent[self] = spent.get(self, 0.0) + 2 * (1 + 1 - cut.cost)
        return attempt(self, cut)

    monkeypatch.setattr(Restarts, "_try", watched)
    return spent
