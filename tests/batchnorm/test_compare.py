import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from bncli.batchnorm import compare, diverge, read_running_stats, summarize_divergence
from bncli.batchnorm.bits import as_bytes
from bncli.batchnorm.layers import LayerStats
from bncli.checkpoints import open_checkpoint
from bncli.errors import IncomparableError


@dataclass
class Stored:
    tensor: Tensor
    log: list[str] = field(default_factory=list)

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def chunks(self) -> Iterator[bytes]:
        self.log.append("read")
        data = as_bytes(self.tensor).numpy().tobytes()
        yield from (data[place : place + 7] for place in range(0, len(data), 7))


@dataclass
class Contents:
    state: dict[str, Tensor]
    module: nn.Module | None = None

    def __post_init__(self) -> None:
        self.tensors = {name: Stored(tensor) for name, tensor in self.state.items()}

    def layers(self) -> tuple[LayerStats, ...]:
        return read_running_stats(self.state if self.module is None else self.module)


def network(**options: float) -> nn.Sequential:
    """conv, norm, conv, norm, head; every number random."""
    torch.manual_seed(0)
    norms = nn.BatchNorm2d(4, **options), nn.BatchNorm2d(6, **options)
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(3, 4, 1), norms[0], nn.Conv2d(4, 6, 1), norms[1], nn.Linear(6, 2))


def state() -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network().state_dict().items()}


def changed(*names: str) -> Contents:
    other = state()
    for name in names:
        other[name] += 1
    return Contents(other)


def layer(mean: list[float], var: list[float], eps: float | None = 1e-5) -> LayerStats:
    found = {"n.running_mean": torch.tensor(mean), "n.running_var": torch.tensor(var)}
    (read,) = read_running_stats(found)
    return LayerStats(**{**vars(read), "eps": eps})


def flags(second: Contents) -> dict[str, tuple[str, ...]]:
    return {item.name: item.flags for item in compare(Contents(state()), second).layers}


numbers = st.floats(-1e3, 1e3, width=32)
variances = st.floats(0, 1e4, width=32)
pairs = st.lists(st.tuples(numbers, variances, numbers, variances), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(pairs, st.sampled_from([1e-5, 1e-3, 0.5]))
def test_the_divergence_is_that_of_two_normals_in_float64(channels, eps: float) -> None:
    mean, var, other_mean, other_var = map(list, zip(*channels, strict=True))
    found = diverge(layer(mean, var, eps), layer(other_mean, other_var, eps))
    first, second = (
        Normal(torch.tensor(m).double(), (torch.tensor(v).double() + eps).sqrt())
        for m, v in ((mean, var), (other_mean, other_var))
    )
    assert torch.allclose(found.kl, kl_divergence(second, first), rtol=1e-9, atol=1e-9)
    shift = found.mean_shift_in_first_deviations
    assert torch.allclose(shift, (second.mean - first.mean) / first.stddev, rtol=1e-12)
    assert torch.allclose(found.var_ratio, second.variance / first.variance, rtol=1e-12)
    assert (found.kl >= 0).all()
    back = diverge(layer(other_mean, other_var, eps), layer(mean, var, eps))
    assert torch.allclose(found.var_ratio * back.var_ratio, torch.ones(()).double(), rtol=1e-12)
    # z changes its sign and its unit: the other's deviation
    returned = back.mean_shift_in_first_deviations
    assert torch.allclose(returned, -shift / found.var_ratio.sqrt(), rtol=1e-12)
    assert diverge(layer(mean, var, eps), layer(mean, var, eps)).kl.tolist() == [0.0] * len(mean)


def test_near_one_the_divergence_keeps_its_digits() -> None:
    var = 1 + 2.0**-20
    found = diverge(layer([0.0], [1.0], 0.0), layer([0.0], [var], 0.0))
    assert found.kl.item() == pytest.approx(2.0**-40 / 4, rel=1e-5)  # (r - 1)^2 / 4, to first order


def test_channels_that_eval_mode_cannot_use_are_left_out_and_counted() -> None:
    first = layer([0, 0, 0, 0, 1, math.nan], [1, 0, -1, 3, math.inf, 1.0], eps=1.0)
    second = layer([3, 1, 1, 1, 1, math.nan], [1, 0, 1, -1, 1.0, 1.0], eps=1.0)
    found = diverge(first, second)
    assert found.kl.isnan().tolist() == [False, False, True, True, True, True]
    summary = summarize_divergence(found)
    assert summary.num_incomparable == 4
    assert summary.max_mean_shift_in_first_deviations == pytest.approx(3 / math.sqrt(2))
    assert (summary.max_mean_shift_channel, summary.max_kl_channel) == (0, 0)
    nothing = summarize_divergence(diverge(layer([0.0], [-1.0]), layer([0.0], [1.0])))
    assert (nothing.num_incomparable, nothing.kl, nothing.mean_shift_in_first_deviations) == (1, None, None)


def test_the_summary_names_the_channel_that_moved_most_in_either_direction() -> None:
    found = diverge(layer([0.0, 0, 0], [1.0, 1, 1], 0.0), layer([1.0, -2, 0], [1.0, 1, 0.01], 0.0))
    summary = summarize_divergence(found)
    assert summary.mean_shift_in_first_deviations == pytest.approx(math.sqrt(5 / 3))
    assert (summary.max_mean_shift_in_first_deviations, summary.max_mean_shift_channel) == (2.0, 1)
    assert summary.var_ratio == pytest.approx(0.01 ** (1 / 3))
    assert (summary.var_ratio_min, summary.var_ratio_max) == (pytest.approx(0.01), 1.0)
    kl = [0.5, 2.0, (0.01 - 1 - math.log(0.01)) / 2]
    assert summary.kl_sum == pytest.approx(sum(kl))
    assert summary.kl == pytest.approx(sum(kl) / 3)
    assert (summary.max_kl, summary.max_kl_channel) == (2.0, 1)


@pytest.mark.parametrize(("one", "two", "expected"), [(None, None, 1e-5), (None, 3.0, 3.0), (3.0, None, 3.0)])
def test_an_unknown_eps_is_the_other_layers_or_the_default(one, two, expected) -> None:
    found = diverge(layer([0.0], [1.0], one), layer([0.0], [5.0], two))
    assert found.var_ratio.item() == pytest.approx((5 + expected) / (1 + expected), rel=1e-12)


def test_other_numbers_of_channels_cannot_diverge() -> None:
    with pytest.raises(ValueError, match="1 and 2 channels"):
        diverge(layer([0.0], [1.0]), layer([0.0] * 2, [1.0] * 2))


def test_a_checkpoint_is_identical_to_itself_with_its_nans() -> None:
    broken = state()
    broken["1.running_mean"][0] = math.nan
    found = compare(Contents(broken), Contents({name: t.clone() for name, t in broken.items()}))
    assert found.identical
    assert found.num_tensors == len(broken) == 16
    assert not any(x.statistics_moved or x.weights_moved or x.flags for x in found.layers)


@pytest.mark.parametrize("name", sorted(state()))
def test_no_tensor_can_change_unnoticed(name: str) -> None:
    found = compare(Contents(state()), changed(name))
    assert not found.identical
    assert found.num_tensors_changed == 1


def test_minus_zero_and_another_dtype_have_moved() -> None:
    for change in (lambda t: -t, lambda t: t.double()):
        one, two = state(), state()
        one["1.bias"].zero_()
        two["1.bias"] = change(one["1.bias"])
        found = compare(Contents(one), Contents(two))
        assert [x.weights_moved for x in found.layers] == [True, False]
        assert found.num_tensors_changed == 1


STALE, FROZEN = "statistics_moved_weights_unchanged", "weights_moved_statistics_unchanged"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["1.running_mean"], [[STALE], []]),
        (["1.running_var", "3.running_var"], [[STALE], [STALE]]),
        (["1.running_mean", "0.weight"], [[], []]),  # a convolution before it explains it
        (["3.running_mean", "0.weight"], [[FROZEN], []]),  # even one that does not feed it itself
        (["3.running_mean", "1.bias"], [[FROZEN], []]),
        (["1.running_mean", "1.weight"], [[], []]),
        (["1.running_mean", "2.weight"], [[STALE], [FROZEN]]),  # what comes later explains nothing
        (["1.running_mean", "4.weight"], [[STALE], []]),
        (["2.bias"], [[], [FROZEN]]),
        (["3.bias"], [[], [FROZEN]]),
        (["2.bias", "3.running_var"], [[], []]),
        (["4.weight"], [[], []]),
        (["1.num_batches_tracked"], [[], []]),
    ],
)
def test_flags_tell_statistics_without_weights_and_weights_without_statistics(names, expected) -> None:
    assert [list(found) for found in flags(changed(*names)).values()] == expected


@pytest.mark.parametrize("sides", [1, -1])
@pytest.mark.parametrize(
    ("moved", "lacking", "fed", "expected"),
    [
        # BatchNorm layers alone, as `bncli convert` writes them: nothing is known of the others
        ([], ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"], [None, None], [[], []]),
        (["3.running_mean"], ["0.weight"], [None, False], [[], []]),  # it may have moved
        (
            ["3.running_mean"],
            ["4.weight"],
            [False, False],
            [[], [STALE]],
        ),  # what comes later need not be known
        (["2.bias"], ["2.weight"], [False, True], [[], [FROZEN]]),
        (["3.running_var"], ["3.bias"], [False, False], [[], []]),
        ([], ["3.weight"], [False, False], [[], []]),
    ],
)
def test_a_tensor_that_one_file_lacks_has_not_moved_and_proves_nothing(
    moved: list[str], lacking: list[str], fed: list[bool | None], expected: list[list[str]], sides: int
) -> None:
    second = changed(*moved)
    less = Contents({name: tensor for name, tensor in second.state.items() if name not in lacking})
    whole = Contents(state())
    pair = [whole, less][::sides]
    if sides == -1:  # the file that knows the order is the second
        pair[0] = sort_names(less)
    found = compare(*pair)
    assert [x.feeding_weights_moved for x in found.layers] == fed
    assert [list(x.flags) for x in found.layers] == expected
    assert not any(x.weights_moved for x in found.layers)
    assert (found.num_tensors_changed, found.identical) == (len(moved), False)


def test_feeding_weights_are_those_between_the_layer_before_and_it() -> None:
    for name, expected in {"0.bias": [True, False], "2.weight": [False, True], "1.weight": [False, False],
                           "4.bias": [False, False]}.items():  # fmt: skip
        found = compare(Contents(state()), changed(name)).layers
        assert [x.feeding_weights_moved for x in found] == expected


def sort_names(contents: Contents) -> Contents:
    return Contents({name: contents.state[name] for name in sorted(contents.state)})


def test_sorted_names_take_the_order_of_the_other_file_or_admit_that_it_is_lost() -> None:
    one, two = Contents(state()), changed("2.weight")
    for pair in ((sort_names(one), two), (one, sort_names(two))):
        found = compare(*pair)
        assert found.order_known
        assert [x.feeding_weights_moved for x in found.layers] == [False, True]
    found = compare(sort_names(one), sort_names(two))
    assert not found.order_known
    assert [x.feeding_weights_moved for x in found.layers] == [None, None]
    recalibrated = compare(sort_names(one), sort_names(changed("1.running_mean")))
    assert [x.flags for x in recalibrated.layers] == [(STALE,), ()]
    explained = compare(sort_names(one), sort_names(changed("1.running_mean", "4.weight")))
    assert [x.flags for x in explained.layers] == [(), ()]


def test_layers_and_tensors_of_only_one_are_listed() -> None:
    one, two = state(), state()
    for name in [name for name in two if name.startswith("3.")]:
        two["9" + name[1:]] = two.pop(name) + 1
    two["1.running_mean"], two["1.running_var"] = torch.zeros(5), torch.ones(5)
    found = compare(Contents(one), Contents(two))
    assert (found.only_in_first, found.only_in_second) == (("3",), ("9",))
    assert found.different_num_features == ("1",)
    assert (found.num_tensors_only_in_first, found.num_tensors_only_in_second) == (5, 5)
    assert (found.num_tensors, found.num_tensors_changed) == (11, 2)
    assert not found.identical


def test_other_names_are_matched_by_order_and_that_is_said() -> None:
    renamed = Contents({f"net.{name}": tensor for name, tensor in changed("2.weight").state.items()})
    found = compare(Contents(state()), renamed)
    assert found.matched_by == "order"
    assert [(x.name, x.name_in_second) for x in found.layers] == [("1", "net.1"), ("3", "net.3")]
    assert [x.feeding_weights_moved for x in found.layers] == [False, True]
    assert (found.num_tensors, found.num_tensors_changed) == (16, 1)
    assert compare(Contents(state()), Contents(state())).matched_by == "name"


def named(*names: str) -> Contents:
    """A network with so many layers, each with numbers of its own; a name twice is one layer."""
    made = {}
    for name in names:
        torch.manual_seed(sum(map(ord, name.rpartition(".")[2])))
        layer = nn.BatchNorm2d(4)
        if not name.endswith("fresh"):
            layer.running_mean.normal_()
        made |= {f"{name}.{leaf}": tensor for leaf, tensor in layer.state_dict().items()}
    return Contents(made)


@pytest.mark.parametrize(
    ("first", "second", "matched_by", "pairs"),
    [
        # one export names the network around a layer, the other does not
        ("stem block.bn", "stem bn", "name", "stem:stem block.bn:bn"),
        ("stem bn", "stem block.bn", "name", "stem:stem bn:block.bn"),
        ("stem a.bn b.bn", "stem bn", "name", "stem:stem"),  # either could be meant, by its values too
        ("stem bn", "stem a.bn b.bn", "name", "stem:stem"),
        ("stem a.bn", "stem b.bn", "name", "stem:stem a.bn:b.bn"),  # by its values
        ("stem a.fresh", "stem b.fresh", "name", "stem:stem"),  # untrained, like any other
        ("stem a.bn", "stem b.other", "name", "stem:stem"),
        ("a.one a.two a.three", "three two one", "name", "a.one:one a.two:two a.three:three"),
        ("a.one a.two a.three", "one two three", "order", "a.one:one a.two:two a.three:three"),
        ("a.one a.two a.three", "two three", "name", "a.two:two a.three:three"),
        ("one two x.three", "p.two q.three", "values", "two:p.two x.three:q.three"),
        (
            "x.one x.two x.three",
            "y.three y.two y.one y.zero",
            "values",
            "x.one:y.one x.two:y.two x.three:y.three",
        ),
        ("x.one x.two", "y.zero y.one y.two", "values", "x.one:y.one x.two:y.two"),
    ],
)
def test_layers_are_counterparts_where_one_name_ends_in_the_other(
    first: str, second: str, matched_by: str, pairs: str
) -> None:
    found = compare(named(*first.split()), named(*second.split()))
    assert found.matched_by == matched_by
    assert " ".join(f"{layer.name}:{layer.name_in_second}" for layer in found.layers) == pairs
    assert {layer.relation.kind for layer in found.layers} == {"equal"}
    assert found.num_tensors_changed == 0


def test_nothing_in_common_is_refused() -> None:
    other = Contents({f"x.{name}": tensor for name, tensor in nn.BatchNorm2d(3).state_dict().items()})
    with pytest.raises(IncomparableError, match="1 with 4, 3 with 6"):
        compare(Contents(state()), other)


def test_a_hyperparameter_that_both_know_counts_as_a_difference() -> None:
    pair = [Contents(network(eps=eps).state_dict(), network(eps=eps)) for eps in (1e-5, 1e-3)]
    found = compare(*pair)
    assert [x.hyperparameters_changed for x in found.layers] == [True, True]
    assert not found.identical
    assert found.num_tensors_changed == 0


def test_a_tensor_is_read_once_up_to_the_first_difference_and_never_when_shapes_tell() -> None:
    one, two = Contents(state()), changed("0.weight")
    two.tensors["4.weight"] = Stored(torch.zeros(9))
    compare(one, two)
    for contents in (one, two):
        logs = {name: tensor.log for name, tensor in contents.tensors.items()}
        assert logs.pop("4.weight") == []
        assert all(log == ["read"] for log in logs.values())


def test_a_divergence_prints_on_one_line_with_what_it_is_measured_in() -> None:
    found = diverge(layer([0.0, 0, 0], [1.0, 1, -1], 0.0), layer([3.0, -4, 0], [1.0, 4, 1], 0.0))
    assert str(found) == (
        "3 channels: mean shift 3.5 of the first's deviations (at most 4, in channel 1), variance ratio 2"
        " (1 to 4), KL divergence 6.7 (at most 8.8, in channel 1); channels left out: 1"
    )
    moved = compare(Contents(state()), changed("3.running_mean")).layers
    assert str(moved[0]).startswith("1: mean shift 0 of the first's deviations")
    assert str(moved[1]).endswith("[statistics_moved_weights_unchanged]")


def test_a_file_in_float16_is_the_same_within_rounding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(8)
    layer(torch.randn(50, 8) + 3)
    torch.save(layer.state_dict(), tmp_path / "wide.pt")
    torch.save(layer.half().state_dict(), tmp_path / "narrow.pt")
    with open_checkpoint(tmp_path / "wide.pt") as one, open_checkpoint(tmp_path / "narrow.pt") as two:
        verdict = compare(one, two).verdict
    assert "4 of 5 tensors differ. All BatchNorm layers are the same within rounding (at most" in verdict
    moved = torch.load(tmp_path / "narrow.pt")
    moved["running_mean"][0] += 0.1
    torch.save(moved, tmp_path / "moved.pt")
    with open_checkpoint(tmp_path / "wide.pt") as one, open_checkpoint(tmp_path / "moved.pt") as two:
        assert "within rounding" not in compare(one, two).verdict
