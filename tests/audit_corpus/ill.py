"""Ill networks: each with what happened to it, and the rule or flag that has to name it."""

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

from tests.audit_corpus.averages import averages
from tests.audit_corpus.case import ANY, ERROR, LOUD, Case, Severities, file
from tests.audit_corpus.learning import inputs, seeded, train
from tests.audit_corpus.networks import trained_network
from tests.audit_corpus.observed import observe, write_observed
from tests.audit_corpus.small import (
    SIZE,
    SmallResNet,
    convolution_and_norm,
    noise,
    norms,
    set_norm,
    small_resnet,
    track,
    trained,
    trained_on,
)

State = dict[str, Tensor]


def save(stem: Path, content: object, part: str = ".pt") -> None:
    torch.save(content.state_dict() if isinstance(content, nn.Module) else content, file(stem, part))


def _reset(model: nn.Module) -> nn.Module:
    for layer in norms(model):
        layer.reset_running_stats()
    return model


# --- never updated


def fresh(stem: Path) -> None:
    save(stem, small_resnet())


def lost_on_loading(stem: Path, *, counters: bool) -> None:
    """Trained weights loaded with strict=False from a file that has no buffers."""
    model = small_resnet()
    state = trained().state_dict()
    parameters = {name: state[name] for name, _ in model.named_parameters()}
    model.load_state_dict(parameters, strict=False)
    kept = model.state_dict()
    save(stem, {k: v for k, v in kept.items() if counters or not k.endswith("num_batches_tracked")})


def momentum_0(stem: Path, *, module: bool) -> None:
    model = _with_momentum(0.0, 50)
    torch.save(model if module else model.state_dict(), file(stem))


def one_layer_reset(stem: Path) -> None:
    model = trained()
    norms(model)[4].reset_running_stats()
    save(stem, model)


def parameters_averaged(stem: Path) -> None:
    """The average of a copy's parameters, whose buffers nobody moved."""
    model = small_resnet()
    average = copy.deepcopy(model)

    def update(_: int, model: nn.Module) -> None:
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 0.1)

    train(model, 100, after_step=update)
    save(stem, average)


# --- what is left of (0, 1)


def short(num_steps: int, stem: Path, *, module: bool = False) -> None:
    model = train(small_resnet(), num_steps)
    torch.save(model if module else model.state_dict(), file(stem))


@seeded
def _with_momentum(momentum: float, num_steps: int) -> nn.Module:
    return train(set_norm(small_resnet(), momentum=momentum), num_steps)


def slow(momentum: float, num_steps: int, stem: Path, *, module: bool = False) -> None:
    model = _with_momentum(momentum, num_steps)
    torch.save(model if module else model.state_dict(), file(stem))


def published(name: str, stem: Path, *, adam: bool = True) -> None:
    """A network of torchvision's whose momentum is too small for 50 steps."""
    model = trained_network("torchvision", name, 50, adam=adam)
    save(stem, model)
    update_bn(inputs(32, 32, 25), model)  # what is true of its channels shows at statistics that fit
    write_observed(observe(model, inputs(32, 64, 4)), file(stem))


# --- averaged


def issue_f2(stem: Path) -> None:
    model = convolution_and_norm()
    average = {name: value.clone() for name, value in model.state_dict().items()}
    for images in noise(500, 32, 3, 8, 8):
        model(images)
        for name, value in model.state_dict().items():
            average[name].copy_(0.9999 * average[name] + 0.0001 * value)
    save(stem, average)


def averaged(kind: str, stem: Path) -> None:
    save(stem, averages()[kind])


def average_of_checkpoints(stem: Path) -> None:
    """The mean of three state dicts, key by key."""
    states = [trained().state_dict(), trained_on().state_dict()]
    states.append(train(trained_on(), 20, learning_rate=0.01, seed=11).state_dict())
    save(stem, {name: torch.stack([s[name].float() for s in states]).mean(0) for name in states[0]})


def _stale_average() -> tuple[nn.Module, AveragedModel]:
    """Weights averaged without `update_bn`: the buffers are the live network's."""
    model = trained().train()
    average = AveragedModel(model)
    train(model, 30, seed=5, after_step=lambda s, m: average.update_parameters(m) if s % 10 == 0 else None)
    return model, average


def stale_average(stem: Path) -> None:
    save(stem, _stale_average()[1])


def stale_average_pair(stem: Path, *, wrapped: bool) -> None:
    model, average = _stale_average()
    save(stem, model, ".first.pt")
    save(stem, average if wrapped else average.module, ".second.pt")


# --- one batch


def issue_f4(momentum: float, stem: Path) -> None:
    model = convolution_and_norm(momentum=momentum)
    track(model, noise(100, 32, 3, 8, 8))
    torch.save(model, file(stem))


def converted_momentum(momentum: float, stem: Path, *, module: bool) -> None:
    """Keras's 0.99 or ONNX's 0.9, the weight of the old value, taken over as PyTorch's."""
    model = _with_momentum(momentum, 100)
    torch.save(model if module else model.state_dict(), file(stem))


def one_batch(stem: Path) -> None:
    model = trained()
    update_bn(inputs(SIZE, 32, 1), model)
    save(stem, model)


# --- broken numbers


def _changed(name: str, channel: int, value: float, stem: Path) -> None:
    state = trained().state_dict()
    state[name][channel] = value
    save(stem, state)


def extrapolated(stem: Path) -> None:
    """A task vector applied eightfold, to the buffers too."""
    before, after = trained().state_dict(), trained_on().state_dict()
    state = {
        name: value + 8 * (after[name] - value) if value.is_floating_point() else after[name]
        for name, value in before.items()
    }
    if all(state[name].min() >= 0 for name in state if name.endswith("running_var")):
        raise RuntimeError("no variance became negative")
    save(stem, state)


def stuck_in_bfloat16(stem: Path) -> None:
    """Updates below the resolution of bfloat16 are lost."""
    model = convolution_and_norm(momentum=0.01).bfloat16()
    track(model, [values.bfloat16() for values in noise(600, 16, 3, 8, 8)])
    save(stem, model)


# --- counters


class Recomputing(SmallResNet):
    """Its last block is computed again for the backward pass."""

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits."""
        values = self.blocks[:2](self.stem(images))
        values = checkpoint(self.blocks[2], values, use_reentrant=False)
        return self.head(values.mean((2, 3)))


def recomputed(stem: Path) -> None:
    save(stem, train(Recomputing().train(), 60))


def missed_batches(stem: Path) -> None:
    """A layer that only took part in some batches: the block around it is skipped at random."""
    model = small_resnet()
    skipped = torch.rand(60) < 0.4
    layer = model.blocks[2].bn2

    def choose(step: int, _: nn.Module) -> None:
        layer.train(bool(skipped[step - 1]))

    save(stem, train(model, 60, after_step=choose))


# --- channels


def _scaled_input(scale: float, offset: float, stem: Path) -> None:
    """Data in other units than a network expects."""
    model = convolution_and_norm()
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.zero_()
    save(stem, track(model, [torch.randn(32, 3, 8, 8) * scale + offset for _ in range(300)]))


# --- no statistics


def without_statistics(stem: Path, *, module: bool) -> None:
    model = SmallResNet()
    for layer in norms(model):
        layer.track_running_stats = False
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    model = train(model.train(), 20)
    torch.save(model if module else model.state_dict(), file(stem))


# --- pairs


def ranks(stem: Path) -> None:
    """Two processes of one run: equal weights, each with the statistics of its own images."""
    for rank, part in enumerate(PAIR):
        save(stem, track(trained(), inputs(SIZE, 32, 30, seed=20 + rank)), part)


def teacher(stem: Path) -> None:
    """A teacher that was to give targets only, left in train mode."""
    model, student = trained().train(), small_resnet()
    save(stem, model, PAIR[0])

    def distil(step: int, student: nn.Module) -> None:
        images = inputs(SIZE, 32, 1, seed=step)[0]
        with torch.no_grad():
            model(images)

    train(student, 30, after_step=distil)
    save(stem, model, PAIR[1])


def linear_probe(stem: Path) -> None:
    """Only the head learns, on other images, and the backbone is in train mode."""
    model = trained().train()
    save(stem, model, PAIR[0])
    optimizer = torch.optim.SGD(model.head.parameters(), 0.05)
    for images in inputs(SIZE, 32, 30, seed=4):
        loss = F.cross_entropy(model(images * 0.5 + 1), torch.randint(10, (32,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save(stem, model, PAIR[1])


def other_eps(stem: Path) -> None:
    for eps, part in zip((1e-5, 1e-3), PAIR, strict=True):
        torch.save(set_norm(trained(), eps=eps), file(stem, part))


def other_eps_alone(stem: Path) -> None:
    torch.save(set_norm(trained(), eps=1e-3), file(stem))


PAIR = (".first.pt", ".second.pt")
START = "BN001"
LEFT = "BN002 BN014"
MOVED, STALE = "statistics_moved_weights_unchanged", "weights_moved_statistics_unchanged"


def ill_cases() -> Iterator[Case]:
    """In the order of the functions above."""

    def case(
        name: str,
        what: str,
        expected: str,
        make: Callable[..., None],
        *values: Any,
        accepted: Severities = LOUD,
        facts: str = "",
        blind: str = "",
        parts: tuple[str, ...] = (".pt",),
        **named: Any,
    ) -> Case:
        return Case(
            f"ill/{name}",
            what,
            functools.partial(make, *values, **named),
            frozenset(expected.split()),
            accepted,
            frozenset(facts.split()),
            blind,
            parts,
        )

    yield case("fresh", "from the constructor", START, fresh)
    yield case("lost-on-loading", "trained weights, (0, 1), counter 0", START, lost_on_loading, counters=True)
    # the same numbers as absorbed statistics
    yield case(
        "lost-no-counter",
        "trained weights, (0, 1), no counter",
        START,
        lost_on_loading,
        counters=False,
        accepted=ANY,
    )
    yield case("momentum-0", "momentum 0, 50 steps, pickled module", START, momentum_0, module=True)
    yield case("momentum-0-state", "the same, state dict", START, momentum_0, module=False)
    yield case("one-layer-reset", "one of ten layers reset", START, one_layer_reset)
    yield case("parameters-averaged", "an average without buffers", START, parameters_averaged)

    for num in (3, 10):
        yield case(f"short-{num}", f"{num} steps, momentum 0.1", LEFT, short, num)
    # in a state dict the same as update_bn with 20 batches
    yield case("short-20", "20 steps, momentum 0.1", LEFT, short, 20, accepted=ANY)
    yield case("short-10-module", "10 steps, pickled module", LEFT, short, 10, module=True)
    yield case("slow-0.001", "momentum 0.001, 100 steps, state dict", LEFT, slow, 0.001, 100)
    yield case("slow-0.001-module", "the same, pickled module", LEFT, slow, 0.001, 100, module=True)
    yield case("slow-0.01", "momentum 0.01, 50 steps, state dict", LEFT, slow, 0.01, 50)
    yield case("slow-0.01-module", "the same, pickled module", LEFT, slow, 0.01, 50, module=True)
    yield case("mnasnet0_5", "torchvision's, momentum 0.0003, 50 steps", LEFT, published, "mnasnet0_5")
    yield case(
        "mnasnet0_5-wild", "the same at a rate too high", LEFT, published, "mnasnet0_5", adam=False,
        blind="variances far above 1; that all layers have one floor, 0.985, shows it, but no rule asks",
    )  # fmt: skip
    yield case(
        "mobilenet_v3_small", "torchvision's, momentum 0.01, 50 steps", LEFT, published, "mobilenet_v3_small"
    )

    yield case("issue-f2", "the issue's f2: decay 0.9999, 500 steps", "BN014", issue_f2)
    yield case("state-averaged", "the same of ten layers, 400 steps", "BN014", averaged, "state")
    yield case("state-averaged-float", "the same in floats", "BN014 BN009", averaged, "floats")
    yield case("timm-ema-v2", "ModelEmaV2, decay 0.9999, 400 steps", "BN014", averaged, "v2-0.9999")
    yield case("timm-ema-v3", "ModelEmaV3, decay 0.9999, 400 steps", "BN014", averaged, "v3-0.9999")
    yield case(
        "timm-ema-v3-no-step", "the same, warm-up without update(step=)", "BN014", averaged, "v3-no-step"
    )
    yield case(
        "torch-ema", "AveragedModel with buffers, 0.999, 400 steps", "BN009 BN014", averaged, "torch-0.999"
    )
    yield case("mean-of-checkpoints", "three state dicts averaged", "BN009", average_of_checkpoints)
    yield case(
        "swa-stale", "AveragedModel without update_bn", "BN009 BN014", stale_average,
        blind="the statistics are a network's; a comparison with the live one tells",
    )  # fmt: skip
    yield case(
        "pair-swa-stale", "the live network and it", STALE, stale_average_pair, wrapped=False, parts=PAIR
    )
    yield case("pair-swa-wrapped", "the same, wrapped", STALE, stale_average_pair, wrapped=True, parts=PAIR)

    yield case("issue-f4", "the issue's f4: momentum 0.99, module", "BN015", issue_f4, 0.99)
    yield case("momentum-1", "momentum 1, pickled module", "BN015", issue_f4, 1.0)
    yield case(
        "keras-0.99", "momentum 0.99, 100 steps, module", "BN015", converted_momentum, 0.99, module=True
    )
    yield case("onnx-0.9", "momentum 0.9, 100 steps, module", "BN015", converted_momentum, 0.9, module=True)
    yield case(
        "keras-0.99-state", "momentum 0.99, state dict", "BN015", converted_momentum, 0.99, module=False,
        blind="a state dict has no momentum, and one batch's numbers look like many's",
    )  # fmt: skip
    # one batch of all images is rare, and right
    yield case("one-batch", "update_bn with one batch: counter 1", "BN015 BN002", one_batch, accepted=ANY)

    layer = "blocks.1.bn1"
    yield case(
        "nan", "a NaN in running_mean", "BN003", _changed, f"{layer}.running_mean", 3, float("nan"),
        accepted=ERROR,
    )  # fmt: skip
    yield case(
        "infinite", "an infinite running_var", "BN003", _changed, f"{layer}.running_var", 3, float("inf"),
        accepted=ERROR,
    )  # fmt: skip
    yield case("extrapolated", "an extrapolated network", "BN004", extrapolated, accepted=ERROR)
    yield case(
        "bfloat16-stuck", "bfloat16 statistics, momentum 0.01", "BN014", stuck_in_bfloat16,
        blind="no rule: statistics that stopped on their way look like others",
    )  # fmt: skip
    yield case("recomputed", "activation checkpointing of one block", "BN011", recomputed)
    yield case(
        "missed-batches",
        "a layer that missed batches, and so is short",
        "BN010",
        missed_batches,
        facts="BN002",
    )
    yield case("dead", "a weight of 0", "BN006", _changed, f"{layer}.weight", 3, 0.0, accepted=ANY)
    yield case("steep", "a weight of 10,000", "BN007", _changed, f"{layer}.weight", 3, 1e4)
    yield case("switched-off", "a bias of -10", "BN008", _changed, f"{layer}.bias", 3, -10.0, accepted=ANY)
    yield case("small-input", "input of deviation 0.001", "BN005", _scaled_input, 1e-3, 0.0, accepted=ANY)
    yield case("offset-input", "input of mean 1000, deviation 1", "BN012", _scaled_input, 1.0, 1000.0)
    yield case(
        "no-statistics",
        "track_running_stats=False, module",
        "BN013",
        without_statistics,
        module=True,
        accepted=ERROR,
    )
    yield case("no-statistics-state", "the same, state dict", "refused", without_statistics, module=False)
    yield case(
        "other-eps", "eps 1e-3 in place of 1e-5, module", "BN005", other_eps_alone,
        blind="nothing says which eps it was trained with",
    )  # fmt: skip

    yield case("pair-ranks", "two ranks of one run", MOVED, ranks, parts=PAIR)
    yield case("pair-teacher", "a teacher left in train mode", MOVED, teacher, parts=PAIR)
    yield case("pair-linear-probe", "a linear probe in train mode", MOVED, linear_probe, parts=PAIR)
    yield case(
        "pair-other-eps", "modules of eps 1e-5 and 1e-3", "hyperparameters_changed", other_eps, parts=PAIR
    )
