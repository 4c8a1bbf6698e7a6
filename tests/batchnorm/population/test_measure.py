import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from bncli.batchnorm import (
    batch_norm_layers,
    buffers_digest,
    measure_population,
    recalibrate,
    verify_fixed_point,
)
from bncli.batchnorm.bits import bitwise_equal
from bncli.batchnorm.population.exact.restart import Restarts
from bncli.errors import BncliError, DataError
from tests.batchnorm.networks import Residual, Shared, Twins, mixed

CUTS = [(8, 8, 8), (1, 13, 2, 8), (24,), (1,) * 24]


def images(num: int = 24, side: int = 8) -> Tensor:
    return torch.randn(num, 3, side, side) * 2 + 1


def inputs_in_eval_mode(model: nn.Module, data: Tensor) -> dict[str, Tensor]:
    """What enters every BatchNorm in eval mode: all of it, one after the other, (C, values) in float64."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.setdefault(name, []).append(
                (args[0] if args else kwargs["input"]).detach().double().movedim(1, 0).flatten(1).clone()
            ),
            with_kwargs=True,
        )
        for name, layer in batch_norm_layers(model)
    ]
    was = model.training
    model.eval()
    with torch.no_grad():
        model(data)
    model.train(was)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values, 1) for name, values in seen.items()}


def state_of(model: nn.Module) -> tuple[object, ...]:
    hooks = [(len(one._forward_pre_hooks), len(one._forward_hooks)) for one in model.modules()]
    modes = [one.training for one in model.modules()]
    return buffers_digest(model), [id(one) for one in model.buffers()], modes, hooks


def built(model: nn.Module, data: Tensor) -> nn.Module:
    model.eval()(data)
    return model.train()


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("network", [Residual, Shared, Twins])
def test_exact_is_a_fixed_point_whatever_the_batches(network: type[nn.Module], cut: tuple[int, ...]) -> None:
    model, data = network(), images()
    result = recalibrate(model, data.split(list(cut)), method="exact")
    assert [layer.name for layer in result.layers] == [name for name, _ in batch_norm_layers(model)]
    layers = dict(batch_norm_layers(model))
    for name, values in inputs_in_eval_mode(model, data.flip(0)).items():
        torch.testing.assert_close(layers[name].running_mean.double(), values.mean(1), rtol=1e-6, atol=1e-6)
        var = values.var(1, unbiased=False)
        torch.testing.assert_close(layers[name].running_var.double(), var, rtol=1e-6, atol=0)
    for one in verify_fixed_point(model, list(data.split(5))):
        assert one.max_relative_error < 1e-6
        assert one.mean_shift_in_input_deviations < 1e-6
        assert one.var_ratio == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_measures_layers_of_every_dimension(dtype: torch.dtype) -> None:
    data = torch.randn(12, 2, 3, 4, 4)
    model = built(mixed(), data).to(dtype)
    result = recalibrate(model, [data.to(dtype)], method="exact")
    assert [one.name for one in result.layers] == ["0", "2", "4", "9"]
    assert [(one.name, one.reason) for one in result.skipped] == [("6", "has no running statistics")]
    assert max(one.max_relative_error for one in verify_fixed_point(model, [data.to(dtype)])) < 1e-6
    assert model[9].running_var.dtype == dtype


def inputs_in_train_mode(model: nn.Module, batches: list[Tensor]) -> dict[str, list[Tensor]]:
    """What enters every BatchNorm when PyTorch itself normalises by batch statistics, dropout off."""
    seen: dict[str, list[Tensor]] = {}
    model.eval()
    for name, layer in batch_norm_layers(model):
        layer.train()
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.setdefault(name, []).append(
                (args[0] if args else kwargs["input"]).detach().double().movedim(1, 0).flatten(1)
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return seen


@pytest.mark.parametrize("cut", [(8, 8, 8), (2, 13, 2, 7)])
@pytest.mark.parametrize("network", [Residual, Shared, Twins])
def test_precise_pools_what_train_mode_sees(network: type[nn.Module], cut: tuple[int, ...]) -> None:
    model, data = network().double(), images().double()
    batches = list(data.split(list(cut)))
    found = measure_population(model, batches, method="precise")
    for one in found.layers:
        assert one.moments.count > 0
    for name, values in inputs_in_train_mode(model, batches).items():
        (layer,) = (one for one in found.layers if one.name == name)
        together = torch.cat(values, 1)
        assert layer.moments.count == together.shape[1]
        torch.testing.assert_close(layer.moments.mean, together.mean(1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            layer.moments.variance(), together.var(1, unbiased=False), rtol=1e-9, atol=0
        )


@pytest.mark.parametrize("method", ["exact", "precise"])
@pytest.mark.parametrize("cut", [(32, 32), (1, 50, 2, 11), (1,) * 64])
def test_the_moments_of_hard_data_are_right_to_ten_digits(method: str, cut: tuple[int, ...]) -> None:
    data = 1e3 + 1e-3 * torch.randn(64, 4, 5, 5)
    (layer,) = measure_population(
        nn.Sequential(nn.BatchNorm2d(4)), data.split(list(cut)), method=method
    ).layers
    rest = data.double().movedim(1, 0).flatten(1) - 1e3  # exact in float64
    torch.testing.assert_close(layer.moments.mean, 1e3 + rest.mean(1), rtol=1e-13, atol=0)
    torch.testing.assert_close(layer.moments.variance(), rest.var(1, unbiased=False), rtol=1e-10, atol=0)


@pytest.mark.parametrize("method", ["exact", "precise"])
def test_measuring_leaves_everything_as_it_was(method: str) -> None:
    model = Residual().train()
    model.drop.eval()
    model.bn3.eval()
    before = state_of(model)
    found = measure_population(model, images().split(8), method=method)
    assert state_of(model) == before
    assert [one.name for one in found.layers] == ["bn1", "bn2", "bn4"]
    assert "frozen" in found.skipped[0].reason
    recalibrate(model, images().split(8), method=method)
    assert state_of(model)[1:] == before[1:]
    assert torch.equal(model.bn3.running_mean, torch.zeros(6))
    assert model.bn1.num_batches_tracked == 0
    assert model.bn1.momentum == 0.1


@pytest.mark.parametrize("method", ["exact", "precise"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", [2, 5, 7])
def test_nothing_is_left_behind_when_the_loader_raises(method: str, error: type, fails_at: int) -> None:
    model = Residual().train()
    before = state_of(model)
    given = itertools.count()

    def batches() -> Iterator[Tensor]:
        for batch in images().split(6):
            if next(given) == (fails_at if method == "exact" else 2):
                raise error
            yield batch

    with pytest.raises(error):
        recalibrate(model, batches, method=method)
    assert state_of(model) == before


def test_a_model_in_eval_mode_has_no_frozen_layers_and_a_glob_chooses() -> None:
    model = Residual().eval()
    found = measure_population(model, images().split(8), layers="bn[12]")
    assert [one.name for one in found.layers] == ["bn1", "bn2"]
    assert found.skipped == ()
    found = measure_population(model, images().split(8), layers=lambda name: name == "bn4")
    assert [one.name for one in found.layers] == ["bn4"]
    with pytest.raises(BncliError, match="no BatchNorm layer matches 'x'; there are bn1, bn2"):
        measure_population(model, images().split(8), layers="x")
    with pytest.raises(BncliError, match="has no BatchNorm"):
        measure_population(nn.Linear(2, 2), [torch.randn(2, 2)])


@pytest.mark.parametrize("method", ["exact", "precise"])
def test_layers_that_are_not_chosen_normalise_by_their_running_statistics(method: str) -> None:
    model = Residual().eval()
    model.bn1.running_mean.fill_(0.3)
    model.bn1.running_var.fill_(4.0)
    data = images()
    found = measure_population(model, [data], method=method, layers="bn2").layers[0]
    expected = inputs_in_eval_mode(model, data)["bn2"]
    torch.testing.assert_close(found.moments.mean, expected.mean(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "precise"])
def test_unused_and_lazy_layers_are_reported_and_left_alone(method: str) -> None:
    model = Residual()
    model.spare = nn.BatchNorm2d(4)
    model.lazy = nn.LazyBatchNorm2d()
    model.reached = nn.Sequential()
    found = measure_population(model, [images()], method=method)
    assert {one.name: one.reason for one in found.skipped} == {
        "spare": "saw no input",
        "lazy": "is not built yet",
    }
    lazy = nn.Sequential(nn.BatchNorm2d(3), nn.LazyConv2d(4, 1))
    with pytest.raises(BncliError, match="LazyConv2d that is not built yet"):
        measure_population(lazy, [images()], method=method)
    assert lazy[1].has_uninitialized_params()


def test_what_cannot_be_gone_through_is_refused() -> None:
    model = Residual()
    for once in (iter([images()]), (batch for batch in [images()])):
        with pytest.raises(DataError, match="only once"):
            measure_population(model, once)
    assert measure_population(model, iter([images()]), method="precise").num_images == 24
    for method in ("exact", "precise"):
        with pytest.raises(DataError, match="no images"):
            measure_population(model, [], method=method)
        with pytest.raises(DataError, match="a batch is a dict"):
            measure_population(model, [{"video": images()}], method=method)
    with pytest.raises(DataError, match="differ from pass to pass"):
        measure_population(model, lambda: iter([images()]))
    sizes = iter([8, 8, 7])
    with pytest.raises(DataError, match="gave 8 images and a later one 7"):
        measure_population(model, lambda: iter([torch.ones(next(sizes), 3, 8, 8)]))
    with pytest.raises(BncliError, match="unknown method"):
        measure_population(model, [images()], method="other")
    with pytest.raises(BncliError, match="shards"):
        measure_population(model, [images()], first_batch=3)


def test_batches_may_be_tuples_a_function_or_a_shuffled_loader() -> None:
    model, data = Residual(), images()
    labels = torch.zeros(24)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data, labels), 5, shuffle=True)
    expected = measure_population(model, [data])
    for batches in (loader, [(data, labels)], lambda: iter([data[:0], [data[:9]], [data[9:]]])):
        found = measure_population(model, batches)
        assert found.num_images == 24
        for one, other in zip(found.layers, expected.layers, strict=True):
            torch.testing.assert_close(one.moments.mean, other.moments.mean, rtol=1e-5, atol=1e-5)


def test_a_single_value_per_channel_has_no_batch_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    singles = list(torch.randn(6, 3).split(1))
    with pytest.raises(BncliError, match="0 sees a single value per channel"):
        measure_population(model, singles, method="precise")
    assert measure_population(model, singles, method="exact").layers[0].moments.count == 6


@pytest.mark.parametrize("split", [[5, 4], [1, 8], [3, 3, 3]])
def test_shards_of_a_precise_measurement_have_the_bits_of_one_process(split: list[int]) -> None:
    model, batches = Residual(), list(images(18).split(2))
    whole = measure_population(model, batches, method="precise")
    shards, start = [], 0
    for length in split:
        part = batches[start : start + length]
        shards.append(measure_population(model, part, method="precise", first_batch=start))
        start += length
    merged = shards[-1]
    for shard in shards[:-1]:
        merged = merged.merge(shard)
    assert (merged.num_images, merged.num_batches) == (18, 9)
    for one, other in zip(merged.layers, whole.layers, strict=True):
        assert bitwise_equal(one.moments.mean, other.moments.mean)
        assert bitwise_equal(one.moments.m2, other.moments.m2)
        assert one.standard_error() == other.standard_error()
    with pytest.raises(ValueError, match="twice"):
        merged.merge(whole)
    with pytest.raises(ValueError, match="precise"):
        merged.merge(measure_population(model, batches))


@pytest.mark.parametrize("method", ["exact", "precise"])
def test_a_tolerance_ends_the_measurement_when_it_is_reached(method: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    batches = list(torch.randn(400, 3, 4, 4).split(4))
    done: list[tuple[int, int, int]] = []
    found = measure_population(
        model, batches, method=method, tolerance=0.05, progress=lambda *numbers: done.append(numbers)
    )
    assert found.stopped_early
    assert 8 <= found.num_batches < 100
    assert max(one.standard_error() for one in found.layers) <= 0.06
    assert done[-1][2] == found.num_images == 4 * found.num_batches
    assert done[-1][0] == done[-1][1] == found.num_passes == (3 if method == "exact" else 1)
    assert not measure_population(model, batches, method=method, tolerance=1e-9).stopped_early
    assert measure_population(model, batches, method=method, tolerance=9.0).num_batches == 8


def test_what_autocast_hands_to_a_layer_is_what_is_measured() -> None:
    model, data = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), images()
    with torch.autocast("cpu", torch.bfloat16):
        found = measure_population(model, [data])
        seen = inputs_in_eval_mode(model, data)["1"]
    torch.testing.assert_close(found.layers[0].moments.mean, seen.mean(1), rtol=1e-12, atol=0)
    assert not torch.allclose(seen.mean(1), inputs_in_eval_mode(model, data)["1"].mean(1), rtol=1e-7, atol=0)


@pytest.mark.parametrize("method", ["exact", "precise"])
def test_half_precision_models_are_measured(method: str) -> None:
    model, batches = Residual().bfloat16(), [batch.bfloat16() for batch in images().split(8)]
    before = state_of(model)
    measure_population(model, batches, method=method)
    assert state_of(model) == before
    recalibrate(model, batches, method=method)
    if method == "exact":
        assert max(one.max_relative_error for one in verify_fixed_point(model, batches)) < 0.02
    assert model.bn1.running_var.dtype == torch.bfloat16


def test_a_layer_that_only_later_batches_reach_is_refused_by_exact() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.two(x) if len(x) < 5 else x)

    with pytest.raises(BncliError, match="two is reached by some batches"):
        measure_population(Late(), images(9).split(5))
    found = measure_population(Late(), images(9).split(5), method="precise")
    assert [one.moments.count for one in found.layers] == [9 * 64, 4 * 64]


class Unsettled(nn.Module):
    """Its second input doubles whatever mean comes out of the first: no statistics reproduce themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.bn(x) * 1e-3 + 40 * self.bn.running_mean[:, None, None] + 1)


def test_statistics_that_do_not_settle_are_refused_and_nothing_stays() -> None:
    model = Unsettled()
    before = state_of(model)
    with pytest.raises(BncliError, match="bn: applied again to its own output"):
        measure_population(model, [images()])
    assert state_of(model) == before


def count_multiplications(model: nn.Module) -> Callable[[], int]:
    """Those of convolutions that were really computed so far."""
    done = [0]

    def add(conv: nn.Module, _args: object, output: Tensor) -> None:
        if not output.is_meta:
            done[0] += output.numel() * conv.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    return lambda: done[0]


@pytest.mark.slow
def test_resnet18_costs_a_few_forward_passes_for_20_layers(trials: dict[Restarts, float]) -> None:
    from bncli.torchvision_compat import import_torchvision

    import_torchvision()
    from torchvision.models import resnet18

    model = resnet18(num_classes=10)
    model.maxpool = nn.Identity()
    data = images(40, 32)
    count = count_multiplications(model)
    with torch.no_grad():
        model.eval()(data)
    one_pass = count()
    result = recalibrate(model, data.split([20, 19, 1]))
    assert result.num_passes == 17  # 20 layers, of which 3 shortcuts share a pass
    assert len(result.layers) == 20
    (tried,) = trials.values()
    assert 1.4 < result.forward_passes - tried / 40 < 1.7  # 0.5 is the first look
    really = (count() - one_pass) / one_pass
    assert result.forward_passes - 0.1 < really < result.forward_passes + 0.1
    assert max(one.max_relative_error for one in verify_fixed_point(model, data.split([20, 19, 1]))) < 1e-6
    # in float32 kernels for other batch sizes round differently, and 40 values per channel do not average it
    model.double()
    recalibrate(model, data.double().split([20, 19, 1]))
    assert max(one.max_relative_error for one in verify_fixed_point(model, [data.double()])) < 1e-10


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_with_values_enough_a_fixed_point_is_one_for_any_batch_size(precision: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32),
    )  # fmt: skip
    data = images(500, 16)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        recalibrate(model, data.split(100))
        for size in (1, 7, 500):
            shuffled = data[torch.randperm(500)].split(size)
            assert max(one.max_relative_error for one in verify_fixed_point(model, shuffled)) < 1e-6


def test_sync_batch_norm_with_buffers_in_half_precision_is_measured_on_a_cpu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.SyncBatchNorm(3), nn.SyncBatchNorm(3)).bfloat16()
    data = (3 + 2 * torch.randn(40, 3, 5, 5)).bfloat16()
    before = buffers_digest(model)
    first, second = measure_population(model, data.split(10), method="precise").layers
    torch.testing.assert_close(first.moments.mean, data.double().mean((0, 2, 3)))
    torch.testing.assert_close(second.moments.variance(), torch.ones(3).double(), rtol=0.05, atol=0)
    assert buffers_digest(model) == before
