"""Every rule of the audit: what triggers it, what nearly does, and numbers from independent formulas."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bncli.batchnorm import RULES, Finding, LayerStats, audit_layers, read_running_stats
from bncli.errors import BncliError
from bncli.torchvision_compat import import_torchvision


def layer(name: str = "norm", **changes: object) -> LayerStats:
    """A healthy layer of four channels after 1,000 updates, some fields changed; lists become tensors."""
    healthy = LayerStats(
        name=name,
        num_features=4,
        num_batches_tracked=1000,
        counter_dtype=torch.int64,
        momentum=0.1,
        eps=1e-5,
        hyperparameters_known=True,
        running_mean=torch.tensor([0.5, -0.5, 0.1, 2.0]),
        running_var=torch.tensor([1.5, 0.5, 0.9, 2.0]),
        weight=torch.tensor([1.0, 0.8, 1.2, 0.9]),
        bias=torch.tensor([0.1, -0.1, 0.0, 0.2]),
    )
    tensors = {key: torch.tensor(value) for key, value in changes.items() if isinstance(value, list)}
    return replace(healthy, **{**changes, **tensors})


def test_what_was_measured_has_no_start_left_in_it() -> None:
    assert found(layer(num_batches_tracked=10)) == [("initial_residue", "norm", ())]
    assert found(layer(num_batches_tracked=10, was_measured=True)) == []


def found(*layers: LayerStats, **options: object) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(finding.name, finding.layer, finding.channels) for finding in audit_layers(layers, **options)]


def only(*layers: LayerStats, **options: object) -> Finding:
    (finding,) = audit_layers(layers, **options)
    return finding


def test_a_healthy_layer_and_no_layer_have_no_findings() -> None:
    assert audit_layers([layer()]) == audit_layers([]) == ()


TRIGGERS = [
    ("never_updated", {"running_mean": [0.0] * 4, "running_var": [1.0] * 4}, ()),
    ("initial_residue", {"num_batches_tracked": 43}, ()),
    ("non_finite", {"running_mean": [0.0, 1.0, math.nan, 1.0]}, (2,)),
    ("non_finite", {"bias": [0.0, -math.inf, 1.0, math.nan]}, (1, 3)),
    ("negative_variance", {"running_var": [1.0, -1e-30, 2.0, 1.0]}, (1,)),
    (
        "eps_decides",
        {"running_var": [1.0, 2.0, 2.0, 0.9e-5], "weight": [0.3] * 4, "running_mean": [0.0] * 4},
        (3,),
    ),
    ("dead_channel", {"weight": [1.0, 0.0, 1.0, 1.0]}, (1,)),
    ("dead_channel", {"running_var": [0.99e-7, 1.0, 1.0, 0.0]}, (0, 3)),
    ("exploding_gain", {"weight": [101.0, 1.0, 1.0, 1.0], "running_var": [1.0, 1.1, 1.0, 1.0]}, (0,)),
    ("exploding_gain", {"weight": [1e5, 1e5, 1e5, 1e5], "running_var": [2.1, 3.0, 2.0, 2.0]}, (0, 2, 3)),
    ("switched_off", {"weight": [1.0, -0.2, 1.0, 1.0], "bias": [0.0, -0.96, 0.0, 0.0]}, (1,)),
    ("counter_type", {"counter_dtype": torch.float32}, ()),
    ("counter_type", {"counter_dtype": torch.int32}, ()),
    ("far_mean", {"running_mean": [0.0, 0.0, -64.1, 0.0], "running_var": [2.0, 1.0, 1.0, 1.0]}, (2,)),
    ("few_batches", {"momentum": 0.67}, ()),
    ("few_batches", {"momentum": 1.0}, ()),
    ("no_running_stats", {"running_mean": None, "running_var": None}, ()),
    ("no_running_stats", {"running_var": None}, ()),
]


@pytest.mark.parametrize(("name", "changes", "channels"), TRIGGERS)
def test_a_rule_finds_its_fault_and_no_other_rule_does(
    name: str, changes: dict[str, object], channels: tuple[int, ...]
) -> None:
    # beside healthy layers before and after it: positions must not slip
    layers = (layer("before"), layer("bad", **changes), layer("after"))
    if name == "initial_residue":
        layers = tuple(replace(item, num_batches_tracked=43) for item in layers)[1:2]
    assert found(*layers) == [(name, "bad", channels)]


NEARLY = {
    "one mean moved": {"running_mean": [0.0, 0.0, 0.0, 1e-30], "running_var": [1.0] * 4},
    "one variance moved": {"running_mean": [0.0] * 4, "running_var": [1.0, 1.0, 1.0000001, 1.0]},
    "44 updates": {"num_batches_tracked": 44},
    "a counter of 0 tells nothing": {"num_batches_tracked": 0},
    "no counter": {"num_batches_tracked": None, "counter_dtype": None},
    "a cumulative average": {"num_batches_tracked": 2, "momentum": None},
    "frozen by momentum 0": {"num_batches_tracked": 1, "momentum": 0.0},
    "momentum 0.66": {"num_batches_tracked": 1000, "momentum": 0.66},
    "momentum 1, but measured": {"num_batches_tracked": 1, "momentum": 1.0, "was_measured": True},
    "a gain through a small variance, up to 30 times the median": {
        "running_var": [1.0, 1.0, 1.0, 3e-3],
        "weight": [6.0, 6.0, 6.0, 6.0],
    },
    "a variance below what would be left": {
        "num_batches_tracked": 10,
        "running_var": [1.0, 0.3, 1.0, 1.0],  # 0.9 ** 10 = 0.35
    },
    "the largest float": {"bias": [3.4e38, 0.0, 0.0, 0.0]},
    "variance above eps": {
        "running_var": [1.0, 2.0, 2.0, 1.01e-5],
        "weight": [0.3] * 4,
        "running_mean": [0.0] * 4,
    },
    "a tiny weight": {"weight": [1.0, 1e-30, 1.0, 1.0], "bias": [0.1] * 4},
    "gain 99": {"weight": [99.0, 1.0, 1.0, 1.0], "running_var": [1.0] * 4},
    "a steep layer": {"weight": [2000.0, 100.0, 100.0, 100.0], "running_var": [1.0] * 4},
    "bias -4.7 deviations": {"weight": [1.0, 0.2, 1.0, 1.0], "bias": [0.0, -0.94, 0.0, 0.0]},
    "a small bias": {"weight": [1.0, 0.001, 1.0, 1.0], "bias": [0.0, -0.099, 0.0, 0.0]},
    "mean 63 deviations": {"running_mean": [0.0, 0.0, -63.9, 0.0], "running_var": [2.0, 1.0, 1.0, 1.0]},
    "no affine parameters": {"weight": None, "bias": None},
}


@pytest.mark.parametrize("changes", NEARLY.values(), ids=NEARLY)
def test_what_nearly_triggers_a_rule_does_not(changes: dict[str, object]) -> None:
    assert found(layer(**changes)) == []


@given(momentum=st.floats(0.001, 0.999), count=st.integers(1, 5000), limit=st.floats(1e-6, 0.99))
def test_the_residue_is_what_the_recurrence_leaves(momentum: float, count: int, limit: float) -> None:
    left = math.exp(count * math.log1p(-momentum))
    if abs(left / limit - 1) < 1e-6:
        return
    subject = layer(momentum=momentum, num_batches_tracked=count, running_var=[1.5] * 4)
    findings = audit_layers([subject], thresholds={"residue": limit}, select=["BN002"])
    assert bool(findings) == (left > limit)
    assert all(finding.values["residue"] == pytest.approx(left, rel=1e-9) for finding in findings)


def test_pytorch_itself_leaves_that_residue_and_the_rule_sees_it_in_a_state_dict() -> None:
    norm = nn.BatchNorm1d(2)
    for _ in range(20):
        norm(torch.zeros(4, 2) + torch.tensor([3.0, -1.0]))  # variance 0: only the start is left
    left = float(norm.running_var[0])
    finding = only(*read_running_stats(norm.state_dict()), ignore=["far_mean"])
    assert finding.name == "initial_residue"
    assert finding.values["residue"] == pytest.approx(left, rel=1e-5)
    assert "momentum 0.1 (assumed)" in finding.message
    assert "assumed" not in only(*read_running_stats(norm), ignore=["far_mean"]).message


@given(
    weight=st.floats(0.01, 3.0), bias=st.floats(-9.0, -0.1), variance=st.floats(1e-6, 2.0), sign=st.booleans()
)
def test_the_share_above_0_is_the_normal_models(
    weight: float, bias: float, variance: float, sign: bool
) -> None:
    deviation = weight * math.sqrt(variance / (variance + 1e-5))
    share = 1 - statistics.NormalDist(bias, deviation).cdf(0.0)
    signed = weight if sign else -weight
    subject = layer(
        running_var=torch.full((4,), variance, dtype=torch.float64),
        weight=torch.tensor([1.0, 1.0, signed, 1.0], dtype=torch.float64),
        bias=torch.tensor([0.0, 0.0, bias, 0.0], dtype=torch.float64),
    )
    findings = audit_layers([subject], thresholds={"active_share": 1e-3}, select=["switched_off"])
    if abs(share / 1e-3 - 1) > 1e-6:
        assert bool(findings) == (share < 1e-3)
    for finding in findings:
        assert finding.channels == (2,)
        assert finding.values["active_share"] == pytest.approx(share, rel=1e-6, abs=1e-12)


def test_the_gain_is_the_slope_of_eval_mode() -> None:
    norm = nn.BatchNorm1d(5).double().eval()
    with torch.no_grad():
        norm.running_var.copy_(torch.tensor([1.0, 2.0, 0.5, 1.0, 1e-4]))
        norm.weight.copy_(torch.tensor([1.0, -0.5, 1.0, 1.0, -3.0]))
        slope = norm(torch.ones(1, 5).double()) - norm(torch.zeros(1, 5).double())
    finding = only(*read_running_stats(norm), select=["exploding_gain"])
    assert finding.channels == (4,)
    assert finding.values["gain"] == pytest.approx(float(slope.abs().max()))
    assert finding.values["median"] == pytest.approx(statistics.median(slope.abs().flatten().tolist()))


def test_a_layer_that_counts_otherwise_than_most_is_found() -> None:
    layers = [
        layer(str(count), num_batches_tracked=count) for count in (1000, 900, 2000, 500, 8000, 9000, 1000)
    ]
    assert found(*layers) == [
        ("counter_unequal", "900", ()),
        ("counter_unequal", "9000", ()),
        ("counter_multiple", "2000", ()),
        ("counter_multiple", "500", ()),
        ("counter_multiple", "8000", ()),
    ]
    assert [item.values["multiple"] for item in audit_layers(layers, select=["BN011"])] == [2, 2, 8]


def test_of_two_counts_equally_common_the_smaller_is_the_usual_one() -> None:
    finding = only(layer("b", num_batches_tracked=1200), layer("a"))
    assert (finding.layer, finding.values["usual"]) == ("b", 1000)


def test_a_counter_of_0_beside_others_is_unequal_but_an_untouched_layer_is_not_compared() -> None:
    assert found(layer(), layer("b"), layer("c", num_batches_tracked=0)) == [("counter_unequal", "c", ())]
    fresh = layer("d", num_batches_tracked=0, running_mean=[0.0] * 4, running_var=[1.0] * 4)
    assert found(layer(), fresh) == [("never_updated", "d", ())]
    assert found(layer(), layer("e", num_batches_tracked=None, counter_dtype=None)) == []


def test_a_module_called_twice_and_averaged_weights_are_found_in_real_networks() -> None:
    norms = nn.ModuleList([nn.BatchNorm1d(3) for _ in range(3)])
    for _ in range(60):
        for norm in (*norms, norms[1]):
            norm(torch.randn(16, 3))
    assert found(*read_running_stats(norms)) == [("counter_multiple", "1", ())]
    average = {key: value / 3 for key, value in norms.state_dict().items()}
    names = {name for name, _, _ in found(*read_running_stats(average))}
    assert "counter_type" in names


def test_an_untouched_layer_with_few_updates_is_reported_once() -> None:
    fresh = layer(num_batches_tracked=5, running_mean=[0.0] * 4, running_var=[1.0] * 4)
    assert found(fresh) == [("never_updated", "norm", ())]


def test_a_threshold_moves_the_limit() -> None:
    subject = layer(running_mean=[0.0, 0.0, 10.0, 0.0])
    assert found(subject) == []
    finding = only(subject, thresholds={"mean_in_deviations": 10.0})
    assert finding.values["mean_in_deviations"] == pytest.approx(10 / math.sqrt(0.9))
    assert finding.thresholds == {"mean_in_deviations": 10.0}


@pytest.mark.parametrize(
    "options",
    [{"thresholds": {"gian": 3.0}}, {"thresholds": {"gain": math.nan}}, {"thresholds": {"gain": -1.0}},
     {"select": ["BN999"]}, {"ignore": ["dead"]}],
)  # fmt: skip
def test_rules_and_thresholds_that_do_not_exist_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(BncliError):
        audit_layers([layer()], **options)


def test_select_and_ignore_take_codes_and_names() -> None:
    subject = layer(weight=[0.0, 1.0, 1.0, 1.0], running_var=[1.0, -1.0, 1.0, 1.0])
    both = [("negative_variance", "norm", (1,)), ("dead_channel", "norm", (0,))]
    assert found(subject) == both
    assert found(subject, select=["dead_channel", "bn004"]) == both
    assert found(subject, ignore=["BN004"]) == both[1:]
    assert found(subject, select=["BN004"], ignore=["negative_variance"]) == []
    assert found(subject, select=[]) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_judged_alike(dtype: torch.dtype) -> None:
    tensors = {"running_var": [1.0, -1.0, 2.0, 1.0], "weight": [1.0, 1.0, 0.0, 1.0]}
    assert found(layer(**{key: torch.tensor(value, dtype=dtype) for key, value in tensors.items()})) == [
        ("negative_variance", "norm", (1,)),
        ("dead_channel", "norm", (2,)),
    ]


def test_every_rule_has_a_test_that_triggers_it() -> None:
    over_layers = {"counter_unequal", "counter_multiple", "near_initial"}
    assert {name for name, _, _ in TRIGGERS} | over_layers == {rule.name for rule in RULES}


@pytest.mark.slow
@pytest.mark.parametrize("zero_init", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_freshly_trained_torchvision_resnet_has_no_finding(zero_init: bool) -> None:
    torch.manual_seed(0)
    model = import_torchvision().models.resnet18(num_classes=4, zero_init_residual=zero_init)
    first = {name for name, _, _ in found(*read_running_stats(model))}
    assert first == ({"never_updated", "dead_channel"} if zero_init else {"never_updated"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(45):
        labels = torch.randint(4, (8,))
        images = torch.randn(8, 3, 32, 32) + labels[:, None, None, None]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert audit_layers(read_running_stats(model)) == ()
    assert audit_layers(read_running_stats(model.state_dict())) == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv3_small_100", "regnety_002", "resnet50"])
def test_a_freshly_trained_timm_network_has_no_finding(name: str) -> None:
    import_torchvision()  # timm imports it, and finds it broken beside a CPU-only torch
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for _ in range(60):
        labels = torch.randint(4, (12,))
        images = torch.randn(12, 3, 64, 64) + labels[:, None, None, None]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    # efficientnet has SiLU and no ReLU: `switched_off` finds a channel that is not off, as --explain warns
    ignore = ["switched_off"] if name == "efficientnet_b0" else []
    assert audit_layers(read_running_stats(model), ignore=ignore) == ()
