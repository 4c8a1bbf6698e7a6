"""Training of networks that `model.name` names: all that holds for bncli's own, dropout included.

Compared with plain loops of PyTorch, and with uninterrupted runs.
"""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bncli.batchnorm import batch_norm_layers
from bncli.checkpoints import load_checkpoint, load_model
from bncli.config import Config, TrainConfig
from bncli.config_file import load_config
from bncli.data import load_dataset, training_batches
from bncli.errors import BncliError, ConfigError, DivergedError, StoppedError
from bncli.models import ConvNet, build_configured, build_network
from bncli.torchvision_compat import import_torchvision
from bncli.training import StepDone, describe_setup, prepare, train
from bncli.training.loop import training_step
from bncli.training.losses import loss_and_logits
from bncli.training.optimizer import build_optimizer
from bncli.training.run import Run
from tests.conftest import Bncli
from tests.faults.conftest import content_of, same_run

OWN = Path(__file__).parent / "own_networks.py"
BASE = """
data: {name: synthetic, num_train: 90, num_test: 30}
train: {epochs: 3, batch_size: 25, last_batch: keep, learning_rate: 0.05}
runtime: {device: cpu, precision: float32, threads: 1}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def config_of(base: Path, name: str, *changes: str) -> Config:
    name = name if ":" in name else f"{OWN}:{name}"
    return load_config(base, [f"model.name={name}", *changes])


def stop_after(step: int):
    """A `report` and a `stop` that end a run after so many steps."""
    seen = []
    return (
        lambda event: seen.append(event) if isinstance(event, StepDone) else None,
        lambda: len(seen) >= step,
    )


DROPOUT = ("small", "model.arguments.dropout=0.5")
SKIPPING = ("SkipsLayers",)
TORCHVISION = ("torchvision:mobilenet_v3_small", "model.arguments.dropout=0.5", "data.num_train=50")


@pytest.mark.parametrize(
    "network",
    [DROPOUT, SKIPPING, pytest.param(TORCHVISION, marks=pytest.mark.slow)],
    ids=["own", "skipping", "torchvision"],
)
@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(
    base: Path, tmp_path: Path, network: tuple[str, ...], step: int
) -> None:
    config = config_of(base, *network, "train.ema_epochs=0.5")
    step = min(step, 3) if network is TORCHVISION else step
    train(config, tmp_path / "whole")
    report, stop = stop_after(step)
    with pytest.raises(StoppedError):
        train(config, tmp_path / "parts", report=report, stop=stop)
    torch.rand(17)  # another program state than in the first session
    train(config, tmp_path / "parts", resume=True)
    assert same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    "changes",
    [[], ["model.arguments.key=scores", "model.logits=scores"], ["model.logits=-1"]],
    ids=["logits", "scores", "number"],
)
def test_of_several_outputs_the_logits_are_trained(
    base: Path, tmp_path: Path, bncli: Bncli, changes: list[str]
) -> None:
    """As if it returned them alone, also where a run goes on that was stopped, and is recalibrated."""
    also = ("train.recalibrate=exact", "train.ema_epochs=0.5")
    expected = train(config_of(base, *DROPOUT, *also), tmp_path / "alone")
    config = config_of(base, "Answers", "model.arguments.drop=0.5", *changes, *also)
    report, stop = stop_after(5)
    with pytest.raises(StoppedError):
        train(config, tmp_path / "dict", report=report, stop=stop)
    found = train(load_config(tmp_path / "dict" / "config.yaml"), tmp_path / "dict", resume=True)
    assert (found.test_loss, found.test_accuracy) == (expected.test_loss, expected.test_accuracy)
    for file in ("last.pt", "recalibrated.pt"):
        alone = load_checkpoint(tmp_path / "alone" / file)
        path = tmp_path / "dict" / file
        checkpoint = load_checkpoint(path, model=config.model.name)
        assert checkpoint.state_dict.keys() == {f"net.{key}" for key in alone.state_dict}
        for key, value in alone.state_dict.items():
            assert torch.equal(checkpoint.state_dict[f"net.{key}"], value)
    command = ("eval", path, "--model", config.model.name, "--json", "--num-images", 4)
    outcome = bncli(*command, "--batch-sizes", 2, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert outcome.json["accuracy"] == checkpoint.test_accuracy


def test_what_a_network_draws_is_a_matter_of_seed_epoch_and_step(base: Path) -> None:
    run = Run.start(prepare(config_of(base, *DROPOUT)))
    masks = []
    run.model[8].register_forward_pre_hook(lambda _, inputs: torch.ones_like(*inputs))
    run.model[8].register_forward_hook(lambda *passed: masks.append(passed[2] == 0))
    batch = next(run.batches())
    for epoch, step in [(0, 0), (0, 0), (0, 1), (1, 0)]:
        run.epoch, run.running_epoch.num_steps = epoch, step
        before = torch.random.get_rng_state()
        training_step(run, *batch)
        assert torch.equal(torch.random.get_rng_state(), before)
    same = [torch.equal(masks[0], mask) for mask in masks]
    assert same == [True, True, False, False]
    assert not torch.equal(masks[2], masks[3])


def test_first_weights_follow_from_the_seed_and_leave_the_callers_generator_alone(base: Path) -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        before = torch.random.get_rng_state()
        setup = prepare(config_of(base, "small", f"train.seed={seed}"))
        assert torch.equal(torch.random.get_rng_state(), before)
        return [weight.detach() for weight in setup.model.parameters()]

    torch.manual_seed(5)
    plain = [
        weight.detach() for weight in build_network(f"{OWN}:small", {"num_classes": 10}, seed=3).parameters()
    ]
    assert all(map(torch.equal, weights(3), plain))
    assert not torch.equal(weights(4)[0], plain[0])


def test_losses_are_those_of_a_plain_loop(base: Path) -> None:
    config = config_of(base, "small", "train.warmup=0.2", "runtime.memory_format=contiguous")
    losses = []
    run = Run.start(prepare(config))
    run.model.train()
    for images, labels in itertools.islice(run.batches(), 3):
        losses.append(training_step(run, images, labels)[0].item())
        run.running_epoch.num_steps += 1

    train_split = load_dataset(config.data).train
    pixels = train_split.images.double() / 255
    mean, std = (
        each[:, None, None].float() for each in (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0))
    )
    plain = build_network(f"{OWN}:small", {"num_classes": 10}, seed=0).train()
    vectors = [weight for weight in plain.parameters() if weight.ndim == 1]
    others = [weight for weight in plain.parameters() if weight.ndim > 1]
    optimizer = torch.optim.SGD(
        [{"params": others, "weight_decay": 5e-4}, {"params": vectors}], lr=0.05, momentum=0.9, nesterov=True
    )
    num_steps = 12  # of 3 epochs of 4
    batches = training_batches(train_split, run.setup.plan, config.augment, seed=0, epoch=0, fill=(0, 0, 0))
    for step, (images, labels) in enumerate(itertools.islice(batches, 3)):
        progress = (step + 0.5) / num_steps
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (progress / 0.2 if progress < 0.2 else (1 - progress) / 0.8)
        loss = F.cross_entropy(plain((images / 255 - mean) / std), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        ["train.recalibrate=exact"],
        ["train.recalibrate=precise", "train.ema_epochs=1"],
        ["train.micro_batch_size=10", "runtime.precision=bfloat16"],
        ["train.optimizer=muon", "train.head_learning_rate=0.01"],
    ],
    ids=lambda changes: changes[0],
)
def test_all_that_training_offers_is_there_and_what_is_saved_is_what_was_measured(
    base: Path, tmp_path: Path, changes: list[str]
) -> None:
    config = config_of(base, *DROPOUT, *changes)
    result = train(config, tmp_path / "run")
    checkpoint = load_checkpoint(result.checkpoint, model=config.model.name)
    assert (checkpoint.recalibration is not None) == ("recalibrate" in changes[0])
    assert checkpoint.config.model == config.model
    test = load_dataset(config.data).test
    logits = load_model(checkpoint)(test.images)
    if config.runtime.precision == "float32":
        assert (logits.argmax(1) == test.labels).double().mean().item() == result.test_accuracy
        assert F.cross_entropy(logits, test.labels).item() == pytest.approx(result.test_loss, rel=1e-4)


def test_a_step_that_ends_in_nan_is_undone_and_traced_with_the_same_dropout(
    base: Path, tmp_path: Path
) -> None:
    config = config_of(
        base, *SKIPPING, "train.learning_rate=1e19", "train.warmup=0", "train.checkpoint_unit=steps"
    )
    with pytest.raises(DivergedError, match=r"not a finite number in step (\d+).*it began in ") as caught:
        train(config, tmp_path / "run")
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert f"step {last.step}, the last good one, is saved" in str(caught.value)
    assert all(bool(tensor.isfinite().all()) for tensor in last.state_dict.values())
    report, stop = stop_after(last.step)
    with pytest.raises(StoppedError):  # as if it had been stopped there
        train(config, tmp_path / "stopped", report=report, stop=stop)
    assert content_of(tmp_path / "run" / "last.pt") == content_of(tmp_path / "stopped" / "last.pt")


@pytest.mark.parametrize("seed", range(3))
def test_a_bad_number_that_chance_made_is_found_where_it_began(base: Path, tmp_path: Path, seed: int) -> None:
    config = config_of(base, "Explodes", f"train.seed={seed}", "train.epochs=5")
    with pytest.raises(DivergedError, match="it began in the output of unlucky"):
        train(config, tmp_path / "run")


def test_weights_without_a_gradient_are_left_alone_as_in_pytorch() -> None:
    """With momentum a weight moves on after a step without a gradient, unless it is skipped."""
    config = TrainConfig(learning_rate=0.1)
    torch.manual_seed(0)
    ours = build_network(f"{OWN}:SkipsLayers", {"num_classes": 10})
    plain = build_network(f"{OWN}:SkipsLayers", {"num_classes": 10})
    ours_optimizer = build_optimizer(ours, config)
    theirs = torch.optim.SGD(
        [{"params": [weight], "weight_decay": 0.0 if weight.ndim == 1 or name == "scale" else 5e-4}
         for name, weight in plain.named_parameters()],
        lr=0.1, momentum=0.9, nesterov=True,
    )  # fmt: skip
    used = []
    for step in range(8):
        images = torch.rand(5, 3, 32, 32)
        for network, optimizer in ((ours, ours_optimizer), (plain, theirs)):
            torch.manual_seed(step)
            optimizer.zero_grad()
            F.cross_entropy(network(images), torch.arange(5)).backward()
            optimizer.step()
        used.append(ours.second.weight.grad is not None)
    assert set(used) == {True, False}
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(ours.parameters(), plain.parameters(), strict=True)
    )
    assert torch.equal(
        ours.never.weight, build_network(f"{OWN}:SkipsLayers", {"num_classes": 10}).never.weight
    )


def test_the_head_is_the_last_layer_and_scales_are_no_weights() -> None:
    network = build_network(f"{OWN}:SkipsLayers", {"num_classes": 10})
    names = {id(weight): name for name, weight in network.named_parameters()}
    groups = build_optimizer(
        network, TrainConfig(optimizer="muon", head_learning_rate=0.2, bias_learning_rate=0.3)
    ).param_groups
    found = [
        (group["muon"], group["lr"], group["weight_decay"], [names[id(weight)] for weight in group["params"]])
        for group in groups
    ]
    assert found == [
        (True, 0.5, 0.0, ["second.weight"]),
        (False, 0.5, 5e-4, ["first.weight", "never.weight"]),
        (False, 0.2, 5e-4, ["head.weight"]),
        (False, 0.3, 0.0, ["scale", *(f"{layer}.bias" for layer in ("first", "second")), "norm.weight"]
         + [f"{layer}.bias" for layer in ("norm", "never", "head")]),
    ]  # fmt: skip


def test_auxiliary_classifiers_have_the_weight_of_their_papers() -> None:
    models = import_torchvision().models
    logits, labels = torch.randn(3, 4, 5), torch.tensor([0, 3, 4, 1])
    each = [F.cross_entropy(one, labels, label_smoothing=0.1) for one in logits]
    loss, main = loss_and_logits(models.GoogLeNetOutputs(*logits), labels, 0.1)
    assert loss.item() == pytest.approx((each[0] + 0.3 * each[1] + 0.3 * each[2]).item())
    assert main is not None and torch.equal(main, logits[0])
    loss, _ = loss_and_logits(models.InceptionOutputs(logits[0], None), labels, 0.1)
    assert loss.item() == pytest.approx(each[0].item())
    loss, _ = loss_and_logits(models.InceptionOutputs(logits[0], logits[1]), labels, 0.1)
    assert loss.item() == pytest.approx((each[0] + 0.4 * each[1]).item())


def test_a_network_without_batchnorm_trains_and_its_weights_are_averaged(base: Path, tmp_path: Path) -> None:
    result = train(config_of(base, "without_norm", "train.ema_epochs=1"), tmp_path / "run")
    assert (result.num_batch_norm_layers, result.agreement) == (0, None)
    checkpoint = load_checkpoint(result.checkpoint)
    assert checkpoint.recalibration is None
    assert all(map(torch.equal, checkpoint.state_dict.values(), checkpoint.averaging["average"].values()))


def test_a_layer_that_sees_one_value_of_an_image_needs_two_images(base: Path) -> None:
    assert prepare(config_of(base, "deep")).plan.min_batch == 2
    assert prepare(config_of(base, "small")).plan.min_batch == 1
    with pytest.raises(ConfigError, match="BatchNorm would see one value per channel"):
        prepare(config_of(base, "deep", "train.batch_size=1"))
    with pytest.raises(ConfigError, match="leaves BatchNorm one value per channel"):
        prepare(config_of(base, "deep", "train.micro_batch_size=1"))


def test_a_dry_run_counts_what_pytorch_counts(base: Path) -> None:
    found = describe_setup(prepare(config_of(base, "SkipsLayers")))
    network = build_network(f"{OWN}:SkipsLayers", {"num_classes": 10})
    assert found.num_parameters == sum(weight.numel() for weight in network.parameters())
    # multiplications and additions of first (8x8 pixels) and head, which eval mode computes
    assert found.flops_per_image == 2 * 64 * 4 * 27 + 2 * 64 * 10 * 4


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("torchvision:resnet19", [], "torchvision has no such network; the nearest: resnet"),
        ("smal", [], "has no smal; the nearest: small"),
        ("small", ["model.arguments.drop=0.5"], "it has no argument drop; the nearest: dropout"),
        ("needs_more", [], "it needs depth: --model-arg depth=VALUE (train: --set model.arguments.depth="),
        ("raises", [], "making the network failed: ValueError: no network for 10 ("),
        ("no_module", [], "what it made is of type list, not a torch.nn.Module"),
        ("maps", [], "needs logits of shape (N, classes); in train mode it returns a tensor (2, 10, 32, 32)"),
        (
            "Answers",
            ["model.arguments.key=scores"],
            "in train mode it returns a dict with images, scores; --set model.logits=NAME takes one of them",
        ),
        (
            "Answers",
            ["model.logits=score"],
            "model.logits: there is no output 'score'; the network returns a dict with images, logits",
        ),
        ("five_classes", [], "it has 5 classes, but the data have 10"),
        ("too_deep", [], "cannot compute two images of 3x32x32 values in train mode: RuntimeError: "),
        ("lazy", [], "it has lazy layers"),
        ("untrained", [], "it has no weights to train"),
        ("without_norm", ["train.recalibrate=exact"], "train.recalibrate: "),
        ("torchvision:resnet18", ["model.arguments.weights=DEFAULT"], "weights: "),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_one_line_before_anything_is_written(
    base: Path, tmp_path: Path, name: str, changes: list[str], expected: str
) -> None:
    with pytest.raises(BncliError) as caught:
        train(config_of(base, name, *changes), tmp_path / "run")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("torchvision:resnet19", [], "torchvision has no such network"),
        ("small", ["model.arguments.drop=0.5"], "it has no argument drop"),
    ],
)
def test_a_misspelt_network_is_refused_before_images_are_looked_for(
    base: Path, tmp_path: Path, name: str, changes: list[str], expected: str
) -> None:
    config = config_of(base, name, *changes, "data={name: imagefolder, root: nowhere, image_size: 8}")
    with pytest.raises(BncliError, match=expected):
        train(config, tmp_path / "run")
    with pytest.raises(BncliError, match="nowhere"):  # of a network that there is
        train(config_of(base, "small", "data={name: imagefolder, root: nowhere, image_size: 8}"), tmp_path)


def test_convnet_by_its_own_name_is_what_it_was(base: Path) -> None:
    config = load_config(base, ["model.name=convnet", "model.widths=[4]"])
    assert config.model.widths == (4,)
    assert isinstance(build_configured(config.model, 3, image_size=32), ConvNet)
    assert len(batch_norm_layers(prepare(config).model)) == 2


def test_a_run_directory_may_move(base: Path, tmp_path: Path) -> None:
    config = config_of(base, *DROPOUT)
    report, stop = stop_after(2)
    with pytest.raises(StoppedError):
        train(config, tmp_path / "run", report=report, stop=stop)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    train(load_config(tmp_path / "moved" / "config.yaml"), tmp_path / "moved", resume=True)
    assert load_checkpoint(tmp_path / "moved" / "last.pt").epoch == 3
