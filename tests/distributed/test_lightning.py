"""The callback in the real Lightning, with its strategy `ddp` in several processes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.distributed.torchrun import torchrun

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # its warnings are not ours


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_all_ranks_validate_the_statistics_of_all_images_and_train_as_without(
    tmp_path: Path, num_ranks: int
) -> None:
    """45 images, of which the samplers repeat one or three: each counts once."""
    done = torchrun(num_ranks, "-m", "tests.distributed.lightning_worker", tmp_path)
    assert done.code == 0, done.err[-3000:]
    assert "sync_dist" not in done.err  # Lightning's advice to whom it may concern
    from tests.distributed.lightning_worker import IMAGES

    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(num_ranks)]
    for rank in ranks:
        assert rank["training is the same"]
        assert rank["logged"] == ranks[0]["logged"]
        assert rank["logged"]["batch_norm/mean_shift"] > 0.001
        assert len(rank["validated"]) == 2
        for state, first in zip(rank["validated"], ranks[0]["validated"], strict=True):
            assert all(torch.equal(value, first[name]) for name, value in state.items())
            conv = nn.Conv2d(3, 4, 3).double()
            conv.load_state_dict({"weight": state["0.weight"], "bias": state["0.bias"]})
            var, mean = torch.var_mean(conv(IMAGES.double()), (0, 2, 3), correction=0)
            torch.testing.assert_close(state["1.running_mean"], mean, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(state["1.running_var"], var, rtol=1e-12, atol=1e-12)
