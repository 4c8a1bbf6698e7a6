import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bncli.checkpoints import load_checkpoint, load_model
from bncli.config import Config
from bncli.config_file import load_config
from bncli.data import load_dataset, training_batches
from bncli.errors import ConfigError, RunError
from bncli.models.convnet import build_model
from bncli.training import EpochDone, Started, StepDone, prepare, train
from bncli.training.loop import training_step
from bncli.training.optimizer import learning_rate_at
from bncli.training.run import Run
from tests.conftest import Bncli


def same_tensors(first: Path, second: Path) -> bool:
    """Bit for bit: weights, running statistics and the optimiser's momentum."""
    a, b = load_checkpoint(first), load_checkpoint(second)
    assert a.state_dict.keys() == b.state_dict.keys()
    pairs = [(a.state_dict[key], b.state_dict[key]) for key in a.state_dict]
    states = [checkpoint.optimizer["state"] for checkpoint in (a, b)]
    pairs += [(states[0][k]["momentum_buffer"], states[1][k]["momentum_buffer"]) for k in states[0]]
    return all(torch.equal(left, right) for left, right in pairs)


def metrics_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_configuration_metrics_and_two_checkpoints(
    finished_run: Path, tiny_config: Path
) -> None:
    assert {path.name for path in finished_run.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "last.pt",
        "best.pt",
        ".lock",
    }
    assert load_config(finished_run / "config.yaml") == load_config(tiny_config)
    metrics = metrics_of(finished_run)
    assert [line["epoch"] for line in metrics] == [1, 2]
    assert [line["step"] for line in metrics] == [10, 20]
    assert load_checkpoint(finished_run / "best.pt").test_accuracy == max(
        line["test_accuracy"] for line in metrics
    )


def test_the_metrics_hold_the_running_statistics_of_every_layer(finished_run: Path) -> None:
    state = load_checkpoint(finished_run / "last.pt").state_dict
    layers = metrics_of(finished_run)[-1]["layers"]
    assert [layer["name"] for layer in layers] == ["stages.0.0.norm", "stages.1.0.norm"]
    for layer in layers:
        for which in ("running_mean", "running_var"):
            expected = state[f"{layer['name']}.{which}"].double().norm().item()
            assert layer[f"{which}_norm"] == pytest.approx(expected)
        assert 0 < layer["mean_shift"] < 10
        assert 0.1 < layer["var_ratio"] < 10


def test_the_saved_accuracy_is_that_of_the_saved_weights(finished_run: Path) -> None:
    checkpoint = load_checkpoint(finished_run / "last.pt")
    test = load_dataset(checkpoint.config.data).test
    with torch.no_grad():
        logits = load_model(checkpoint)(test.images)
    assert (logits.argmax(1) == test.labels).double().mean().item() == checkpoint.test_accuracy
    assert F.cross_entropy(logits, test.labels).item() == pytest.approx(checkpoint.test_loss, rel=1e-4)


def test_a_step_is_that_of_plain_pytorch(tiny_config: Path) -> None:
    """The oracle: the same network, contiguous, trained with a loop written out here.

    Both in float64: in float32 a sum's last bit now and then decides which pixel a pool takes, and from
    there on the two differ by far more than rounding, on one kind of processor and not on another.
    """
    config = load_config(tiny_config, ["train.weight_decay=0.01"])
    setup = prepare(config)
    run = Run.start(setup)
    run.model.double().train()
    plain = build_model(
        config.model,
        10,
        image_size=32,
        mean=setup.normalization.mean,
        std=setup.normalization.std,
        seed=config.train.seed,
    )
    plain.double().train()
    velocity = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    batches = training_batches(
        setup.dataset.train, setup.plan, config.augment, seed=0, epoch=0, fill=setup.normalization.mean
    )
    for step, (pixels, labels) in enumerate(batches):
        images = pixels.double()
        loss, hits = training_step(run, images, labels)
        logits = plain(images)
        expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        assert hits == (logits.argmax(1) == labels).sum()
        plain.zero_grad()
        expected.backward()
        rate = learning_rate_at(step, setup.num_steps, config.train)
        with torch.no_grad():
            for name, p in plain.named_parameters():
                gradient = p.grad + (0.01 * p if p.ndim > 1 else 0)
                velocity[name] = 0.9 * velocity[name] + gradient
                p.sub_(rate * (gradient + 0.9 * velocity[name]))  # Nesterov
        assert run.learning_rate == rate
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[key], value, rtol=1e-10, atol=1e-12)


def test_every_epoch_sees_the_same_images_in_another_order(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def recording(run: Run, images: torch.Tensor, labels: torch.Tensor):
        seen[run.epoch].append(labels)
        return training_step(run, images, labels)

    monkeypatch.setattr("bncli.training.loop.training_step", recording)
    train(load_config(tiny_config), tmp_path / "run")
    first, second = (torch.cat(batches) for batches in seen.values())
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)


@pytest.mark.parametrize(
    ("precision", "threads", "optimizer"),
    [
        ("float32", 1, "sgd"),
        # where other processes take the cores, two threads wait for each other
        pytest.param("float32", 2, "sgd", marks=pytest.mark.slow),
        ("bfloat16", 1, "sgd"),
        pytest.param("bfloat16", 2, "sgd", marks=pytest.mark.slow),
        ("bfloat16", 1, "muon"),
    ],
)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    tiny_config: Path, tmp_path: Path, precision: str, threads: int, optimizer: str
) -> None:
    overrides = [
        "train.epochs=3",
        f"train.optimizer={optimizer}",
        "augment.small_epochs=1",
        f"runtime.precision={precision}",
        f"runtime.threads={threads}",
    ]
    config = load_config(tiny_config, [*overrides, "augment.cutout=8", "train.last_batch=keep"])
    train(config, tmp_path / "whole")

    class KilledError(Exception):
        pass

    def kill_in_epoch_3(event: Started | StepDone | EpochDone) -> None:
        if isinstance(event, StepDone) and event.epoch == 3 and event.step == 24:
            raise KilledError

    with pytest.raises(KilledError):
        train(config, tmp_path / "resumed", report=kill_in_epoch_3)
    assert load_checkpoint(tmp_path / "resumed" / "last.pt").epoch == 2
    result = train(config, tmp_path / "resumed", resume=True)
    assert result.epochs == 3
    assert same_tensors(tmp_path / "whole" / "last.pt", tmp_path / "resumed" / "last.pt")
    for whole, resumed in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "resumed"), strict=True):
        for key in ("epoch", "step", "train_loss", "test_accuracy", "layers"):
            assert whole[key] == resumed[key]


def test_what_a_kill_left_of_any_file_goes_when_the_run_is_resumed(
    finished_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    config = load_config(run_dir / "config.yaml", ["train.recalibrate=precise"])
    train(config, run_dir, resume=True)
    names = {path.name for path in run_dir.iterdir()}
    assert "recalibrated.pt" in names
    for name in names - {".lock"}:
        (run_dir / f".{name}.abcd_123.tmp").write_text("half of it")
    train(config, run_dir, resume=True)
    assert {path.name for path in run_dir.iterdir()} == names


def test_only_every_so_many_epochs_and_the_last_are_evaluated(
    bncli: Bncli, tiny_config: Path, tmp_path: Path
) -> None:
    """Which changes nothing else: weights and evaluations have the bits of a run with all of them."""
    overrides = ["train.epochs=5", "augment.crop_epochs=3"]
    train(load_config(tiny_config, overrides), tmp_path / "all")
    arguments = [part for one in [*overrides, "train.evaluate_every=3"] for part in ("--set", one)]
    outcome = bncli("train", tiny_config, "--run-dir", tmp_path / "some", *arguments)
    assert outcome.code == 0
    rows = [line.split() for line in outcome.err.splitlines() if line.split()[0] in {*"12345"}]
    assert [row[3] == row[4] == "-" for row in rows] == [True, True, False, True, False]
    whole, some = metrics_of(tmp_path / "all"), metrics_of(tmp_path / "some")
    for one, other in zip(whole, some, strict=True):
        is_evaluated = one["epoch"] in {3, 5}
        assert other["test_accuracy"] == (one["test_accuracy"] if is_evaluated else None)
        assert other["test_loss"] == (one["test_loss"] if is_evaluated else None)
        assert other["train_loss"] == one["train_loss"]
    assert same_tensors(tmp_path / "all" / "last.pt", tmp_path / "some" / "last.pt")
    best = load_checkpoint(tmp_path / "some" / "best.pt")
    assert best.test_accuracy == max(one["test_accuracy"] for one in whole if one["epoch"] in {3, 5})


def test_a_run_resumed_after_an_epoch_without_evaluation_ends_with_the_same_bits(
    tiny_config: Path, tmp_path: Path
) -> None:
    config = load_config(tiny_config, ["train.epochs=4", "train.evaluate_every=3"])
    train(config, tmp_path / "whole")

    def kill_after_epoch_2(event: Started | StepDone | EpochDone) -> None:
        if isinstance(event, EpochDone) and event.metrics["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "resumed", report=kill_after_epoch_2)
    last = load_checkpoint(tmp_path / "resumed" / "last.pt")
    assert (last.epoch, last.test_accuracy, (last.running_epoch or {})["num_steps"]) == (2, None, 0)
    train(config, tmp_path / "resumed", resume=True)
    assert same_tensors(tmp_path / "whole" / "last.pt", tmp_path / "resumed" / "last.pt")
    whole, resumed = (load_checkpoint(tmp_path / name / "best.pt") for name in ("whole", "resumed"))
    assert whole.epoch == resumed.epoch
    assert all(torch.equal(whole.state_dict[key], value) for key, value in resumed.state_dict.items())
    assert [one["epoch"] for one in metrics_of(tmp_path / "resumed")] == [1, 2, 3, 4]


def test_the_whitening_filters_are_fitted_before_training_and_never_trained(
    tiny_config: Path, tmp_path: Path
) -> None:
    config = load_config(tiny_config, ["model.whitening=true"])
    fitted = prepare(config).model.whiten.conv.weight
    train(config, tmp_path / "run")
    trained = load_model(tmp_path / "run" / "last.pt").whiten.conv.weight
    assert torch.equal(fitted, trained)
    assert fitted.abs().max() > 0.5  # fitted: PyTorch's initial weights are below 0.3


def test_the_whitening_filters_are_fitted_to_images_from_the_first_class_to_the_last(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is sorted by class: of 300 images the first 200 would leave out the last classes."""
    monkeypatch.setattr("bncli.training.setup.NUM_WHITENING_IMAGES", 200)
    setup = prepare(load_config(tiny_config, ["model.whitening=true", "data.num_train=300"]))
    whiten = setup.model.whiten
    fitted = whiten.conv.weight.clone()
    two_of_three = torch.arange(300) % 3 != 2
    whiten.fit(setup.model.normalize(setup.dataset.train.images[two_of_three]))
    assert torch.equal(fitted, whiten.conv.weight)


def test_a_run_interrupted_in_its_first_epoch_starts_again(tiny_config: Path, tmp_path: Path) -> None:
    config = load_config(tiny_config)

    def kill(event: Started | StepDone | EpochDone) -> None:
        if isinstance(event, StepDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", report=kill)
    assert train(config, tmp_path / "run", resume=True).epochs == 2


def test_metrics_of_epochs_after_the_checkpoint_are_run_again_not_doubled(
    finished_run: Path, tiny_config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "step": 30}\n{"epoch": 4, "st')  # a crash before the checkpoint
    train(load_config(tiny_config, ["train.epochs=3"]), run_dir, resume=True)
    assert [line["epoch"] for line in metrics_of(run_dir)] == [1, 2, 3]


def test_resuming_a_finished_run_changes_nothing(
    finished_run: Path, tiny_config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    result = train(load_config(tiny_config), run_dir, resume=True)
    assert result.test_accuracy == load_checkpoint(run_dir / "last.pt").test_accuracy
    for name in ("last.pt", "best.pt", "metrics.jsonl"):
        assert (run_dir / name).read_bytes() == (finished_run / name).read_bytes()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate=0.2", r"train\.learning_rate was 0\.1, now 0\.2"),
        ("model.widths=[8, 32]", r"model\.widths was \(8, 16\), now \(8, 32\)"),
        ("data.seed=1", r"data\.seed was 0, now 1"),
    ],
)
def test_resuming_with_another_configuration_is_refused_with_the_difference(
    finished_run: Path, tiny_config: Path, override: str, expected: str
) -> None:
    with pytest.raises(RunError, match=expected):
        train(load_config(tiny_config, [override]), finished_run, resume=True)


def test_a_directory_that_holds_something_is_never_overwritten(tiny_config: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        train(load_config(tiny_config), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]


@pytest.mark.parametrize("batch_size", [50, 33, 499])
@pytest.mark.parametrize("last_batch", ["keep", "drop"])
def test_a_ragged_last_batch_never_breaks_batch_norm(
    tiny_config: Path, tmp_path: Path, batch_size: int, last_batch: str
) -> None:
    """8x8 pixels after three stages are one value per channel; 499 leaves a last batch of one image."""
    overrides = [
        "model.widths=[4, 4, 4, 4, 4]",
        "model.blocks_per_stage=2",
        f"train.batch_size={batch_size}",
        f"train.last_batch={last_batch}",
        "train.epochs=1",
    ]
    config = load_config(tiny_config, overrides)
    setup = prepare(config)
    assert min(setup.plan.batch_sizes) >= 2
    train(config, tmp_path / "run")


def test_a_batch_size_that_batch_norm_cannot_take_is_refused_before_the_first_step(
    tiny_config: Path,
) -> None:
    deep = ["model.widths=[4, 4, 4, 4, 4]", "model.blocks_per_stage=2", "train.batch_size=1"]
    with pytest.raises(ConfigError, match=r"train\.batch_size"):
        prepare(load_config(tiny_config, deep))
    prepare(load_config(tiny_config, ["train.batch_size=1"]))  # maps of 16x16: one image is enough


def test_micro_batches_that_batch_norm_cannot_take_are_refused_before_the_first_step(
    tiny_config: Path,
) -> None:
    deep = ["model.widths=[4, 4, 4, 4, 4]", "model.blocks_per_stage=2", "train.batch_size=50"]
    with pytest.raises(ConfigError, match=r"^train\.micro_batch_size: 1 leaves BatchNorm one value"):
        prepare(load_config(tiny_config, [*deep, "train.micro_batch_size=1"]))
    prepare(load_config(tiny_config, [*deep, "train.micro_batch_size=3"]))  # 17 parts of 2 or 3


def test_the_batch_statistics_of_micro_batches_are_recovered_too(tiny_config: Path, tmp_path: Path) -> None:
    train(load_config(tiny_config, ["train.micro_batch_size=20"]), tmp_path / "run")
    tracked = load_checkpoint(tmp_path / "run" / "last.pt").state_dict["stages.0.0.norm.num_batches_tracked"]
    assert tracked == 2 * 10 * 3  # epochs, steps, parts
    for line in metrics_of(tmp_path / "run"):
        assert all(0 < layer["mean_shift"] < 10 for layer in line["layers"])
        assert all(0.1 < layer["var_ratio"] < 10 for layer in line["layers"])


def test_other_training_images_are_noticed_on_resume(
    finished_run: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_config)
    setup = prepare(config)
    other = prepare(load_config(tiny_config, ["data.seed=7"]))
    last = load_checkpoint(finished_run / "last.pt")
    object.__setattr__(setup, "normalization", other.normalization)
    with pytest.raises(RunError, match="pixel means were"):  # all that a file of version 1 can tell
        Run.restore(setup, replace(last, data_digest=None))


@pytest.mark.slow
def test_the_quickstart_learns_more_than_ninety_percent_in_a_minute(tmp_path: Path) -> None:
    path = Path(__file__).parent.parent.parent / "configs" / "quickstart.yaml"
    result = train(load_config(path), tmp_path / "run")
    assert result.test_accuracy > 0.9
    assert result.seconds < 60


def test_the_library_trains_from_a_configuration_made_in_code(tmp_path: Path) -> None:
    values = {
        "data": {"name": "synthetic", "num_train": 100, "num_test": 20},
        "model": {"widths": [4], "blocks_per_stage": 1},
        "train": {"epochs": 1, "batch_size": 50},
        "runtime": {"device": "cpu"},
    }
    result = train(Config.model_validate(values), tmp_path / "run")
    assert result.checkpoint.is_file()
