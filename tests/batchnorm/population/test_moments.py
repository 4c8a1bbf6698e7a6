import ctypes
import math
import platform
import threading
from fractions import Fraction

import pytest
import torch

from bncli.batchnorm.bits import bitwise_equal
from bncli.batchnorm.population.merge_tree import MAX_NODES, BatchTree
from bncli.batchnorm.population.moments import Moments, _of_images, pooled


def hard_values(*shape: int) -> torch.Tensor:
    return 1e3 + 1e-3 * torch.randn(shape)


def exactly(values: torch.Tensor) -> tuple[list[Fraction], list[Fraction]]:
    """Mean and biased variance of every channel in rational numbers."""
    means, variances = [], []
    for channel in values.movedim(1, 0).flatten(1).double().tolist():
        numbers = [Fraction(value) for value in channel]
        mean = sum(numbers) / len(numbers)
        means.append(mean)
        variances.append(sum((number - mean) ** 2 for number in numbers) / len(numbers))
    return means, variances


def relative_error(found: torch.Tensor, expected: list[Fraction]) -> float:
    pairs = zip(found.tolist(), expected, strict=True)
    return max(float(abs(Fraction(value) - right) / abs(right)) for value, right in pairs)


SHAPES = [(40, 3), (40, 3, 7), (12, 3, 5, 6), (6, 3, 2, 5, 6), (1, 3, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_moments_are_those_of_rational_arithmetic(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = (hard_values(*shape) if dtype.itemsize >= 4 else 3 + torch.randn(shape)).to(dtype)
    mean, variance = exactly(values)
    found = Moments.of(values)
    assert found.count == values.numel() // 3
    assert relative_error(found.mean, mean) < 1e-14
    assert relative_error(found.variance(), variance) < 1e-12
    n = found.count
    assert relative_error(found.variance(unbiased=True), [v * n / (n - 1) for v in variance]) < 1e-12


def test_every_memory_layout_gives_the_same_moments_and_the_input_stays() -> None:
    values = hard_values(6, 8, 9, 10)
    kept = values.clone()
    expected = exactly(values)
    strided = torch.empty(6, 8, 9, 20)[..., ::2].copy_(values)
    for one in (values, values.to(memory_format=torch.channels_last), strided, values.double()):
        found = Moments.of(one)
        assert relative_error(found.mean, expected[0]) < 1e-14
        assert relative_error(found.variance(), expected[1]) < 1e-12
        assert torch.equal(one.float(), kept)


@pytest.mark.parametrize(
    "shape", [(3, 40, 60, 60), (100000, 3), (2, 2, 300, 300), (5, 300000), (600, 5, 10, 10)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_inputs_larger_than_a_piece_are_counted_whole(shape: tuple[int, ...], channels_last: bool) -> None:
    values = hard_values(*shape)
    if channels_last and len(shape) == 4:
        values = values.to(memory_format=torch.channels_last)
    found = Moments.of(values)
    rest = values.double().movedim(1, 0).flatten(1) - 1e3  # exact in float64
    assert found.count == rest.shape[1]
    torch.testing.assert_close(found.mean, 1e3 + rest.mean(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.variance(), rest.var(1, unbiased=False), rtol=1e-11, atol=1e-25)


@pytest.mark.parametrize("sizes", [(8, 8, 8), (1, 13, 2, 8), (1,) * 24])
def test_merged_batches_are_the_moments_of_all_values(sizes: tuple[int, ...]) -> None:
    values = hard_values(24, 3, 4, 4)
    mean, variance = exactly(values)
    parts = [Moments.of(batch) for batch in values.split(list(sizes))]
    one_by_one = parts[0]
    for part in parts[1:]:
        one_by_one = one_by_one.merge(part)
    tree = BatchTree()
    for index, part in enumerate(parts):
        tree.add(index, part)
    for found in (one_by_one, pooled(parts), tree.total()):
        assert found.count == 24 * 16
        assert relative_error(found.mean, mean) < 1e-14
        assert relative_error(found.variance(), variance) < 1e-10


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5, 5)])
def test_values_that_are_not_finite_show_in_their_channel_only(bad: float, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    values[1, 2] = bad
    found = Moments.of(values).merge(Moments.of(torch.randn(shape)))
    assert found.variance().isnan().tolist() == [False, False, True]
    assert found.mean.isfinite().tolist() == [True, True, False]


def test_what_has_no_moments_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        Moments.of(torch.randn(4))
    with pytest.raises(ValueError, match="no values"):
        Moments.of(torch.randn(0, 3))
    with pytest.raises(ValueError, match="no moments"):
        pooled([])
    with pytest.raises(ValueError, match="no batch"):
        BatchTree().total()
    assert Moments.of(torch.randn(1, 3)).variance(unbiased=True).isnan().all()


def tree_of(parts: list[Moments], indices: list[int]) -> BatchTree:
    tree = BatchTree()
    for index in indices:
        tree.add(index, parts[index])
    return tree


@pytest.mark.parametrize("num_batches", [1, 2, 7, 64, 129, 300])
def test_any_shards_in_any_order_have_the_bits_of_one_process(num_batches: int) -> None:
    generator = torch.Generator().manual_seed(num_batches)
    sizes = torch.randint(1, 9, (num_batches,), generator=generator).tolist()
    parts = [Moments.of(1e3 + torch.randn(size, 2, 3, generator=generator)) for size in sizes]
    everything = list(range(num_batches))
    whole = tree_of(parts, everything)
    shuffled = torch.randperm(num_batches, generator=generator).tolist()
    splits = [
        [everything[: num_batches // 3], everything[num_batches // 3 :]],
        [everything[rank::2] for rank in range(2)],
        [everything[rank::5] for rank in range(5)],
        [shuffled[: num_batches // 2], shuffled[num_batches // 2 :]],
    ]
    for split in splits:
        merged = BatchTree()
        for shard in reversed(split):
            merged = merged.merge(tree_of(parts, shard))
        assert merged.num_batches == num_batches
        assert merged.total().count == whole.total().count
        for field in ("mean", "m2"):
            assert bitwise_equal(getattr(merged.total(), field), getattr(whole.total(), field))
        torch.testing.assert_close(merged.standard_errors(), whole.standard_errors(), equal_nan=True)


def test_merging_plainly_would_not_have_the_same_bits() -> None:
    parts = [Moments.of(1e3 + torch.randn(5, 50)) for _ in range(9)]
    left = right = None
    for part in parts:
        left = part if left is None else left.merge(part)
    for part in reversed(parts):
        right = part if right is None else right.merge(part)
    assert not bitwise_equal(left.m2, right.m2)


def test_memory_stays_bounded_and_no_batch_counts_twice() -> None:
    tree = BatchTree()
    for index in range(3000):
        tree.add(index, Moments(1, torch.tensor([float(index)]), torch.zeros(1)))
        assert len(tree._nodes) <= MAX_NODES
    assert tree.total().mean.item() == pytest.approx(2999 / 2)
    with pytest.raises(ValueError, match="batch 7 was measured twice"):
        tree.add(7, Moments(1, torch.zeros(1), torch.zeros(1)))
    with pytest.raises(ValueError, match="twice"):
        tree.merge(tree_of([Moments.of(torch.randn(2, 1))] * 5, [4]))


class _HeapUse(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(f"field_{number}", ctypes.c_size_t) for number in range(7)] + [
        ("in_use", ctypes.c_size_t),
        ("free", ctypes.c_size_t),
        ("top", ctypes.c_size_t),
    ]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallinfo2 is glibc's")
def test_what_is_kept_of_a_batch_leaves_no_gaps_in_the_heap() -> None:
    heap_use = ctypes.CDLL(None).mallinfo2
    heap_use.restype = _HeapUse
    tree = BatchTree()
    tree.add(0, Moments.of(torch.randn(2, 1000)))
    before = heap_use().in_use
    for index in range(1, 300):
        tree.add(index, Moments.of(torch.randn(2, 1000)))
    grown = heap_use().in_use - before
    assert grown < 100_000  # beside 16 kB for each of up to 128 nodes


def clustered(generator: torch.Generator, num_batches: int) -> list[torch.Tensor]:
    """Batches of unequal size whose values share a random shift and scale: far from independent."""
    batches = []
    for _ in range(num_batches):
        size = int(torch.randint(5, 15, (1,), generator=generator))
        noise = torch.randn(size, 1, generator=generator) * (0.5 + torch.rand(1, generator=generator))
        batches.append(noise + torch.randn(1, generator=generator))
    return batches


@pytest.mark.parametrize("num_batches", [48, pytest.param(200, marks=pytest.mark.slow)])
def test_standard_errors_are_the_spread_over_repeated_samples(num_batches: int) -> None:
    generator = torch.Generator().manual_seed(1)
    found, errors = [], []
    for _ in range(150):
        tree = BatchTree()
        for index, batch in enumerate(clustered(generator, num_batches)):
            tree.add(index, Moments.of(batch))
        found.append(torch.stack([tree.total().mean, tree.total().variance()]))
        errors.append(torch.stack(tree.standard_errors()))
    spread = torch.stack(found).std(0)
    typical = torch.stack(errors).mean(0)
    torch.testing.assert_close(typical, spread, rtol=0.2, atol=0)


def test_one_batch_has_no_standard_error() -> None:
    assert all(
        error.isnan().all() for error in tree_of([Moments.of(torch.randn(9, 2))], [0]).standard_errors()
    )


@pytest.mark.parametrize("shape", [(5, 4, 6, 6), (3, 4, 4, 4), (7, 4, 2, 2), (9, 4, 1, 1), (2, 4, 90, 90)])
@pytest.mark.parametrize("deviations", [0.0, 1.0, 9.5, 10.5, 1e3, 3e4, 1e6])
def test_no_digits_cancel_on_either_side_of_what_one_pass_can_do(
    shape: tuple[int, ...], deviations: float
) -> None:
    values = 1e-3 * (torch.randn(shape, dtype=torch.float64) + deviations)
    mean, variance = exactly(values)
    found = Moments.of(values)
    assert relative_error(found.variance(), variance) < 1e-11
    errors = [abs(Fraction(one) - right) for one, right in zip(found.mean.tolist(), mean, strict=True)]
    assert max(errors) < 1e-15 * 1e-3 * max(1.0, deviations) * 10


def test_one_channel_that_needs_two_passes_spoils_no_other() -> None:
    values = torch.randn(6, 4, 8, 8, dtype=torch.float64)
    values[:, 1] = 1e3 + 1e-3 * values[:, 1]
    values[:, 2] = 1e3
    kept = [0, 1, 3]
    found = Moments.of(values)
    assert relative_error(found.variance()[kept], exactly(values[:, kept])[1]) < 1e-11
    assert 0 <= float(found.variance()[2]) < 1e-24


def test_squares_beyond_float64_are_no_infinite_variance() -> None:
    # 100 squares of 4e153 are infinite, 100 squared deviations of 1e153 are not
    values = 4e153 + 1e153 * torch.randn(4, 3, 5, 5, dtype=torch.float64).clamp(-1, 1)
    assert relative_error(Moments.of(values).variance(), exactly(values)[1]) < 1e-11


@pytest.mark.parametrize("shape", [(64, 48, 10, 10), (3, 40, 60, 60), (40, 300, 5, 5), (2, 3, 600, 600)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_pass_over_many_pieces_counts_every_value_once(
    shape: tuple[int, ...], channels_last: bool
) -> None:
    values = torch.randn(shape) + torch.arange(shape[1])[:, None, None] / shape[1]
    if channels_last:
        values = values.to(memory_format=torch.channels_last)
    found = Moments.of(values)
    wide = values.double().movedim(1, 0).flatten(1)
    assert found.count == wide.shape[1]
    torch.testing.assert_close(found.mean, wide.mean(1), rtol=0, atol=1e-14)
    torch.testing.assert_close(found.variance(), wide.var(1, unbiased=False), rtol=1e-12, atol=0)


@pytest.mark.parametrize("piece_size", [1, 500, 1 << 24])
@pytest.mark.parametrize("shape", [(12, 3), (12, 3, 5, 6), (1, 3, 8, 8)])
def test_what_a_gpu_computes_is_right_to_the_same_digits(
    shape: tuple[int, ...], piece_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the same operations on the CPU: there may be no GPU here
    monkeypatch.setattr("bncli.batchnorm.population.moments._PIECE_GPU", piece_size)
    values = hard_values(*shape)
    mean, variance = exactly(values)
    found = _of_images(values.reshape(*shape[:2], -1))
    assert found.count == values.numel() // 3
    assert relative_error(found.mean, mean) < 1e-14
    assert relative_error(found.variance(), variance) < 1e-10


@pytest.mark.parametrize("side", [2, 9])
def test_measuring_in_inference_mode_spoils_no_later_measurement(side: int) -> None:
    values = hard_values(6, 3, side, side)
    found = []

    def measure() -> None:  # a thread has a scratch of its own, so the first use is inside inference mode
        with torch.inference_mode():
            found.append(Moments.of(values))
        found.append(Moments.of(values))

    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    inside, outside = found
    assert bitwise_equal(inside.m2.clone(), outside.m2)
