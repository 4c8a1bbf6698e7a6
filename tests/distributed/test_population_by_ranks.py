"""Population statistics by several processes, which torchrun starts: the bits of one process, and the truth.

The program that runs there is `population_by_ranks.py`; one launch goes through all its scenarios.
"""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bncli.batchnorm import measure_population, read_running_stats, recalibrate
from bncli.evaluation import evaluate, measure_gap, measure_outcomes, sweep_batch_sizes
from tests.batchnorm.networks import Shared
from tests.distributed import population_by_ranks as program
from tests.distributed.population_by_ranks import (
    BATCH,
    NUM_IMAGES,
    SIZES,
    Deep,
    classifier,
    found,
    images,
    labelled,
    network,
)
from tests.distributed.torchrun import torchrun

Answers = list[dict[str, Any]]  # of each rank, by scenario


@pytest.fixture(
    scope="module",
    params=[2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)],
)
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun(request.param, "-m", program.__name__, folder)
    assert done.code == 0, done.err[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def check_same(answer: dict[str, Any], expected: dict[str, Any]) -> None:
    """To the last bit, standard errors too."""
    assert answer["layers"].keys() == expected["layers"].keys()
    for name, (count, mean, m2) in expected["layers"].items():
        assert answer["layers"][name][0] == count
        assert torch.equal(answer["layers"][name][1], mean), name
        assert torch.equal(answer["layers"][name][2], m2), name
    for key in ("images", "batches", "stopped", "passes"):
        assert answer[key] == expected[key], key
    torch.testing.assert_close(answer["errors"], expected["errors"], rtol=0, atol=0, equal_nan=True)


METHODS = ("precise", "exact")


@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_ranks_finds_the_bits_of_one_process(answers: Answers, method: Any) -> None:
    batches = images(NUM_IMAGES - 1).split(BATCH)
    expected = found(measure_population(network(), batches, method=method))
    for rank in answers:
        check_same(rank["one_image_left_out"][method], expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [5, 1])
def test_ranks_may_have_fewer_batches_than_others_or_none(answers: Answers, method: Any, number: int) -> None:
    batches = images(sum(SIZES)).split(SIZES)[:number]
    expected = found(measure_population(network(), batches, method=method))
    for rank in answers:
        check_same(rank["ragged"][f"{method} {number}"], expected)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_may_have_blocks_of_batches(answers: Answers, method: Any) -> None:
    expected = found(measure_population(network(), images(sum(SIZES)).split(SIZES), method=method))
    for rank in answers:
        check_same(rank["consecutive"][method], expected)


def test_a_layer_that_depends_on_itself_is_solved_together(answers: Answers) -> None:
    expected = found(measure_population(network(Shared), images().split(15)))
    for rank in answers:
        check_same(rank["implicit"]["exact"], expected)


def test_a_rank_that_begins_a_pass_anew_counts_once(answers: Answers) -> None:
    expected = found(measure_population(network(Deep), images().split(3)))
    for rank in answers:
        check_same({**rank["failing_disk"]["exact"], "passes": 0}, {**expected, "passes": 0})
    assert [rank["failing_disk"]["forgotten"] for rank in answers] == [0] * (len(answers) - 1) + [1]


def test_batches_that_were_merged_to_save_memory_give_the_same_bits(answers: Answers) -> None:
    expected = found(measure_population(network(), images(600).split(2), method="precise"))
    for rank in answers:
        check_same(rank["many"]["precise"], expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_tolerance_stops_all_ranks_at_the_batch_at_which_one_process_stops(
    answers: Answers, method: Any
) -> None:
    batches = images(600).split(6)
    expected = found(measure_population(network(), batches, method=method, tolerance=0.01, layers="bn1"))
    assert expected["stopped"]
    assert expected["batches"] == 27  # not a number that all ranks reach together
    for rank in answers:
        check_same(rank["tolerance"][method], expected)
        assert rank["tolerance"]["read"] <= -(-27 // len(answers))  # hardly more than are needed


def test_all_ranks_write_the_same_statistics_and_find_them_self_consistent(answers: Answers) -> None:
    model = network().double()
    recalibrate(model, images().double().split(9))
    expected = {one.name: (one.running_mean, one.running_var) for one in read_running_stats(model)}
    for rank in answers:
        written = rank["written"]
        torch.testing.assert_close(written["statistics"], expected, rtol=0, atol=0)
        assert max(written["errors"].values()) < 1e-12
        assert written["values"] == {"bn1": 64 * 45, "bn2": 64 * 45, "bn3": 64 * 45, "bn4": 45}


def truth(weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer by layer over all images at once, in float64: what plain hooks see enter each of them."""
    model = network().double().eval()
    model.load_state_dict({name: value.double() for name, value in weights.items()}, strict=False)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(layer: nn.Module, inputs: tuple[Tensor], name: str) -> None:
        var, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        seen[name] = mean, var
        assert isinstance(layer, nn.BatchNorm2d)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)

    for name in ("bn1", "bn2", "bn3"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda layer, inputs, name=name: see(layer, inputs, name)
        )
    with torch.no_grad():
        model(images().double())
    return seen


@pytest.mark.parametrize("scenario", ["in_ddp", "in_fsdp"])
def test_inside_a_training_loop_each_image_counts_once(answers: Answers, scenario: str) -> None:
    """Though the sampler repeats some, for 45 images are divided evenly by none of 2 and 4 ranks."""
    for rank in answers:
        for epoch in rank[scenario]["measured"]:
            assert epoch["images"] == NUM_IMAGES
            for name, (mean, var) in truth(epoch["weights"]).items():
                count, found_mean, m2 = epoch["layers"][name]
                assert count == NUM_IMAGES * 64
                torch.testing.assert_close(found_mean, mean, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(m2 / count, var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scenario", ["in_ddp", "in_fsdp"])
def test_training_goes_on_as_if_nothing_had_been_measured(answers: Answers, scenario: str) -> None:
    for rank in answers:
        assert rank[scenario]["training is the same"]
        assert rank[scenario]["names"] == ["bn1", "bn2", "bn3"]  # no "module." before them


def test_before_a_validation_every_rank_reads_its_share(answers: Answers) -> None:
    size = len(answers)
    for key, num_images in (("all", NUM_IMAGES), ("some", 8 * size)):
        expected = network()
        chosen = torch.cat([images()[rank::size][: num_images // size] for rank in range(size)])
        if key == "all":
            chosen = images()
        recalibrate(expected, [chosen], method="precise", layers="bn1")
        layer = read_running_stats(expected)[0]
        for rank in answers:
            found = rank["before_validation"][key]
            assert found["images"] == len(chosen)
            for one, other in zip(
                found["statistics"]["bn1"], (layer.running_mean, layer.running_var), strict=True
            ):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
            first = answers[0]["before_validation"][key]["statistics"]
            torch.testing.assert_close(found["statistics"], first, rtol=0, atol=0)


def test_what_is_evaluated_together_is_what_one_process_finds(answers: Answers) -> None:
    model, test = classifier(), labelled()
    batches = list(zip(*(part.split(7) for part in test), strict=True))
    gap = measure_gap(model, batches, images().split(9))
    assert gap.num_trial_images == NUM_IMAGES  # so repairs were tried
    sweep = sweep_batch_sizes(model, test, (1, 4, 44))
    assert sweep[0].batch_statistics_accuracy is None  # refused, on ranks without a batch of 44 too
    alone = evaluate(model, batches)
    for rank in answers:
        expected = (alone.num_images, alone.accuracy, alone.per_class_accuracy)
        assert rank["evaluated"]["accuracy"] == expected  # though a sampler repeats images
        assert rank["evaluated"]["gap"] == asdict(gap)
        assert rank["evaluated"]["sweep"] == [asdict(one) for one in sweep]
        for number, losses in rank["evaluated"]["outcomes"].items():
            assert torch.equal(losses, measure_outcomes(model, batches, num_images=number).losses)


def test_a_rank_that_is_asked_to_stop_stops_all(answers: Answers) -> None:
    assert [rank["errors"]["stopped"] for rank in answers] == [
        *["RankStoppedError: "] * (len(answers) - 1),
        "StoppedError: ",
    ]


def test_an_error_on_one_rank_is_raised_on_all_and_none_waits(answers: Answers) -> None:
    *others, last = (rank["errors"] for rank in answers)
    number = len(answers) - 1
    for key in ("at the start", "in the midst", "in the midst, exact"):
        assert last[key] == "OSError: the disk is gone"
        assert {rank[key] for rank in others} == {f"RankError: rank {number}: OSError: the disk is gone"}
    assert last["no layer"].startswith("BncliError: no BatchNorm layer matches 'x*'; there are bn1")
    assert last["read once"].startswith("DataError: a list_iterator can be read only once")
    for rank in others:
        assert rank["no layer"].startswith(f"RankError: rank {number}: no BatchNorm layer matches 'x*'")
        assert rank["read once"].startswith(f"RankError: rank {number}: a list_iterator can be read")


def test_parts_that_are_no_parts_are_refused_on_all_ranks(answers: Answers) -> None:
    for rank in answers:
        told = rank["errors"]
        assert told["no images"] == "DataError: there is nothing to measure: the batches hold no images"
        assert told["all have all"].startswith("DataError: ranks 0 and 1 have the same images: give each its")
        assert told["overlapping"].startswith("DataError: batch 3 was measured twice")
        assert told["tolerance of blocks"].startswith("BncliError: tolerance needs batches that are dealt")
        assert told["older FSDP"].startswith(
            "BncliError: FullyShardedDataParallel keeps parameters in pieces"
        )
        assert told["sound"] == "no error"
    for number, rank in enumerate(answers[1:], 1):
        assert rank["errors"]["not in the group"] == (
            f"BncliError: process {number} is not in the group that it was given"
        )
