"""Which images each rank has: every one once, whoever deals them."""

from collections import Counter
from itertools import chain

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from bncli.distributed.ranks import Ranks
from bncli.distributed.shards import DealtBatches, divided, labelled_once, without_repeats
from bncli.errors import DataError


def loaders(num_images: int, num_ranks: int, batch_size: int, **options: bool) -> list[DataLoader[object]]:
    """One per rank; image number n is the number n, and so is its label."""
    numbers = torch.arange(num_images)
    data = TensorDataset(numbers[:, None].float(), numbers)
    drop_last = options.pop("loader_drops", False)
    return [
        DataLoader(
            data,
            batch_size,
            sampler=DistributedSampler(data, num_ranks, rank, **options),
            drop_last=drop_last,
        )
        for rank in range(num_ranks)
    ]


@pytest.mark.parametrize(("num_images", "num_ranks"), [(10, 3), (7, 4), (8, 4), (3, 5), (1, 4), (12, 5)])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_images_that_a_sampler_repeats_count_once(
    num_images: int, num_ranks: int, shuffle: bool, batch_size: int
) -> None:
    found: list[int] = []
    labels: list[int] = []
    for loader in loaders(num_images, num_ranks, batch_size, shuffle=shuffle):
        batches = without_repeats(loader)
        assert callable(batches) or batches is loader
        for batch in batches() if callable(batches) else batches:
            inputs = batch if isinstance(batch, Tensor) else batch[0]
            found += inputs[:, 0].long().tolist()
        labels += chain.from_iterable(part.tolist() for _, part in labelled_once(loader))
    assert Counter(found) == Counter(range(num_images))
    assert Counter(labels) == Counter(range(num_images))


def test_images_that_are_dropped_stay_dropped() -> None:
    found: Counter[int] = Counter()
    for loader in loaders(11, 3, 2, shuffle=False, drop_last=True):
        found.update(chain.from_iterable(part.tolist() for _, part in labelled_once(loader)))
    assert found == Counter(range(9))
    found.clear()
    for loader in loaders(10, 3, 3, shuffle=False, loader_drops=True):  # a fourth one would be a repeat
        found.update(chain.from_iterable(part.tolist() for _, part in labelled_once(loader)))
    assert found == Counter(range(9))


def test_a_sampler_inside_a_batch_sampler_is_found_and_get_input_is_used() -> None:
    data = TensorDataset(torch.arange(5)[:, None].float())
    found = []
    for rank in range(2):
        sampler = BatchSampler(DistributedSampler(data, 2, rank, shuffle=False), 2, drop_last=False)
        loader = DataLoader(data, batch_sampler=sampler)
        batches = without_repeats(loader, lambda batch: batch[0] * 10)
        assert callable(batches)
        found += [value for inputs in batches() for value in inputs[:, 0].tolist()]
    assert found == [0, 20, 40, 10, 30]


def test_images_in_any_order_are_refused_only_where_some_are_repeated() -> None:
    data = TensorDataset(torch.arange(5)[:, None].float())

    def loader(rank: int, num_images: int) -> DataLoader[object]:
        part = TensorDataset(data.tensors[0][:num_images])
        return DataLoader(part, sampler=DistributedSampler(part, 2, rank), num_workers=1, in_order=False)

    with pytest.raises(DataError, match="in_order=False gives images in any order"):
        without_repeats(loader(1, 5))
    without_repeats(loader(0, 5))
    without_repeats(loader(1, 4))


def test_other_batches_are_taken_as_they_are() -> None:
    images = torch.randn(4, 3)
    assert without_repeats(images) is images
    loader = DataLoader(TensorDataset(images), batch_size=2)
    assert without_repeats(loader) is loader


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_dealt_batches_are_those_of_one_process(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = TensorDataset(torch.arange(23))
    expected = [batch.tolist() for (batch,) in DataLoader(data, batch_size=4)]
    parts = []
    for rank in range(num_ranks):
        monkeypatch.setattr(Ranks, "of", lambda _, rank=rank: Ranks(None, rank, num_ranks))
        sampler = DealtBatches(data, 4)
        loader = DataLoader(data, batch_sampler=sampler)
        parts.append([batch.tolist() for (batch,) in loader])
        assert len(loader) == len(parts[-1])
    assert [parts[number % num_ranks][number // num_ranks] for number in range(6)] == expected


def first_column(rows: list[tuple[Tensor, ...]]) -> Tensor:
    return torch.stack([row[0] for row in rows])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("as_function", [False, True])
def test_a_loader_that_has_all_images_is_divided(shuffle: bool, as_function: bool) -> None:
    data = TensorDataset(torch.arange(11)[:, None].float())
    loader = DataLoader(data, batch_size=2, shuffle=shuffle, collate_fn=first_column)
    found: list[int] = []
    for rank in range(3):
        part = divided((lambda: loader) if as_function else loader, Ranks(None, rank, 3))
        batches = without_repeats(part)
        assert callable(batches) or batches is part
        own = [inputs[:, 0].long().tolist() for inputs in (batches() if callable(batches) else batches)]
        assert max(map(len, own)) == 2
        found += chain.from_iterable(own)
    assert sorted(found) == list(range(11))
    assert (found[:4] == [0, 3, 6, 9]) is not shuffle


def test_what_is_divided_already_is_left_as_it_is() -> None:
    data = TensorDataset(torch.arange(4)[:, None])
    ranks = Ranks(None, 1, 2)
    for loader in (
        DataLoader(data, sampler=DistributedSampler(data, 2, 1)),
        DataLoader(data, batch_sampler=DealtBatches(data, 2)),
        [torch.zeros(2, 1)],
    ):
        assert divided(loader, ranks) is loader
