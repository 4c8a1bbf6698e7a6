import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import bncli
from bncli.config import BatchNormConfig, ConvNetConfig
from bncli.errors import BncliError
from bncli.inference import FoldedLayer, Folding, KeptLayer, fold_batch_norm
from bncli.models.convnet import build_model


def with_statistics(model: nn.Module) -> nn.Module:
    """Float64, in eval mode, with statistics, weights and biases that are not their defaults."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 3)
            if module.affine:
                nn.init.uniform_(module.weight, 0.3, 2)
                nn.init.normal_(module.bias)
    return model.double().eval()


def num_norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def assert_folded(model: nn.Module, x: torch.Tensor, num_folded: int) -> Folding:
    """The oracle is the network itself, in float64."""
    folding = fold_batch_norm(with_statistics(model))
    assert len(folding.folded) == num_folded
    assert num_norms(folding.model) == num_norms(model) - num_folded
    assert folding.num_layers == num_norms(model)
    torch.testing.assert_close(folding.model(x), model(x), rtol=1e-10, atol=1e-10)
    return folding


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("pool_before_norm", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_our_networks_compute_the_same_without_any_batch_norm(
    pool: str, pool_before_norm: bool, affine: bool
) -> None:
    norm = BatchNormConfig(affine=affine, eps=1e-2)
    config = ConvNetConfig(widths=(6, 8), pool=pool, pool_before_norm=pool_before_norm, batch_norm=norm)
    model = build_model(config, 10, image_size=32)
    folding = assert_folded(model, torch.rand(4, 3, 32, 32, dtype=torch.float64), num_folded=4)
    assert folding.folded[0] == FoldedLayer("stages.0.0.norm", into="stages.0.0.conv")
    assert folding.kept == ()


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_convolutions_of_any_kind(dimensions: int, bias: bool, groups: int, kind: str) -> None:
    # in == out: a scale on the wrong axis of a transposed weight would not be an error
    convolution = getattr(nn, f"{kind}{dimensions}d")(6, 6, 3, padding=1, stride=2, bias=bias, groups=groups)
    model = nn.Sequential(convolution, getattr(nn, f"BatchNorm{dimensions}d")(6), nn.ReLU())
    assert_folded(model, torch.randn(2, 6, *[7] * dimensions, dtype=torch.float64), num_folded=1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4)])
def test_linear_layers(bias: bool, norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=bias), norm)
    assert_folded(model, torch.randn(5, 3, dtype=torch.float64), num_folded=1)


def test_a_linear_layer_that_took_in_batch_norm_refuses_inputs_of_other_dimensions() -> None:
    model = with_statistics(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    folded = fold_batch_norm(model).model
    x = torch.randn(5, 4, 4, dtype=torch.float64)
    assert model(x).shape == x.shape  # BatchNorm1d takes the second axis for channels, Linear the third
    with pytest.raises(BncliError, match=r"1 was folded into 0, which is right for .* 2 dim.*\(5, 4, 4\)"):
        folded(x)


@pytest.mark.parametrize(
    ("after", "num_folded"),
    [
        (nn.Conv2d(6, 4, 3), 1),
        (nn.Conv2d(6, 4, 3, groups=2, bias=False), 1),
        (nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), 1),
        (nn.Conv2d(6, 4, 1, padding="same"), 1),
        (nn.Conv2d(6, 4, 3, padding="valid"), 1),
        (nn.Sequential(nn.AvgPool2d(2), nn.Dropout2d(), nn.Conv2d(6, 4, 3)), 1),
        (nn.Conv2d(6, 4, 3, padding="same"), 0),
        (nn.Conv2d(6, 4, 3, padding=(0, 1)), 0),
        (nn.ConvTranspose2d(6, 4, 3), 0),
    ],
)
def test_what_lies_before_a_layer_goes_into_it_unless_it_pads_with_zeros(
    after: nn.Module, num_folded: int
) -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6), after)
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    folding = assert_folded(model, x, num_folded)
    if not num_folded:
        assert folding.kept[0].reason.startswith("it comes after ReLU, and the Conv")


def test_the_statistics_before_a_linear_layer_decide_whether_folding_would_lose_digits() -> None:
    model = with_statistics(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)))
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(fold_batch_norm(model).model(x), model(x), rtol=1e-10, atol=1e-10)
    model[0].running_mean[1] = 1_000  # of which float32 would keep seven digits, the deviation's less
    (kept,) = fold_batch_norm(model).kept
    assert "lose digits" in kept.reason


@pytest.mark.parametrize(("smallest", "num_folded"), [(-0.1, 0), (0.0, 1)])
def test_max_pooling_is_passed_only_where_the_map_does_not_fall(smallest: float, num_folded: int) -> None:
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 3, 1), nn.MaxPool2d(2), nn.BatchNorm2d(3)))
    with torch.no_grad():
        model[2].weight[1] = smallest
    folding = fold_batch_norm(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert len(folding.folded) == num_folded
    torch.testing.assert_close(folding.model(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("pool", "num_folded"),
    [
        (nn.AvgPool2d(3, 2, ceil_mode=True), 1),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), 1),
        (nn.AvgPool2d(3, padding=1), 0),
        (nn.AvgPool2d(2, divisor_override=3), 0),
        (nn.MaxPool2d(3, padding=1), 1),
        (nn.MaxPool3d(1), 0),  # over other axes
        (nn.Dropout(), 1),
        (nn.ReLU(), 0),
    ],
)
def test_what_lies_between_is_passed_only_where_it_does_not_matter(pool: nn.Module, num_folded: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), pool, nn.BatchNorm2d(3))
    assert_folded(model, torch.randn(2, 3, 8, 8, dtype=torch.float64), num_folded)


class Twice(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Norm(nn.BatchNorm2d):
    pass


class Activated(nn.BatchNorm2d):
    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


class Standardized(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Magnitude(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).abs()


class Backwards(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, padding=1)


class OtherWeight(nn.Conv2d):
    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.other = nn.Parameter(torch.randn_like(self.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.other, self.bias)


class ByItsWeight(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.weight.mean())


class Custom(nn.BatchNorm2d):
    """BatchNorm in eval mode but for one argument."""

    def __init__(self, num_features: int, **changed: object) -> None:
        super().__init__(num_features)
        self.changed = changed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        names = ("running_mean", "running_var", "weight", "bias", "eps")
        arguments = {name: getattr(self, name) for name in names} | self.changed
        if arguments.pop("absolute", False):
            arguments["weight"] = arguments["weight"].abs() + 1
        return F.batch_norm(x, **arguments)


class Padded(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gap = 2 if x.shape[-1] > 100 else 1
        return super().forward(F.pad(x, (gap, gap, gap, gap)))


class AlwaysTraining(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)


@pytest.mark.parametrize(
    ("first", "second", "num_folded", "reason"),
    [
        (nn.Conv2d(3, 3, 1), Norm(3), 1, ""),
        (nn.Conv2d(3, 3, 1), Activated(3), 1, ""),
        (Padded(3, 3, 3), nn.BatchNorm2d(3), 1, ""),
        (nn.Conv2d(3, 3, 1), Custom(3), 1, ""),
        (nn.Conv2d(3, 3, 1), Custom(3, eps=0.5), 0, "it is a Custom, which computes in a way of its own"),
        (nn.Conv2d(3, 3, 1), Custom(3, training=True), 0, "it is a Custom, which computes in a way"),
        (nn.Conv2d(3, 3, 1), Custom(3, weight=None), 0, "it is a Custom, which computes in a way"),
        (nn.Conv2d(3, 3, 1), Custom(3, absolute=True), 0, "it is a Custom, which computes in a way"),
        (Backwards(3, 3, 3), nn.BatchNorm2d(3), 0, "the Backwards before it computes in a way"),
        (OtherWeight(3, 3, 3), nn.BatchNorm2d(3), 0, "the OtherWeight before it computes in a way"),
        (ByItsWeight(3, 3, 3), nn.BatchNorm2d(3), 0, "the ByItsWeight before it computes in a way"),
        (
            nn.ReLU(),
            nn.Sequential(Activated(3), nn.Conv2d(3, 3, 1)),
            0,
            "between ReLU and its own activation",
        ),
        (nn.Conv2d(3, 3, 1), Twice(3), 0, "it is a Twice, which computes in a way of its own"),
        (Standardized(3, 3, 3), nn.BatchNorm2d(3), 0, "the Standardized before it computes in a way"),
        (Magnitude(3, 3, 3), nn.BatchNorm2d(3), 0, "the Magnitude before it computes in a way"),
        (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False), 0, "no running statistics"),
        (nn.Conv2d(3, 3, 1), AlwaysTraining(3), 0, "it stays in train mode"),
    ],
)
def test_subclasses_are_folded_as_far_as_their_own_code_allows(
    first: nn.Module, second: nn.Module, num_folded: int, reason: str
) -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    folding = assert_folded(nn.Sequential(first, second), x, num_folded)
    assert all(reason in layer.reason for layer in folding.kept)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[1].register_forward_hook(lambda *_: None)
    return model


def convolution_hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda _module, _inputs, output: output.abs())
    return model


def block_hooked() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(3, 3, 1))
    block.register_forward_hook(lambda _module, _inputs, output: output.abs())
    return nn.Sequential(block, nn.BatchNorm2d(3))


def between_hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity(), nn.BatchNorm2d(3))
    model[1].register_forward_hook(lambda _module, _inputs, output: output.abs())
    return model


def parametrized() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def patched() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[1].forward = lambda x: x + 1  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (hooked(), "it has a hook"),
        (convolution_hooked(), "the Conv2d before it has a hook"),
        (block_hooked(), "between a module with a hook and the output"),
        (between_hooked(), "it lies between Identity and the output"),
        (parametrized(), "a weight that is computed from others"),
        (patched(), "computes in a way of its own"),
        (nn.BatchNorm2d(3), "it is the whole network"),
    ],
)
def test_what_is_watched_or_patched_stays(model: nn.Module, reason: str) -> None:
    folding = assert_folded(model, torch.randn(2, 3, 8, 8, dtype=torch.float64), 0)
    assert reason in folding.kept[0].reason


def test_dropout_that_is_never_off_is_not_passed() -> None:
    class AlwaysOn(nn.Sequential):
        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self[1].training = True
            return self

    folding = fold_batch_norm(AlwaysOn(nn.Conv2d(3, 3, 1), nn.Dropout(), nn.BatchNorm2d(3)))
    assert folding.kept[0].reason.startswith("it lies between Dropout and the output")


def test_a_weight_that_two_layers_share_stays_as_it_was_for_the_other_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    assert_folded(model, torch.randn(2, 3, 8, 8, dtype=torch.float64), 1)


def test_a_layer_that_is_gone_brings_the_next_one_to_the_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    folding = assert_folded(model, torch.randn(2, 3, 8, 8, dtype=torch.float64), 2)
    assert [layer.into for layer in folding.folded] == ["0", "0"]


@pytest.mark.parametrize("layer", [nn.LazyBatchNorm2d(), nn.LazyConv2d(3, 1)])
def test_layers_that_are_not_built_yet_are_refused(layer: nn.Module) -> None:
    with pytest.raises(BncliError, match=f"{type(layer).__name__} that is not built yet"):
        fold_batch_norm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), layer))
    model = nn.Sequential(layer, nn.BatchNorm2d(3) if isinstance(layer, nn.Conv2d) else nn.Identity())
    model(torch.randn(2, 3, 4, 4))
    assert fold_batch_norm(model).num_layers == 1


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_low", [(True, False), (False, True), (True, True)])
def test_types_that_are_mixed_are_computed_in_float64_and_rounded_once(
    low: torch.dtype, is_low: tuple[bool, bool]
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = with_statistics(model).float()
    for layer, lowered in zip(model, is_low, strict=True):
        layer.to(low if lowered else torch.float32)
    oracle = fold_batch_norm(copy.deepcopy(model).double()).model[0]  # the same numbers, all in float64
    folded = fold_batch_norm(model).model[0]
    assert folded.weight.dtype == folded.bias.dtype == model[0].weight.dtype
    assert torch.equal(folded.weight, oracle.weight.to(folded.weight.dtype))
    assert torch.equal(folded.bias, oracle.bias.to(folded.bias.dtype))


def test_weights_that_would_overflow_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, eps=1e-12)).eval().half()
    model[1].running_var.zero_()
    (kept,) = fold_batch_norm(model).kept
    assert kept.reason == "the folded weights are no finite numbers in float16"
    assert num_norms(fold_batch_norm(model).model) == 1


def test_the_model_stays_as_it_was_to_the_last_bit() -> None:
    counts = []

    class Counting(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.num_calls += 1
            self.last = x
            return super().forward(x)

    model = Counting(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout()).train()
    model.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
    model.register_forward_hook(lambda *_: counts.append(1))
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    parts, call = list(model.modules()), nn.Module.__call__
    folded = fold_batch_norm(model).model
    assert [one.training for one in parts] == [True, True, False, True]
    assert list(model.modules()) == parts
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not counts
    assert not hasattr(model, "last")
    assert nn.Module.__call__ is call
    # the copy, too, was never called
    assert not hasattr(folded, "last")
    assert folded.num_calls == 0
    pickle.loads(pickle.dumps(fold_batch_norm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))))


def test_gradients_are_taken_by_the_weights_that_took_them_before() -> None:
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)))
    for needs_grad in (True, False):
        model.requires_grad_(needs_grad)
        assert {p.requires_grad for p in fold_batch_norm(model).model.parameters()} == {needs_grad}


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    class Itself(nn.Module):
        def __deepcopy__(self, _memo: object) -> nn.Module:
            return self

    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].half_of = model[0].weight / 2  # no leaf of autograd
    for one in (model, nn.Sequential(Itself())):
        with pytest.raises(BncliError, match="cannot be copied"):
            fold_batch_norm(one)


def test_in_print_there_is_a_line_for_every_reason() -> None:
    folded = tuple(FoldedLayer(f"{number}.norm", f"{number}.conv") for number in range(1_000))
    kept = (
        *(KeptLayer(f"block{number}.norm", "it has a hook") for number in range(1_200)),
        KeptLayer("b", "why"),
    )
    assert str(Folding(nn.Identity(), folded, kept)).splitlines() == [
        "1,000 of 2,201 BatchNorm layers folded",
        "1,200 kept: it has a hook (block0.norm, block1.norm, block2.norm and 1,197 more)",
        "1 kept: why (b)",
    ]
    folding = bncli.fold_batch_norm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    assert isinstance(folding, bncli.Folding)
    assert str(folding) == "1 of 1 BatchNorm layers folded"
