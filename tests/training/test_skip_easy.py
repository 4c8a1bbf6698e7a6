"""`train.skip_easy`: half of the easiest images are left out of an epoch, the other half counts double."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bncli.checkpoint import load_checkpoint
from bncli.config import Config
from bncli.config_file import load_config
from bncli.data import BatchPlan, choose_images, leave_out_easy
from bncli.errors import ConfigError, StoppedError
from bncli.training import prepare, train
from bncli.training.batch import Batch
from bncli.training.loop import training_step
from bncli.training.run import Run

PLAN = BatchPlan(num_images=103, batch_size=25)  # 100 images an epoch
SMALLER = (20,) * 4


def skipping(tiny_config: Path, *changes: str) -> Config:
    """500 images in batches that are a quarter smaller in the epochs 2 and 3 of 4."""
    return load_config(tiny_config, ["train.epochs=4", "train.skip_easy=0.25", *changes])


def test_half_of_the_easiest_images_are_left_out_and_the_others_of_them_count_double() -> None:
    losses = np.random.default_rng(0).random(103).astype(np.float32)
    whole = choose_images(PLAN, seed=0, epoch=1)
    chosen = leave_out_easy(whole, losses, SMALLER)
    easiest = set(sorted(whole.order.tolist(), key=lambda place: losses[place])[:40])
    kept = chosen.order.tolist()
    assert len(set(kept)) == len(kept) == 80
    assert set(whole.order) - set(kept) <= easiest
    assert len(easiest - set(kept)) == 20
    assert chosen.weights.tolist() == [2.0 if place in easiest else 1.0 for place in kept]
    assert chosen.weights.sum() == 100
    assert kept == [place for place in whole.order if place in set(kept)]  # in the same order
    # spread over the epoch, not all at its beginning
    doubles = [int((chosen.weights[where] == 2).sum()) for where in chosen.steps()]
    assert max(doubles) <= 9


def test_in_the_mean_over_epochs_every_image_counts_once() -> None:
    plan = BatchPlan(num_images=40, batch_size=20)
    losses = np.linspace(0, 1, 40, dtype=np.float32)
    counts = np.zeros(40)
    for epoch in range(2000):
        chosen = leave_out_easy(choose_images(plan, seed=0, epoch=epoch), losses, (13, 13))
        counts[chosen.order] += chosen.weights
    assert np.abs(counts / 2000 - 1).max() < 0.1  # four standard errors: weights 0 and 2 have deviation 1


def test_images_that_were_never_seen_are_not_left_out() -> None:
    losses = np.full(103, np.inf, np.float32)
    losses[:60] = 1.0
    chosen = leave_out_easy(choose_images(PLAN, seed=3, epoch=1), losses, SMALLER)
    assert set(choose_images(PLAN, seed=3, epoch=1).order) - set(chosen.order) <= set(range(60))


def test_the_losses_of_one_epoch_decide_about_the_next(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, Batch]] = []
    losses: dict[int, torch.Tensor] = {}

    def recording(run: Run, batch: Batch):
        losses.setdefault(run.epoch, run.image_losses.latest.clone())
        seen.append((run.epoch, batch))
        return training_step(run, batch)

    monkeypatch.setattr("bncli.training.loop.training_step", recording)
    config = skipping(tiny_config)
    result = train(config, tmp_path / "run")
    places = [torch.cat([batch.places for epoch, batch in seen if epoch == e]) for e in range(4)]
    num_steps = len(seen) // 4
    size = config.train.batch_size
    assert [len(one) for one in places] == [num_steps * n for n in (size, size * 3 // 4, size * 3 // 4, size)]
    assert all(batch.weights is None for epoch, batch in seen if epoch in {0, 3})
    assert losses[0].isinf().all()
    for epoch in (1, 2):
        weights = torch.cat([batch.weights for e, batch in seen if e == epoch])
        assert weights.sum() == len(places[0])
        hard = places[epoch][weights == 1]
        easy = places[epoch][weights == 2]
        left_out = sorted(set(range(500)) - set(places[epoch].tolist()))
        now = losses[epoch]
        assert now[easy].max() <= now[hard].min()
        assert now[left_out].isfinite().sum() >= len(easy)
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["train_accuracy"] <= 1 for line in lines)


def test_loss_and_gradient_are_those_of_the_weighted_mean(tiny_config: Path) -> None:
    changes = ["train.micro_batch_size=20", "train.nesterov=false"]
    setup = prepare(skipping(tiny_config, *changes, "runtime.precision=float32"))
    setup.model.double()
    run = Run.start(setup)
    plain = copy.deepcopy(run.model).train()
    run.model.train()
    batch = next(run.batches())
    batch = replace(batch, weights=1.0 + torch.arange(len(batch)) % 2)
    loss, num_correct, num_counted = training_step(run, batch)
    parts = list(batch.parts(20))
    assert len(parts) > 1
    logits = torch.cat([plain(part.images) for part in parts])
    each = F.cross_entropy(logits, batch.labels, label_smoothing=0.1, reduction="none")
    expected = (each * batch.weights).sum() / batch.weights.sum()
    expected.backward()
    assert num_counted == batch.weights.sum()
    assert num_correct == ((logits.argmax(1) == batch.labels) * batch.weights).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, theirs in zip(run.model.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    assert torch.equal(run.image_losses.latest[batch.places], each.detach().float())


@pytest.mark.parametrize("stop_at", [4, 15, 23, 28])
def test_a_run_resumed_within_or_after_an_epoch_that_leaves_out_images_ends_with_the_same_bits(
    tiny_config: Path, tmp_path: Path, stop_at: int
) -> None:
    """Asked after each of 10 steps and before both test batches: 23 is in the evaluation after epoch 2."""
    config = skipping(tiny_config)
    train(config, tmp_path / "whole")
    calls = iter(range(1, 1000))
    with pytest.raises(StoppedError):
        train(config, tmp_path / "run", stop=lambda: next(calls) == stop_at)
    train(config, tmp_path / "run", resume=True)
    whole, resumed = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "run"))
    for key, value in whole.state_dict.items():
        assert torch.equal(value, resumed.state_dict[key])
    assert whole.image_losses.keys() == {"latest", "at_start"}
    for key, value in whole.image_losses.items():
        assert torch.equal(value, resumed.image_losses[key])


def test_a_step_that_is_undone_leaves_the_losses_as_they_were(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_a_step(run: Run, batch: Batch):
        if run.step == 2:
            run.image_losses.latest.zero_()
            raise KeyboardInterrupt
        return training_step(run, batch)

    monkeypatch.setattr("bncli.training.loop.training_step", half_a_step)
    with pytest.raises(KeyboardInterrupt):
        train(skipping(tiny_config), tmp_path / "run")
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert last.step == 2
    assert not (last.image_losses["latest"] == 0).any()
    assert last.image_losses["latest"].isfinite().any()


def test_batches_that_would_be_too_small_are_refused_before_the_first_step(tiny_config: Path) -> None:
    changes = [
        "train.batch_size=3",
        "train.skip_easy=0.49",
        "model.widths=[4,4,4,4,4]",
        "model.blocks_per_stage=2",
    ]
    with pytest.raises(ConfigError, match=r"train\.skip_easy: 0\.49 leaves BatchNorm one value per channel"):
        prepare(load_config(tiny_config, changes))
    with pytest.raises(ConfigError, match=r"train\.skip_easy: .*less than 0\.5"):
        load_config(tiny_config, ["train.skip_easy=0.5"])
