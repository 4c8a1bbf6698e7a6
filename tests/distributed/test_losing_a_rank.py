"""In anybody's program a rank that dies or does not answer ends the measurement of the others."""

import json
from pathlib import Path

import pytest

from tests.distributed import losing_a_rank as program
from tests.distributed.torchrun import torchrun


@pytest.mark.slow
@pytest.mark.parametrize(("fate", "method"), [("dies", "precise"), ("dies", "exact"), ("sleeps", "precise")])
def test_the_others_end_within_the_timeout(tmp_path: Path, fate: str, method: str) -> None:
    torchrun(3, "-m", program.__name__, fate, method, tmp_path)
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())]
    assert len(found) == 2
    for one in found:
        assert one["told"].startswith("PeerLostError: rank")
        assert "another process ended, or did not answer within the group's timeout" in one["told"]
        assert one["seconds"] < program.TIMEOUT + 6
