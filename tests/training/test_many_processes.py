"""Training with torchrun: what is learned does not depend on the number of processes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bncli.checkpoints import load_checkpoint
from bncli.training.share import share_of
from tests.distributed.torchrun import torchrun
from tests.distributed.training_worker import CASES, run_case

QUICK = ("parts", "sync")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what this process alone makes of the cases."""
    return tmp_path_factory.mktemp("one")


def state_of(folder: Path, case: str, rank: int) -> dict[str, Any]:
    return torch.load(folder / f"{case}-{rank}.pt", weights_only=True)


def largest_distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Over all tensors, relative to the largest number of each."""
    assert one.keys() == other.keys()
    distances = [
        float((value.double() - other[key].double()).abs().max() / value.double().abs().max().clamp(min=1e-3))
        for key, value in one.items()
    ]
    return max(distances)


def check_against_one_process(num_ranks: int, cases: tuple[str, ...], one: Path, folder: Path) -> None:
    for case in cases:
        if not (one / case).exists():
            run_case(case, one, None, 0)
    done = torchrun(num_ranks, "-m", "tests.distributed.training_worker", folder, *cases)
    assert done.code == 0, done.err
    for case in cases:
        alone = load_checkpoint(one / case / "last.pt")
        ranks = [state_of(folder, case, rank) for rank in range(num_ranks)]
        together = load_checkpoint(folder / case / "last.pt")
        assert together.step == alone.step >= 50
        assert together.state_dict["head.weight"].dtype == torch.float64
        assert largest_distance(alone.state_dict, together.state_dict) < 1e-9, case
        assert together.test_accuracy == alone.test_accuracy
        assert together.test_loss == pytest.approx(alone.test_loss, rel=1e-9)
        for rank in ranks:  # every process ends with the same bits
            assert all(torch.equal(value, ranks[0]["state"][key]) for key, value in rank["state"].items())
            assert rank["result"] == ranks[0]["result"]
            # the images lie in memory once
            assert num_ranks == 1 or "memfd:bncli-data" in rank["map"]
        lines = [(folder / case / "metrics.jsonl").read_text(), (one / case / "metrics.jsonl").read_text()]
        for ours, theirs in zip(*(map(json.loads, text.splitlines()) for text in lines), strict=True):
            assert ours["train_accuracy"] == theirs["train_accuracy"]
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-9)
            for layer, other in zip(ours["layers"], theirs["layers"], strict=True):
                for name in ("mean_shift", "var_ratio"):
                    assert (layer[name] is None) == (other[name] is None)
                    if layer[name] is not None:
                        assert layer[name] == pytest.approx(other[name], rel=1e-6, abs=1e-9)


def test_two_processes_learn_what_one_does(one_process: Path, tmp_path: Path) -> None:
    check_against_one_process(2, QUICK, one_process, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_any_number_of_processes_learns_what_one_does(
    one_process: Path, tmp_path: Path, num_ranks: int
) -> None:
    cases = tuple(case for case in CASES if case != "compiled")
    check_against_one_process(num_ranks, cases, one_process, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what PyTorch itself imports
def test_two_processes_that_compile_their_network_learn_what_one_does(
    one_process: Path, tmp_path: Path
) -> None:
    check_against_one_process(2, ("compiled",), one_process, tmp_path)


@pytest.mark.parametrize(
    ("batch_size", "num_parts", "num_ranks"), [(10, 4, 3), (7, 2, 4), (5, 1, 1), (9, 9, 2)]
)
def test_every_image_is_in_one_share(batch_size: int, num_parts: int, num_ranks: int) -> None:
    shares = [share_of(batch_size, num_parts, rank, num_ranks) for rank in range(num_ranks)]
    images = torch.arange(batch_size)
    parts = [part for share in shares for part in images[share.rows].split(share.sizes) if share.sizes]
    assert [part.tolist() for part in parts] == [part.tolist() for part in images.tensor_split(num_parts)]
    assert [share.first for share in shares] == [
        sum(len(s.sizes) for s in shares[:i]) for i in range(num_ranks)
    ]
