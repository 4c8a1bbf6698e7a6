from collections import OrderedDict

import pytest
import torch
from torch import nn

from bncli.batchnorm.layers import Hyperparameters, batch_norm_layers, read_running_stats
from bncli.batchnorm.modes import buffers_digest


def small_net() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 4, 3),
            norm=nn.BatchNorm2d(4, momentum=0.4, eps=1e-3),
            flat=nn.Flatten(2),
            norm1d=nn.BatchNorm1d(4, momentum=None, affine=False),
        )
    )


def test_a_module_is_read_with_its_hyperparameters_in_model_order() -> None:
    net = small_net()
    net(torch.randn(8, 3, 5, 5))
    first, second = read_running_stats(net)
    assert (first.name, second.name) == ("norm", "norm1d")
    assert (first.num_features, first.num_batches_tracked) == (4, 1)
    assert (first.momentum, first.eps, first.hyperparameters_known) == (0.4, 1e-3, True)
    assert (second.momentum, second.hyperparameters_known) == (None, True)
    for key in ("running_mean", "running_var", "weight", "bias"):
        assert torch.equal(getattr(first, key), getattr(net.norm, key))
    assert second.weight is None
    assert second.bias is None


def test_a_state_dict_gives_the_same_tensors_but_no_hyperparameters() -> None:
    net = small_net()
    net(torch.randn(8, 3, 5, 5))
    from_module, from_state = read_running_stats(net), read_running_stats(net.state_dict())
    assert [layer.name for layer in from_state] == [layer.name for layer in from_module]
    for layer, other in zip(from_state, from_module, strict=True):
        assert (layer.momentum, layer.eps, layer.hyperparameters_known) == (None, None, False)
        assert layer.num_batches_tracked == other.num_batches_tracked == 1
        for key in ("running_mean", "running_var", "weight", "bias"):
            mine, its = getattr(layer, key), getattr(other, key)
            assert (mine is None and its is None) or torch.equal(mine, its)


def test_a_bare_layer_has_the_empty_name_in_both_forms() -> None:
    norm = nn.BatchNorm2d(2)
    assert [layer.name for layer in read_running_stats(norm)] == [""]
    assert [layer.name for layer in read_running_stats(norm.state_dict())] == [""]


def test_looking_changes_nothing_and_results_share_no_memory() -> None:
    net = small_net()
    digest, mode = buffers_digest(net), net.training
    state = net.state_dict()
    for source in (net, state):
        layer = read_running_stats(source)[0]
        layer.running_mean.fill_(7)
        layer.running_var.fill_(7)
        layer.weight.fill_(7)
        layer.bias.fill_(7)
    assert buffers_digest(net) == digest
    assert net.training is mode
    assert torch.equal(net.norm.weight, torch.ones(4))
    assert torch.equal(net.norm.bias, torch.zeros(4))


def test_training_on_does_not_change_a_result() -> None:
    net = small_net()
    layer = read_running_stats(net)[0]
    net(torch.randn(8, 3, 5, 5))
    assert torch.equal(layer.running_mean, torch.zeros(4))
    assert not torch.equal(net.norm.running_mean, torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_keep_their_dtype(dtype: torch.dtype) -> None:
    layer = read_running_stats(small_net().to(dtype))[0]
    assert {layer.running_mean.dtype, layer.running_var.dtype, layer.weight.dtype} == {dtype}


def test_a_layer_without_running_statistics_is_listed_from_a_module() -> None:
    (layer,) = read_running_stats(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))
    assert (layer.running_mean, layer.running_var, layer.num_batches_tracked) == (None, None, None)
    assert layer.num_features == 3


def test_a_module_under_two_names_is_listed_once_under_the_first() -> None:
    norm = nn.BatchNorm2d(3)
    net = nn.ModuleDict({"first": norm, "second": norm})
    assert [name for name, _ in batch_norm_layers(net)] == ["first"]


def test_every_kind_of_batch_norm_is_found_and_no_other_norm() -> None:
    found = [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)]
    others = [nn.InstanceNorm2d(2, track_running_stats=True), nn.GroupNorm(1, 2), nn.LayerNorm(2)]
    net = nn.Sequential(*found, *others)
    assert [module for _, module in batch_norm_layers(net)] == found


def test_a_lazy_layer_that_saw_nothing_yet_has_no_tensors() -> None:
    (layer,) = read_running_stats(nn.Sequential(nn.LazyBatchNorm2d()))
    assert (layer.running_mean, layer.weight) == (None, None)


def test_a_state_dict_is_read_by_keys_and_shapes_and_strangers_are_skipped() -> None:
    vector = torch.ones(3)
    state = {
        "a.running_mean": vector,
        "a.running_var": vector,
        "a.weight": torch.ones(5),  # of something else
        "b.running_mean": vector,  # no variance
        "c.running_mean": vector,
        "c.running_var": torch.ones(4),
        "d.running_mean": torch.ones(3, 3),
        "d.running_var": torch.ones(3, 3),
        "e.running_mean": "text",
        "e.running_var": vector,
        "f.my_running_mean": vector,
        "f.my_running_var": vector,
        "extra_state": None,
    }
    (layer,) = read_running_stats(state)
    assert layer.name == "a"
    assert layer.weight is None
    assert layer.num_batches_tracked is None


@pytest.mark.parametrize("wrong", [None, "path.pt", 3, [torch.ones(3)]])
def test_anything_else_is_a_type_error(wrong: object) -> None:
    with pytest.raises(TypeError, match=f"got {type(wrong).__name__}"):
        read_running_stats(wrong)


def test_hyperparameters_tell_a_state_dict_what_only_the_module_knew() -> None:
    net = small_net()
    net.add_module("bare", nn.BatchNorm2d(5, track_running_stats=False))
    modules = batch_norm_layers(net)
    known = {
        name: Hyperparameters(module.num_features, module.eps, module.momentum) for name, module in modules
    }
    layers = read_running_stats(net.state_dict(), known)
    expected = [(name, module.num_features, module.eps, module.momentum) for name, module in modules]
    assert [(x.name, x.num_features, x.eps, x.momentum) for x in layers] == expected
    assert layers[2].running_mean is None
    assert torch.equal(layers[2].weight, net.bare.weight)


@pytest.mark.parametrize(
    ("counter", "count", "dtype"),
    [
        (torch.tensor(7), 7, torch.int64),
        (torch.tensor(7.75), 7, torch.float32),
        (torch.tensor(float("nan")), None, torch.float32),
        (torch.tensor([1, 2]), None, torch.int64),
        (3, None, None),
    ],
)
def test_a_counter_of_any_type_is_read_with_its_type(
    counter: object, count: int | None, dtype: torch.dtype | None
) -> None:
    (layer,) = read_running_stats({**nn.BatchNorm2d(2).state_dict(), "num_batches_tracked": counter})
    assert (layer.num_batches_tracked, layer.counter_dtype) == (count, dtype)
