"""Healthy networks with a history: measured, averaged, fine-tuned, frozen, absorbed, converted."""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import bncli
from bncli.torchvision_compat import import_torchvision
from tests.audit_corpus.averages import averages
from tests.audit_corpus.case import Case, file
from tests.audit_corpus.learning import NUM_CLASSES, inputs, train
from tests.audit_corpus.networks import trained_network
from tests.audit_corpus.observed import observe, write_observed
from tests.audit_corpus.small import (
    SIZE,
    Block,
    SmallResNet,
    convolution_and_norm,
    noise,
    norms,
    set_norm,
    small_resnet,
    track,
    trained,
)

State = dict[str, Tensor]


def save(
    stem: Path, model: nn.Module, content: object = None, *, seen: list[Any] | None = None, part: str = ".pt"
) -> None:
    """Write `content` (default: the state dict), and beside it what the network does on `seen`."""
    torch.save(model.state_dict() if content is None else content, file(stem, part))
    write_observed(observe(copy.deepcopy(model).float(), seen or inputs(SIZE, 64, 4)), file(stem, part))


# --- how the statistics came about


def momentum_none(stem: Path, *, module: bool) -> None:
    model = train(set_norm(small_resnet(), momentum=None), 50)
    save(stem, model, model if module else None)


def other_momentum(momentum: float, num_steps: int, stem: Path) -> None:
    model = train(set_norm(small_resnet(), momentum=momentum), num_steps)
    save(stem, model, model)


def bfloat16_training(stem: Path) -> None:
    model = small_resnet()
    # without the cache, which would keep the weights of the first step until the end
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        train(model, 50)
    save(stem, model)


def zero_init_residual(stem: Path) -> None:
    model = SmallResNet().train()
    for block in model.blocks:
        nn.init.zeros_(block.bn2.weight)
    save(stem, train(model, 50))


def synchronised(stem: Path, *, module: bool) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(trained())
    save(stem, model, model if module else None)


def after_update_bn(num_batches: int, stem: Path, *, module: bool = False) -> None:
    model = trained()
    update_bn(inputs(SIZE, 32, num_batches), model)
    save(stem, model, model if module else None)


def issue_f1(stem: Path) -> None:
    model = convolution_and_norm()
    model[0].weight.data *= 4
    track(model, noise(300, 32, 3, 8, 8))
    update_bn(noise(25, 32, 3, 8, 8), model)
    save(stem, model, seen=noise(20, 32, 3, 8, 8))


def mnasnet(stem: Path, *, adam: bool) -> None:
    """torchvision's has momentum 0.0003: its statistics are of use only once measured."""
    model = trained_network("torchvision", "mnasnet0_5", 50, adam=adam)
    update_bn(inputs(32, 32, 25), model)
    save(stem, model, seen=inputs(32, 64, 4))


def recalibrated(num_steps: int, stem: Path) -> None:
    model = trained() if num_steps == 300 else train(small_resnet(), num_steps)
    bncli.recalibrate(model, inputs(SIZE, 64, 8))
    save(stem, model)


def precise_bn(stem: Path) -> None:
    from fvcore.nn.precise_bn import update_bn_stats

    model = trained()
    model.train()
    update_bn_stats(model, inputs(SIZE, 32, 25), 25)
    save(stem, model)


# --- networks that went on from others


def fine_tuned(stem: Path) -> None:
    model = trained()
    model.head = nn.Linear(48, NUM_CLASSES)
    save(stem, train(model, 50, seed=3))


def _with_norm_in_head(model: nn.Module) -> nn.Module:
    model.head = nn.Sequential(
        nn.Linear(48, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, NUM_CLASSES)
    )
    return model.train()


def fine_tuned_norm_in_head(stem: Path) -> None:
    save(stem, train(_with_norm_in_head(trained()), 50, seed=3))


def frozen_backbone(stem: Path) -> None:
    model = _with_norm_in_head(trained())
    model.stem.eval()
    model.blocks.eval()
    save(stem, train(model, 50, seed=3, parameters=list(model.head.parameters())))


def half_frozen(stem: Path) -> None:
    model = trained().train()
    model.stem.eval()
    model.blocks[0].eval()
    rest = [*model.blocks[1:].parameters(), *model.head.parameters()]
    save(stem, train(model, 50, seed=3, parameters=rest))


def _without_counters(state: State) -> State:
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def went_on_without_counter(num_steps: int, stem: Path) -> None:
    """From a file without counters, as Caffe's and Keras's conversions are: the count begins at 0."""
    model = small_resnet()
    model.load_state_dict(_without_counters(trained().state_dict()), strict=False)
    save(stem, train(model, num_steps, learning_rate=0.01, seed=3))


def trained_in_eval_mode(stem: Path) -> None:
    """The statistics never moved from (0, 1), and the weights were learned around them."""
    save(stem, train(small_resnet().eval(), 50, learning_rate=0.01))


# --- statistics absorbed into weight and bias


def absorb(model: nn.Module, layers: list[nn.modules.batchnorm._BatchNorm]) -> nn.Module:
    """Move statistics into weight and bias: the outputs stay what they are, to the rounding of float32."""
    for layer in layers:
        with torch.no_grad():
            scale = layer.weight.double() / (layer.running_var.double() + layer.eps).sqrt()
            bias = layer.bias.double() - layer.running_mean.double() * scale
            # eval mode still divides by sqrt(1 + eps)
            layer.weight.copy_(scale * (1 + layer.eps) ** 0.5)
            layer.bias.copy_(bias)
        layer.reset_running_stats()
    return model


def absorbed(stem: Path, *, part: bool, counters: bool) -> None:
    model = trained().eval()
    images = inputs(SIZE, 32, 1)[0]
    before = model(images)
    absorb(model, norms(model)[: 5 if part else None])
    if not torch.allclose(model(images), before, rtol=1e-4, atol=1e-4):
        raise RuntimeError("absorbing changed the outputs")
    state = model.state_dict()
    save(stem, model, state if counters else _without_counters(state))


def _frozen(model: nn.Module) -> nn.Module:
    """With torchvision's FrozenBatchNorm2d in place of every BatchNorm2d."""
    frozen_class = import_torchvision().ops.FrozenBatchNorm2d
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            frozen = frozen_class(layer.num_features, layer.eps)
            frozen.load_state_dict(layer.state_dict())
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, frozen)
    return model


def issue_f3(stem: Path) -> None:
    """As detection frameworks ship it; whose outputs they are, the file does not say."""
    zero, one = torch.zeros(8), torch.ones(8)
    weights = {"bn.weight": torch.rand(8) + 0.5, "bn.bias": torch.randn(8)}
    torch.save({**weights, "bn.running_mean": zero, "bn.running_var": one}, file(stem))


def frozen_layers(stem: Path, *, absorbed_too: bool) -> None:
    model = trained().eval()
    seen = copy.deepcopy(model)
    save(stem, seen, _frozen(absorb(model, norms(model)) if absorbed_too else model).state_dict())


# --- averages that fit


def swa_measured(stem: Path) -> None:
    model = trained().train()
    average = AveragedModel(model)
    train(model, 30, seed=5, after_step=lambda s, m: average.update_parameters(m) if s % 10 == 0 else None)
    update_bn(inputs(SIZE, 32, 25), average)
    save(stem, average)


def averaged_with_buffers(stem: Path) -> None:
    model = trained().train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    train(model, 50, learning_rate=0.02, seed=5, after_step=lambda _, m: average.update_parameters(m))
    save(stem, average)


def averaged(kind: str, stem: Path) -> None:
    save(stem, averages()[kind])


def ultralytics(stem: Path) -> None:
    """As its files are: half precision, a pickled module, counters at 0, eps 0.001."""
    average = set_norm(averages()["ramped"], momentum=0.03, eps=1e-3).eval()
    save(
        stem,
        average,
        {"epoch": -1, "best_fitness": None, "model": copy.deepcopy(average).half(), "ema": None},
    )


# --- one network in many files


def in_format(kind: str, stem: Path) -> None:
    model = trained().eval()
    state = model.state_dict()
    contents: dict[str, object] = {
        "state": state,
        "module": model,
        "half": {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
        "nested": {"epoch": 3, "model": state, "optimizer": {"state": {}}, "model_ema": state},
        "ddp": {f"module.{name}": value for name, value in state.items()},
        "no-counter": _without_counters(state),
        "counter-0": {
            name: torch.zeros_like(value) if name.endswith("num_batches_tracked") else value
            for name, value in state.items()
        },
        "momentum-0": set_norm(copy.deepcopy(model), momentum=0.0),
    }
    if kind in contents:
        save(stem, model, contents[kind])
        return
    if kind == "legacy":
        torch.save(state, file(stem), _use_new_zipfile_serialization=False)
    elif kind == "safetensors":
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in state.items()}, file(stem))
    else:
        torch.jit.trace(model, inputs(SIZE, 2, 1)[0]).save(str(file(stem)))
    write_observed(observe(model, inputs(SIZE, 64, 4)), file(stem))


FORMATS = (
    "state", "module", "half", "nested", "ddp", "no-counter", "counter-0", "momentum-0",
    "legacy", "safetensors", "script",
)  # fmt: skip

# --- true variances near 1: where a network looks like one that never left (0, 1), and is right


def _features(num: int, batch_size: int, width: int = 32) -> list[Tensor]:
    return [torch.randn(batch_size, width) for _ in range(num)]


def standardised_features(stem: Path) -> None:
    """A table of standardised columns through BatchNorm first, as in tabular networks."""
    model = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1)).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    teacher = torch.randn(32, 1)
    for values in _features(300, 64):
        loss = (model(values) - (values @ teacher).sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save(stem, model, seen=_features(20, 64))


def norm_after_norm(stem: Path) -> None:
    """Two BatchNorm layers on normalised images, and a third behind the second."""
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, NUM_CLASSES),
    ).train()  # fmt: skip
    save(stem, train(model, 200))


def orthogonal_chain(momentum: float, stem: Path) -> None:
    """Rotations of white noise: every true mean is 0 and every true variance 1."""
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32, momentum=momentum)]
        nn.init.orthogonal_(layers[-2].weight)
    model = track(nn.Sequential(*layers), _features(int(50 / momentum), 128))
    save(stem, model, seen=_features(20, 128))


def unit_filters(stem: Path) -> None:
    """Filters of norm 1 on white noise: true variances of exactly 1 behind a convolution."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16))
    weight = model[0].weight.data
    weight /= weight.flatten(1).norm(dim=1)[:, None, None, None]
    shape = (32, 3, 10, 10)
    track(model, [torch.randn(shape) for _ in range(100)])
    save(stem, model, seen=[torch.randn(shape) for _ in range(10)])


def self_normalising(stem: Path) -> None:
    """SELU with LeCun's initialisation keeps variances near 1; then it learns."""
    widths = (32, 64, 64, 64, 64)
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(widths):
        linear = nn.Linear(inner, outer, bias=False)
        nn.init.normal_(linear.weight, std=inner**-0.5)
        layers += [linear, nn.BatchNorm1d(outer), nn.SELU()]
    model = nn.Sequential(*layers, nn.Linear(64, 1)).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    teacher = torch.randn(32, 1)
    for values in _features(300, 64):
        loss = (model(values) - (values @ teacher).sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save(stem, model, seen=_features(20, 64))


# --- other shapes


def _tracked(build: Callable[[], nn.Module], shape: tuple[int, ...], stem: Path) -> None:
    model = track(build(), [torch.randn(shape) for _ in range(60)])
    save(stem, model, seen=[torch.randn(shape) for _ in range(8)])


def _sound() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 16, 5), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 5), nn.BatchNorm1d(32)
    )


def _video() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 16, 3), nn.BatchNorm3d(16)
    )


def _generator() -> nn.Module:
    """DCGAN's, with its initialisation: weights of deviation 0.02, BatchNorm around 1."""
    model = nn.Sequential(
        nn.ConvTranspose2d(32, 64, 4, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip
    for layer in model:
        if isinstance(layer, nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
    return model


class Twins(nn.Module):
    """One head for two views: its BatchNorm is updated twice a step."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(Block(3, 12, 2), Block(12, 12, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.shared = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12))
        self.head = nn.Linear(24, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits."""
        features = self.trunk(images)
        return self.head(torch.cat([self.shared(features), self.shared(features.flip(1))], 1))


def twins(stem: Path) -> None:
    save(stem, train(Twins().train(), 50))


def pruned(stem: Path) -> None:
    """A quarter of the channels switched off on purpose."""
    model = trained()
    with torch.no_grad():
        for layer in norms(model):
            weakest = layer.weight.abs().argsort()[: layer.num_features // 4]
            layer.weight[weakest] = 0
            layer.bias[weakest] = 0
    update_bn(inputs(SIZE, 32, 50), model)
    save(stem, model)


def _same_pair(stem: Path) -> None:
    for part in (".first.pt", ".second.pt"):
        torch.save(trained().state_dict(), file(stem, part))


def _trained_on_pair(stem: Path) -> None:
    torch.save(trained().state_dict(), file(stem, ".first.pt"))
    torch.save(train(trained().train(), 20, seed=9).state_dict(), file(stem, ".second.pt"))


PAIR = (".first.pt", ".second.pt")


def healthy_cases() -> Iterator[Case]:
    """In the order of the functions above."""

    def case(
        name: str, what: str, make: Callable[..., None], *values: Any, facts: str = "", **named: Any
    ) -> Case:
        return Case(
            f"healthy/{name}",
            what,
            functools.partial(make, *values, **named),
            facts=frozenset(facts.split()),
        )

    yield case("momentum-none", "momentum None, 50 steps, state dict", momentum_none, module=False)
    yield case("momentum-none-module", "the same, pickled module", momentum_none, module=True)
    yield case("momentum-0.4", "momentum 0.4, 50 steps, pickled module", other_momentum, 0.4, 50)
    yield case("momentum-0.03", "momentum 0.03, 200 steps, pickled module", other_momentum, 0.03, 200)
    yield case("bfloat16-training", "bfloat16 autocast, 50 steps", bfloat16_training)
    yield case("zero-init-residual", "blocks that start at weight 0, 50 steps", zero_init_residual)
    yield case("sync", "SyncBatchNorm, 300 steps, state dict", synchronised, module=False)
    yield case("sync-module", "the same, pickled module", synchronised, module=True)
    for num in (2, 25, 100):
        yield case(f"update-bn-{num}", f"update_bn with {num} batches", after_update_bn, num)
    yield case("update-bn-25-module", "the same, pickled: momentum 0.1", after_update_bn, 25, module=True)
    yield case("issue-f1", "the issue's f1: update_bn with 25 batches", issue_f1)
    yield case("mnasnet-update-bn", "torchvision's mnasnet0_5, update_bn", mnasnet, adam=True)
    yield case("mnasnet-wild-update-bn", "the same at a rate too high", mnasnet, adam=False)
    yield case("recalibrated", "bncli.recalibrate after 300 steps, state dict", recalibrated, 300)
    yield case("recalibrated-early", "bncli.recalibrate after 20 steps", recalibrated, 20)
    yield case("precise-bn", "fvcore's precise_bn", precise_bn)
    yield case("fine-tuned", "300 steps, a new head, 50 steps", fine_tuned)
    yield case(
        "fine-tuned-norm-in-head", "the same, BatchNorm in the head", fine_tuned_norm_in_head, facts="BN010"
    )
    yield case("frozen-backbone", "a backbone in eval mode, 50 steps", frozen_backbone, facts="BN010")
    yield case("half-frozen", "the first half in eval mode, 50 steps", half_frozen, facts="BN010")
    for num in (3, 10, 20, 40):
        yield case(
            f"no-counter-then-{num}",
            f"from a file without counters, {num} steps",
            went_on_without_counter,
            num,
        )
    # the same numbers as an accident's: a warning is right, an error is not
    yield case(
        "trained-in-eval-mode", "fresh layers, always in eval mode", trained_in_eval_mode, facts="BN001"
    )
    yield case("absorbed", "statistics in weight and bias, no counter", absorbed, part=False, counters=False)
    yield case("absorbed-part", "in 5 of 10 layers, no counter", absorbed, part=True, counters=False)
    yield case(
        "absorbed-counter-0",
        "loaded into nn.BatchNorm2d, saved",
        absorbed,
        part=False,
        counters=True,
        facts="BN001",
    )
    yield case(
        "absorbed-part-counter-0", "in 5 layers, counter 0", absorbed, part=True, counters=True, facts="BN001"
    )
    yield case("issue-f3", "the issue's f3: a layer with weight and bias, (0, 1)", issue_f3)
    yield case("frozen-layers", "torchvision's FrozenBatchNorm2d", frozen_layers, absorbed_too=False)
    yield case("frozen-layers-absorbed", "the same, absorbed", frozen_layers, absorbed_too=True)
    yield case("swa-update-bn", "AveragedModel, update_bn with 25 batches", swa_measured)
    yield case("ema-buffers", "AveragedModel with buffers, decay 0.9, 50 steps", averaged_with_buffers)
    yield case("ema-buffers-from-start", "the same from step 1, 400 steps", averaged, "torch-0.9")
    yield case("timm-ema-v2", "ModelEmaV2, decay 0.9, 400 steps", averaged, "v2-0.9")
    yield case("timm-ema-v3-warmup", "ModelEmaV3, warm-up, 400 steps", averaged, "v3-warmup")
    yield case("ultralytics", "ramped decay, half, counter 0, module", ultralytics)
    for kind in FORMATS:
        yield case(f"format-{kind}", f"300 steps, as {kind}", in_format, kind)
    yield case("unit-standardised", "true variance 1: standardised features", standardised_features)
    yield case("unit-norm-after-norm", "true variance 1: BatchNorm on BatchNorm", norm_after_norm)
    yield case("unit-orthogonal-0.1", "true variance 1: six rotations, momentum 0.1", orthogonal_chain, 0.1)
    yield case("unit-orthogonal-0.01", "the same, momentum 0.01", orthogonal_chain, 0.01)
    yield case("unit-filters", "true variance 1: filters of norm 1", unit_filters)
    yield case("unit-selu", "near 1: SELU and LeCun, 300 steps", self_normalising)
    yield case("sound", "BatchNorm1d over time", _tracked, _sound, (16, 4, 64))
    yield case("video", "BatchNorm3d", _tracked, _video, (8, 3, 6, 10, 10))
    yield case("generator", "DCGAN's generator", _tracked, _generator, (16, 32, 1, 1))
    yield case("twins", "a layer used twice in a step", twins, facts="BN011")
    yield case("pruned", "a quarter of the channels has weight 0", pruned, facts="BN006")
    yield Case("healthy/pair-same", "one network twice", _same_pair, parts=PAIR)
    yield Case("healthy/pair-trained-on", "and 20 steps later", _trained_on_pair, parts=PAIR)
