"""What tests of the method exact share."""

from collections.abc import Sequence

import pytest

from bncli.batchnorm.population.exact.dataflow import Cut
from bncli.batchnorm.population.exact.restart import Restarts


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> dict[Restarts, float]:
    """What each measurement spends on trying cuts, in forward passes of one image."""
    spent: dict[Restarts, float] = {}
    attempt = Restarts._try

    def watched(self: Restarts, cuts: Sequence[Cut]) -> set[Cut]:
        before = self.saved
        works = attempt(self, cuts)
        # two images, once from the start and once from every cut
        assert before - self.saved == pytest.approx(2 * (1 + sum(1 - cut.cost for cut in cuts)))
        spent[self] = spent.get(self, 0.0) + before - self.saved
        return works

    monkeypatch.setattr(Restarts, "_try", watched)
    return spent
