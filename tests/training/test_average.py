"""`train.ema_epochs`: averaged weights with statistics of their own, in what is evaluated and saved."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bncli.checkpoints import load_checkpoint, load_model
from bncli.config_file import load_config
from bncli.data import load_dataset, sample_batches
from bncli.training import train
from bncli.training.loop import training_step
from bncli.training.run import Run
from tests.conftest import Bncli

EMA = "train.ema_epochs=0.5"  # 5 steps


@pytest.fixture(scope="module")
def averaged_run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "averaged"
    train(load_config(tiny_config, [EMA]), run_dir)
    return run_dir


def test_the_saved_weights_are_the_average_of_those_after_every_step(
    tiny_config: Path, averaged_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle: a run without averaging, whose weights after every step are kept; summed in float64."""
    seen: list[dict[str, torch.Tensor]] = []

    def recording(run: Run, images: torch.Tensor, labels: torch.Tensor):
        result = training_step(run, images, labels)
        seen.append({name: weight.detach().double() for name, weight in run.model.named_parameters()})
        return result

    monkeypatch.setattr("bncli.training.loop.training_step", recording)
    train(load_config(tiny_config), tmp_path / "run")
    # a mean of the first 5, then an exponential average with a share of 1/5 for each that comes
    shares = torch.tensor([0.8**15 / 5] * 5 + [0.8**later / 5 for later in range(14, -1, -1)]).double()
    assert shares.sum() == pytest.approx(1)
    state = load_checkpoint(averaged_run / "last.pt").state_dict
    for name in seen[0]:
        expected = sum(share * weights[name] for share, weights in zip(shares, seen, strict=True))
        torch.testing.assert_close(state[name].double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(state[name].double(), seen[-1][name], rtol=1e-3)


def test_training_itself_is_that_of_a_run_without_averaging(finished_run: Path, averaged_run: Path) -> None:
    last, plain = (load_checkpoint(run / "last.pt") for run in (averaged_run, finished_run))
    assert last.averaging is not None
    for key, value in plain.state_dict.items():
        assert torch.equal(last.averaging["last"][key], value)


def test_the_saved_statistics_are_those_of_the_averaged_network(averaged_run: Path) -> None:
    """The oracle: mean and biased variance of what each layer sees in train mode, over all images at once."""
    checkpoint = load_checkpoint(averaged_run / "last.pt")
    model = load_model(checkpoint).double()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda _, inputs, n=name: seen.setdefault(n, []).append(inputs[0])
            )
    train_split = load_dataset(checkpoint.config.data).train
    model.train()
    with torch.no_grad():
        for images, _ in sample_batches(train_split, 50, 2000):  # all 500, in batches as in training
            model(images)
    assert len(seen) == 2
    for name, inputs in seen.items():
        values = torch.cat(inputs).transpose(0, 1).flatten(1)
        mean, var = (
            checkpoint.state_dict[f"{name}.running_mean"],
            checkpoint.state_dict[f"{name}.running_var"],
        )
        torch.testing.assert_close(mean.double(), values.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(var.double(), values.var(1, correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_the_saved_accuracy_is_that_of_the_saved_weights(averaged_run: Path, name: str) -> None:
    checkpoint = load_checkpoint(averaged_run / name)
    test = load_dataset(checkpoint.config.data).test
    with torch.no_grad():
        logits = load_model(checkpoint)(test.images)
    assert (logits.argmax(1) == test.labels).double().mean().item() == checkpoint.test_accuracy
    assert F.cross_entropy(logits, test.labels).item() == pytest.approx(checkpoint.test_loss, rel=1e-4)
    assert (checkpoint.averaging is None) == (name == "best.pt")


def test_what_is_made_of_an_averaged_checkpoint_is_not_to_be_continued(
    bncli: Bncli, averaged_run: Path, tmp_path: Path
) -> None:
    assert bncli("recalibrate", averaged_run / "last.pt", "-o", tmp_path / "made.pt").code == 0
    assert load_checkpoint(tmp_path / "made.pt").averaging is None


def test_a_network_without_running_statistics_is_refused_before_it_is_trained(
    bncli: Bncli, tiny_config: Path, tmp_path: Path
) -> None:
    arguments = ("--set", EMA, "--set", "model.batch_norm.track_running_stats=false")
    outcome = bncli("train", tiny_config, "--run-dir", tmp_path / "run", *arguments)
    assert outcome.code == 2
    assert "train.ema_epochs: 0.5 needs running statistics to measure; set it to null" in outcome.err
    assert not (tmp_path / "run").exists()


def test_with_a_horizon_below_a_step_it_is_the_last_weights(tiny_config: Path, tmp_path: Path) -> None:
    train(load_config(tiny_config, ["train.ema_epochs=0.01", "train.epochs=1"]), tmp_path / "run")
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert last.averaging is not None
    for name, average in last.averaging["average"].items():
        assert torch.equal(average, last.averaging["last"][name])
