"""Averages of checkpoints; NumPy in float64, and the data themselves, are the oracle."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from bncli.checkpoints import average_checkpoints, check_rewritable, rewrite
from bncli.checkpoints.average import COMBINATIONS, Averaging, read_tensors
from bncli.errors import CheckpointError


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model(torch.randn(16, 3, 6, 6) * (1 + seed) + seed)
    return model


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"{seed}.pt" for seed in range(3)]
    for seed, path in enumerate(found):
        torch.save(network(seed).state_dict(), path)
    return found


def states(paths: list[Path]) -> list[dict[str, np.ndarray]]:
    return [
        {name: value.double().numpy() for name, value in torch.load(path, weights_only=True).items()}
        for path in paths
    ]


@pytest.mark.parametrize("shares", [[1, 1, 1], [1, 2, 5], [0, 3, 1]])
def test_weights_and_statistics_are_those_of_numpy(paths: list[Path], shares: list[float]) -> None:
    found = average_checkpoints(paths, shares=shares)
    part = np.array(shares) / sum(shares)
    assert found.shares == pytest.approx(part)
    read = states(paths)
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        expected = sum(share * state[name] for share, state in zip(part, read, strict=True))
        assert found.weights[name].dtype == torch.float32
        np.testing.assert_allclose(found.weights[name].numpy(), expected, rtol=1e-7, atol=1e-8)
    assert found.weights["1.num_batches_tracked"] == 1
    assert found.num_averaged == 4
    means, variances = ([state[f"1.running_{what}"] for state in read] for what in ("mean", "var"))
    mean = sum(share * one for share, one in zip(part, means, strict=True))
    square = sum(share * (v + m**2) for share, v, m in zip(part, variances, means, strict=True))
    pooled = found.statistics["pooled"]
    np.testing.assert_allclose(pooled["1.running_mean"].numpy(), mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(pooled["1.running_var"].numpy(), square - mean**2, rtol=1e-6)
    np.testing.assert_allclose(
        found.statistics["average"]["1.running_var"].numpy(), np.average(variances, axis=0, weights=part),
        rtol=1e-6,
    )  # fmt: skip
    assert torch.equal(
        found.statistics["first"]["1.running_var"],
        torch.load(paths[0], weights_only=True)["1.running_var"],
    )


def test_pooled_statistics_are_those_of_all_values_together(tmp_path: Path) -> None:
    values = [torch.randn(1000, 5, dtype=torch.float64) * scale + scale for scale in (1.0, 3.0)]
    for index, one in enumerate(values):
        layer = nn.BatchNorm1d(5, dtype=torch.float64)
        layer.running_mean, layer.running_var = one.mean(0), one.var(0, unbiased=False)
        torch.save(layer.state_dict(), tmp_path / f"{index}.pt")
    pooled = average_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"]).statistics["pooled"]
    together = torch.cat(values)
    torch.testing.assert_close(pooled["running_mean"], together.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(pooled["running_var"], together.var(0, unbiased=False), rtol=1e-12, atol=0)


def test_what_is_equal_in_all_keeps_its_bits(tmp_path: Path) -> None:
    state = network(0).state_dict() | {"mask": torch.tensor([0.1, -torch.inf, 3e38])}
    for name in ("a.pt", "b.pt", "c.pt"):
        torch.save(state, tmp_path / name)
    found = average_checkpoints([tmp_path / name for name in ("a.pt", "b.pt", "c.pt")])
    for name, value in found.with_statistics("pooled").items():
        assert torch.equal(value, state[name]), name


def test_one_after_the_other_is_all_at_once_to_the_bit(paths: list[Path]) -> None:
    shares = [1, 0, 5]
    expected = average_checkpoints(paths, shares=shares)
    begun = Averaging.like(paths[0], None)
    for path, share in zip(paths, shares, strict=True):
        tried = begun.copy()
        tried.add(path, read_tensors(path), 3)  # and given up
        begun.add(path, read_tensors(path), share / 6)
    found = begun.state(shares)
    for how in COMBINATIONS:
        one, two = expected.with_statistics(how), found.with_statistics(how)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    values = [torch.randn(100).bfloat16() for _ in range(3)]
    for index, one in enumerate(values):
        torch.save(network(index).state_dict() | {"extra": one}, tmp_path / f"{index}.pt")
    found = average_checkpoints([tmp_path / f"{index}.pt" for index in range(3)])
    expected = torch.stack([one.double() for one in values]).mean(0).bfloat16()
    assert torch.equal(found.weights["extra"], expected)


def change(path: Path, **values: Tensor | None) -> None:
    state = torch.load(path, weights_only=True)
    for name, value in values.items():
        key = name.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    torch.save(state, path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"_0__bias": torch.zeros(5)}, r"1\.pt: 0\.bias has shape \(5,\), and \(4,\) in .*0\.pt; only"),
        ({"_0__bias": None}, r"1\.pt: 0\.bias is in .*0\.pt only"),
        ({"_extra": torch.zeros(1)}, r"1\.pt: extra is in .*1\.pt only"),
        ({"_0__bias": torch.tensor([0, 1, torch.nan, 0])}, r"1\.pt: 0\.bias holds NaN; leave"),
        ({"_1__running_var": torch.full((4,), torch.nan)}, r"1\.pt: 1\.running_var holds NaN"),
    ],
)
def test_other_networks_and_nan_are_refused(
    paths: list[Path], changed: dict[str, Tensor | None], said: str
) -> None:
    change(paths[1], **{name.removeprefix("_"): value for name, value in changed.items()})
    with pytest.raises(CheckpointError, match=said):
        average_checkpoints(paths)


@pytest.mark.parametrize("shares", [[], [1, 1], [1, -1, 1], [0, 0, 0], [torch.inf, 1, 1]])
def test_impossible_shares(paths: list[Path], shares: list[float]) -> None:
    with pytest.raises(ValueError, match="share"):
        average_checkpoints(paths, shares=shares)


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
def test_any_tensor_is_rewritten(tmp_path: Path, container: str) -> None:
    state = {f"net.{name}": value for name, value in network(0).state_dict().items()}
    if container != "safetensors":  # which has no strides
        state["net.0.weight"] = state["net.0.weight"].to(memory_format=torch.channels_last)
    path, new = tmp_path / f"a.{container}", tmp_path / f"b.{container}"
    if container == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"model": state, "epoch": 7}, path, _use_new_zipfile_serialization=container == "zip")
    wanted = {name: torch.randn(value.shape).to(value.dtype) for name, value in state.items()}
    key = None if container == "safetensors" else "model"
    check_rewritable(path, wanted, key, any_tensor=True)
    rewrite(path, new, wanted, key, any_tensor=True)
    if container == "safetensors":
        read = safetensors.torch.load_file(new)
    else:
        content = torch.load(new, weights_only=True)
        read, epoch = content["model"], content["epoch"]
        assert epoch == 7
        assert read["net.0.weight"].stride() == state["net.0.weight"].stride()
    assert read.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(read[name], value), name


def test_weights_are_refused_where_only_statistics_are_meant(paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no running statistic"):
        rewrite(paths[0], tmp_path / "new.pt", {"0.weight": torch.zeros(4, 3, 3, 3)})
