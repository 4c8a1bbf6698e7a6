"""What a finding claims is true of the network that was made here, and what nothing decides is an info."""

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from bncli.batchnorm import Finding, LayerStats, audit_layers, read_running_stats
from bncli.checkpoints import open_checkpoint
from bncli.torchvision_compat import import_torchvision

SHAPE = (16, 3, 8, 8)


def noise(count: int) -> list[Tensor]:
    return [torch.randn(32, 3, 8, 8) * 3 + 1 for _ in range(count)]


def one_layer(**options: object) -> nn.Sequential:
    """The network of the issue's scripts."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **options)).train()


def chain(momentum: float | None = 0.1, width: int = 12, depth: int = 5) -> nn.Sequential:
    """Conv-BN-ReLU blocks and a head."""
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Conv2d(width if index else 3, width, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(width, momentum=momentum), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)).train()


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images with structure, and what they show."""
    for _ in range(count):
        labels = torch.randint(4, (SHAPE[0],))
        scale = 1 + labels[:, None, None, None] / 2
        images = nn.functional.interpolate(torch.randn(SHAPE[0], 3, 4, 4), SHAPE[2:]) * scale
        yield images + torch.randn(SHAPE) / 4, labels


def train(
    model: nn.Module, steps: int, after: Callable[[], None] = lambda: None, lr: float = 0.05
) -> nn.Module:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    for images, labels in batches(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        after()
    return model


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(1)
    return train(chain(), 80)


def opened(content: object, folder: Path) -> tuple[LayerStats, ...]:
    """The layers as the command line reads them from a file."""
    torch.save(content, folder / "x.pt")
    with open_checkpoint(folder / "x.pt") as checkpoint:
        return checkpoint.layers()


def said(subject: object, **options: object) -> set[tuple[str, str]]:
    """Names and severities of the findings in layers, a model or a state dict."""
    layers = subject if isinstance(subject, tuple) else read_running_stats(subject)
    return {(finding.name, finding.severity) for finding in audit_layers(layers, **options)}


def first(subject: object, name: str) -> Finding:
    layers = subject if isinstance(subject, tuple) else read_running_stats(subject)
    return audit_layers(layers, select=[name])[0]


# --- the scripts


def test_f1_update_bn_left_nothing_of_the_start_and_no_warning_says_otherwise(tmp_path: Path) -> None:
    model = one_layer()
    model[0].weight.data *= 4
    for images in noise(300):
        model(images)
    images = noise(25)
    update_bn(images, model)
    pooled = torch.stack([model[0](batch).var((0, 2, 3)) for batch in images]).mean(0)
    assert torch.allclose(
        model[1].running_var, pooled, rtol=1e-4
    )  # the oracle: no part of it is the start's 1
    layers = opened(model.state_dict(), tmp_path)
    assert said(layers) == {("initial_residue", "info")}
    finding = first(layers, "BN002")
    assert "unless they were recomputed" in finding.message
    assert "momentum 0.1 (assumed)" in finding.message
    assert (finding.values["momentum_assumed"], finding.values["decided_by"]) == (True, "nothing")
    assert said(opened(model, tmp_path)) == {
        ("initial_residue", "info")
    }  # momentum is known, and tells no more


def test_f2_an_average_over_the_state_dict_is_told_by_its_numbers(tmp_path: Path) -> None:
    model = one_layer()
    average = {key: value.clone() for key, value in model.state_dict().items()}
    left = 1.0
    for images in noise(500):
        model(images)
        left *= 0.9999
        for key, value in model.state_dict().items():
            average[key].copy_(0.9999 * average[key] + 0.0001 * value)
    layers = opened(average, tmp_path)
    assert said(layers) == {("near_initial", "warning")}
    finding = first(layers, "BN014")
    assert finding.values["share_at_least"] <= left <= finding.values["share_at_most"]
    assert "e+" not in finding.message


@pytest.mark.parametrize(("momentum", "share"), [(0.001, "99.9 %"), (0.0001, "100 %"), (0.1, "90 %")])
def test_shares_near_all_are_plain_numbers(momentum: float, share: str) -> None:
    layer = nn.BatchNorm2d(3, momentum=momentum)
    layer(torch.randn(8, 3, 4, 4))
    assert first(layer, "BN002").message.startswith(f"{share} of the initial statistics")


def test_f3_absorbed_statistics_are_no_error(tmp_path: Path) -> None:
    state = {
        "bn.weight": torch.rand(8) + 0.5,
        "bn.bias": torch.randn(8),
        "bn.running_mean": torch.zeros(8),
        "bn.running_var": torch.ones(8),
    }
    layers = opened(state, tmp_path)
    assert said(layers) == {("never_updated", "info")}
    assert "else they are lost" in first(layers, "BN001").message


def test_f4_momentum_that_keeps_one_batch_is_a_warning_with_its_reason(tmp_path: Path) -> None:
    model = one_layer(momentum=0.99)
    seen = noise(100)
    for images in seen:
        model(images)
    # the oracle: what the last batch alone leaves
    last = model[0](seen[-1]).var((0, 2, 3))
    assert torch.allclose(model[1].running_var, last, rtol=0.02)
    layers = opened(model, tmp_path)
    assert said(layers) == {("few_batches", "warning")}
    finding = first(layers, "BN015")
    assert "momentum 0.99" in finding.message
    assert "unless they were recomputed" in finding.message
    assert "0.99 is 0.01 here" in finding.advice


# --- BN001: an error is certain


def absorb(model: nn.Module) -> nn.Module:
    """Statistics moved into weight and bias, as detection frameworks do."""
    absorbed = copy.deepcopy(model).eval()
    for layer in absorbed.modules():
        if isinstance(layer, nn.BatchNorm2d):
            scale = layer.weight.data / (layer.running_var + layer.eps).sqrt()
            layer.bias.data -= layer.running_mean * scale
            layer.weight.data = scale * (1 + layer.eps) ** 0.5
            layer.reset_running_stats()
    return absorbed


def without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def test_an_absorbed_network_computes_the_same_and_has_no_error(trained: nn.Module) -> None:
    images = next(batches(1))[0]
    absorbed = absorb(trained)
    assert torch.allclose(absorbed(images), copy.deepcopy(trained).eval()(images), atol=1e-4)
    assert said(without_counters(absorbed.state_dict())) == {("never_updated", "info")}
    assert said(absorbed.state_dict()) == {("never_updated", "warning")}
    for layer in absorbed.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.num_batches_tracked += 80  # absorbed in place: the counter stays
    assert said(absorbed.state_dict()) == {("never_updated", "warning")}


def test_detectron2_writes_1_minus_eps_and_means_1(trained: nn.Module) -> None:
    state = without_counters(absorb(trained).state_dict())
    for key, value in state.items():
        if key.endswith("running_var"):
            value.fill_(1 - 1e-5)
    assert said(state) == {("never_updated", "info")}


def test_a_new_network_is_a_warning_that_says_it_was_never_used() -> None:
    model = chain()
    assert said(model) == said(model.state_dict()) == {("never_updated", "warning")}
    assert "No BatchNorm of this network was ever used in train mode" in first(model, "BN001").message


def test_a_network_that_was_folded_into_its_convolutions_is_no_error(trained: nn.Module) -> None:
    folded = copy.deepcopy(trained).eval()
    images = next(batches(1))[0]
    before = folded(images)
    layers = list(folded.named_children())
    for (_, convolution), (_, norm) in itertools.pairwise(layers):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            fused = nn.utils.fuse_conv_bn_eval(convolution, norm)
            convolution.load_state_dict(fused.state_dict(), strict=False)
            convolution.bias = fused.bias
            norm.reset_running_stats()
            norm.reset_parameters()
            norm.eps = 0.0
            norm.num_batches_tracked += 200
    assert torch.allclose(folded(images), before, atol=1e-3)  # the oracle: the outputs are right
    for subject in (folded, folded.state_dict()):
        assert "error" not in {severity for _, severity in said(subject)}
        assert "moved into the layer before" in first(subject, "BN001").message


def test_a_new_layer_in_a_trained_network_is_a_warning(trained: nn.Module) -> None:
    network = nn.Sequential(copy.deepcopy(trained), nn.BatchNorm1d(4))
    assert said(network) == {("never_updated", "warning")}
    assert "No training reached the layer" in first(network, "BN001").message


def test_lost_statistics_beside_trained_weights_are_a_warning(trained: nn.Module) -> None:
    network = chain()
    parameters = dict(trained.named_parameters())
    network.load_state_dict(parameters, strict=False)  # kuangliu/pytorch-cifar#162
    assert said(network.state_dict()) == {("never_updated", "warning")}


def test_a_known_momentum_of_0_is_named_with_advice_of_its_own(
    tmp_path: Path,
) -> None:
    model = train(chain(momentum=0.0), 20)
    images = next(batches(1))[0]
    output = model(images)
    assert not torch.allclose(
        output, model.eval()(images), atol=0.1
    )  # the oracle: eval mode is another function
    layers = opened(model, tmp_path)
    assert said(layers) == {("never_updated", "warning")}
    finding = first(layers, "BN001")
    assert "momentum is 0, or they were moved into" in finding.message
    assert finding.advice.startswith("Its momentum is 0")
    assert said(opened(model.state_dict(), tmp_path)) == {
        ("never_updated", "warning")
    }  # unknown: absorbed, perhaps
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.0, affine=False))
    for _ in range(20):
        plain(images)
    assert said(opened(plain, tmp_path)) == {("never_updated", "warning")}
    assert "momentum is 0, or" in first(plain, "BN001").message


def test_counted_batches_beside_initial_weights_are_a_warning() -> None:
    norm = nn.BatchNorm2d(4, affine=False)
    norm.num_batches_tracked += 50
    assert said(norm.state_dict()) == {("never_updated", "warning")}
    assert "num_batches_tracked is 50" in first(norm, "BN001").message


def test_a_frozen_class_is_known_from_a_pickled_module(trained: nn.Module, tmp_path: Path) -> None:
    frozen_class = import_torchvision().ops.FrozenBatchNorm2d
    model = absorb(trained)
    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.BatchNorm2d):
            frozen = frozen_class(layer.num_features, eps=3e-5)
            frozen.load_state_dict(layer.state_dict())
            setattr(model, name, frozen)
    layers = opened(model, tmp_path)
    assert {layer.eps for layer in layers} == {3e-5}
    assert not any(layer.hyperparameters_known for layer in layers)  # it has no momentum
    assert said(layers) == {("never_updated", "info")}
    assert first(layers, "BN001").advice.startswith("Its class is frozen")


def test_averaged_weights_without_statistics_are_told_to_measure_them(tmp_path: Path) -> None:
    model = chain()
    average = AveragedModel(model)
    train(model, 20)
    average.update_parameters(model)
    for layer in average.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()  # as PyTorch before 2.0 left them
    assert "(n_averaged)" in first(opened(average.state_dict(), tmp_path), "BN001").advice
    assert "(n_averaged)" in first(opened(average, tmp_path), "BN001").advice
    assert "(n_averaged)" in first(average, "BN001").advice
    assert "n_averaged" not in first(chain(), "BN001").advice


# --- BN002: what the counter counts is not in the file


@pytest.mark.parametrize("count", [1, 2, 25, 100])
def test_no_warning_follows_update_bn(trained: nn.Module, count: int) -> None:
    model = copy.deepcopy(trained)
    update_bn(list(batches(count)), model)
    assert {severity for _, severity in said(model) | said(model.state_dict())} <= {"info"}


def test_momentum_none_has_no_start_in_it_whatever_the_count(tmp_path: Path) -> None:
    model = train(chain(momentum=None), 10)
    assert said(opened(model, tmp_path)) == set()
    assert {severity for _, severity in said(model.state_dict())} <= {"info"}


@pytest.mark.parametrize("form", ["state", "module"])
@pytest.mark.parametrize("steps", [2, 5, 10])
def test_a_short_run_shows_what_is_left(form: str, steps: int, tmp_path: Path) -> None:
    model = train(chain(), steps)
    layers = opened(model if form == "module" else model.state_dict(), tmp_path)
    assert said(layers) == {("initial_residue", "warning")}
    finding = first(layers, "BN002")
    assert finding.values["residue"] == pytest.approx(0.9**steps)
    assert ("(assumed)" in finding.message) == (form == "state") == finding.values["momentum_assumed"]
    assert "The variances show it" in finding.message


def test_what_bncli_recorded_is_certain_even_where_numbers_leave_it_open() -> None:
    (layer,) = read_running_stats(nn.Sequential(nn.BatchNorm2d(4)))
    spread = {"running_mean": torch.rand(4), "running_var": torch.tensor([9.0, 2.0, 3.0, 30.0])}
    told = copy.copy(layer)
    for name, value in {**spread, "num_batches_tracked": 20}.items():
        object.__setattr__(told, name, value)
    assert said((told,)) == {("initial_residue", "info")}
    object.__setattr__(told, "averaged_by_training", True)
    assert said((told,)) == {("initial_residue", "warning")}
    assert "unless" not in first((told,), "BN002").message


def test_one_batch_leaves_a_trace_in_counter_and_numbers(trained: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(trained)
    update_bn(list(batches(1)), model)
    for content in (model, model.state_dict()):
        layers = opened(content, tmp_path)
        assert ("few_batches", "info") in said(layers)
        assert "num_batches_tracked is 1, and" in first(layers, "BN015").message
    assert ("few_batches", "info") in said(train(chain(momentum=None), 1))
    assert ("few_batches", "info") not in said(train(chain(), 1))  # nine tenths of (0, 1): that is BN002's


@pytest.mark.parametrize(("momentum", "is_found"), [(0.4, False), (0.6, False), (0.9, True), (1.0, True)])
def test_a_large_momentum_is_one_that_scatters_like_fewer_than_two_batches(
    momentum: float, is_found: bool
) -> None:
    norm = nn.BatchNorm1d(2000, momentum=momentum)
    for _ in range(60):
        norm(torch.randn(16, 2000))
    # the oracle: how much the means scatter, in batches of 16
    batches = float(1 / (16 * norm.running_mean.double().var()))
    assert (batches < 2) == is_found
    findings = [
        finding for finding in audit_layers(read_running_stats(norm)) if finding.name == "few_batches"
    ]
    assert bool(findings) == is_found
    for finding in findings:
        assert finding.values["effective_batches"] == pytest.approx(batches, rel=0.1)


def test_a_float_counter_is_no_count(trained: nn.Module) -> None:
    state = {
        key: value / 3 for key, value in trained.state_dict().items()
    }  # 80 / 3 is 26.7, and means nothing
    assert said(state) == {("counter_type", "warning")}


# --- BN014: the numbers alone


class StateAverage:
    """timm's ModelEmaV2 and V3: an exponential average of every tensor of a state dict."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.share = model, decay, 1.0
        self.state = {key: value.clone() for key, value in model.state_dict().items()}

    def update(self) -> None:
        self.share *= self.decay
        for key, value in self.model.state_dict().items():
            self.state[key].copy_(self.decay * self.state[key] + (1 - self.decay) * value)


@pytest.mark.parametrize("decay", [0.9999, 0.9998])
def test_an_averaged_network_holds_the_share_that_is_named(decay: float) -> None:
    model = chain()
    average, in_float = StateAverage(model, decay), StateAverage(model, decay)
    in_float.state = {key: value.double() for key, value in in_float.state.items()}
    train(model, 250, lambda: (average.update(), in_float.update()))
    assert said(average.state) == {("near_initial", "warning")}
    assert said(in_float.state) == {("near_initial", "warning"), ("counter_type", "warning")}
    for one in (average, in_float):
        values = first(one.state, "BN014").values
        # the live network's own start is gone, all that is left is the average's
        assert values["share_at_least"] <= one.share <= values["share_at_most"] + 0.02


@pytest.mark.parametrize("version", ["ModelEmaV2", "ModelEmaV3"])
def test_timms_averages_are_found(version: str) -> None:
    import_torchvision()  # timm imports it, and finds it broken beside a CPU-only torch
    from timm import utils

    model = chain()
    average = getattr(utils, version)(model, decay=0.9999)
    train(model, 150, lambda: average.update(model))
    assert said(average.module) == {("near_initial", "warning")}


def test_an_average_that_had_time_is_healthy() -> None:
    model = chain()
    average = StateAverage(model, 0.9)
    train(model, 120, average.update)
    assert {severity for _, severity in said(average.state)} <= {"info"}


def test_a_momentum_that_a_state_dict_hides_is_found_by_the_numbers() -> None:
    model = train(chain(momentum=0.001), 80)
    assert said(model.state_dict()) == {("near_initial", "warning")}
    assert said(model) == {("initial_residue", "warning")}  # known: BN002 can compute it


def standardised() -> nn.Module:
    """Columns of variance 1 into BatchNorm, as in tabular networks."""
    model = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 4)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(200):
        columns = torch.randn(64, 32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(columns), columns[:, :4].argmax(1)).backward()
        optimizer.step()
    return model


def norm_on_norm() -> nn.Module:
    model = nn.Sequential(*(nn.BatchNorm1d(32) for _ in range(4)), nn.Linear(32, 4)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(200):
        columns = torch.randn(64, 32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(columns), columns[:, :4].argmax(1)).backward()
        optimizer.step()
    return model


def rotations() -> nn.Module:
    """Six rotations of white noise: all true means are 0, all true variances 1."""
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32)]
        nn.init.orthogonal_(layers[-2].weight)
    model = nn.Sequential(*layers).train()
    for _ in range(100):
        model(torch.randn(128, 32))
    return model


def white_noise() -> nn.Module:
    """A network as built, on noise: He's initialisation keeps variances near 1 where it can."""
    model = nn.Sequential(*(chain(width=64, depth=6)[:-3]))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    for _ in range(60):
        model(torch.randn(4, 3, 12, 12))
    train_affine = torch.randn(64) / 100
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data += train_affine
    return model


def wide_perceptron() -> nn.Module:
    """He's initialisation, 1,024 wide, a few steps on white noise: variances of 0.6 to 0.8 in every layer."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(1024, 1024, bias=False), nn.BatchNorm1d(1024), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-3].weight)
    model = nn.Sequential(*layers).train()
    for _ in range(50):
        model(torch.randn(128, 1024))
    for layer in model[1::3]:
        layer.weight.data += torch.randn(1024) / 100
    return model


@pytest.mark.parametrize("make", [standardised, norm_on_norm, rotations, white_noise, wide_perceptron])
@pytest.mark.parametrize("counter", ["kept", "0", "none"])
def test_variances_that_truly_are_near_1_are_not_reported(
    make: Callable[[], nn.Module], counter: str
) -> None:
    state = make().state_dict()
    if counter == "none":
        state = without_counters(state)
    for key, value in state.items():
        if counter == "0" and key.endswith("num_batches_tracked"):
            value.zero_()
    assert said(state, select=["BN001", "BN002", "BN014"]) == set()


# --- healthy networks


def loud(subject: object) -> set[tuple[str, str]]:
    return {(name, severity) for name, severity in said(subject) if severity != "info"}


def test_a_synchronised_network_has_no_finding(trained: nn.Module) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(trained))
    assert loud(model) == loud(model.state_dict()) == set()


def frozen(model: nn.Module, names: list[str], steps: int) -> nn.Module:
    """Trained on, with some layers in eval mode."""
    for name in names:
        model.get_submodule(name).eval()
    return train(model, steps, lr=0.01)


def test_fine_tuning_raises_no_alarm_and_a_layer_that_missed_batches_does(trained: nn.Module) -> None:
    model = train(copy.deepcopy(trained), 30, lr=0.01)
    assert loud(model.state_dict()) == set()
    half = frozen(copy.deepcopy(model), ["1", "4"], 33)  # 110 and 143 batches
    assert ("counter_unequal", "info") in said(half.state_dict())
    assert loud(half.state_dict()) == set()
    new_head = frozen(copy.deepcopy(model), ["1", "4", "7", "10"], 25)
    new_head[13].num_batches_tracked -= 80  # as if it had come for these 55: half of 110
    assert ("counter_multiple", "info") in said(new_head.state_dict())
    assert loud(new_head.state_dict()) == set()
    one = frozen(copy.deepcopy(model), ["7"], 33)
    assert loud(one.state_dict()) == {("counter_unequal", "warning")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", pytest.param("densenet121", marks=pytest.mark.slow)]
)
def test_a_network_of_torchvisions_has_no_alarm_after_50_steps(name: str) -> None:
    model = getattr(import_torchvision().models, name)(num_classes=4).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(50):
        labels = torch.randint(4, (4,))
        images = torch.randn(4, 3, 32, 32) + labels[:, None, None, None]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert loud(model) == loud(model.state_dict()) == set()


# --- facts


def test_an_assumed_eps_is_called_so_and_dead_channels_are_a_fact_until_the_layer_is_dead() -> None:
    norm = nn.BatchNorm2d(4)
    norm.running_mean += 0.1
    norm.weight.data.fill_(0.05)
    norm.running_var.copy_(torch.tensor([1.0, 5e-6, 1e-9, 2.0]))
    found = {finding.name: finding for finding in audit_layers(read_running_stats(norm.state_dict()))}
    assert {name: finding.severity for name, finding in found.items()} == {
        "eps_decides": "info",
        "dead_channel": "info",
    }
    for finding in found.values():
        assert finding.message.endswith("with eps 1e-05 (assumed)")
        assert finding.values["eps_assumed"]
    for finding in audit_layers(read_running_stats(norm)):
        assert finding.message.endswith("with eps 1e-05")
    norm.running_var.fill_(1e-9)
    assert ("dead_channel", "warning") in said(norm)


def test_a_steep_channel_is_an_alarm_where_its_weight_ran_away_not_where_its_variance_is_small() -> None:
    norm = nn.BatchNorm2d(4)
    norm.running_mean += 0.1
    norm.running_var.copy_(torch.tensor([1.0, 0.5, 2e-5, 2.0]))
    assert said(norm) == {("exploding_gain", "info")}
    norm.running_var[2] = 0.7
    norm.weight.data[2] = 200.0
    assert said(norm) == {("exploding_gain", "warning")}
