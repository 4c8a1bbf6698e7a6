import copy
import hashlib
import math

import pytest
import torch
from torch import Tensor, nn

from bncli.batchnorm.modes import buffers_digest
from bncli.determinism.certificate import Certificate, certify
from bncli.errors import DataError
from bncli.sample import random_order

SIZES = (2, 7, 16)


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 8, 8)


def conv_net(**arguments: object) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, **arguments),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    for _ in range(3):
        net(torch.randn(16, 3, 8, 8))
    return net


class Flat(nn.Module):
    """Logits that are sums of each image's own pixels: exact whatever the batch; subclasses spoil it."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(2)[:, :, 0].clone()  # (N, 3)


class AddsBatchMean(Flat):
    def forward(self, inputs: Tensor) -> Tensor:
        logits = super().forward(inputs)
        return logits - 3 * logits.mean(0)


class AddsRowIndex(Flat):
    def forward(self, inputs: Tensor) -> Tensor:
        logits = super().forward(inputs)
        logits[:, 0] += 100.0 * torch.arange(len(inputs))
        return logits


class FailsInShuffledOrder(Flat):
    """Wrong only where an image comes first that is not the first: in the given order nothing shows."""

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self.first = first

    def forward(self, inputs: Tensor) -> Tensor:
        logits = super().forward(inputs)
        return logits if len(inputs) < 16 or torch.equal(inputs[0], self.first) else -logits


class Noise(Flat):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + torch.randn(3)


def restored(net: nn.Module, batch: Tensor, **arguments: object) -> Certificate:
    """Run the check, and check that it left the model and the random numbers as they were."""
    digest, modes = buffers_digest(net), [module.training for module in net.modules()]
    random_state = torch.get_rng_state()
    result = certify(net, batch, batch_sizes=SIZES, **arguments)
    assert buffers_digest(net) == digest
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    return result


def test_a_conv_bn_relu_net_passes_up_to_rounding() -> None:
    result = restored(conv_net(), images())
    assert result.deterministic
    assert result.repeat_bitwise_equal
    assert result.running_stats_unchanged
    assert result.num_images == 16
    for check, size in zip(result.batch_sizes, SIZES, strict=True):
        assert check.batch_size == size
        assert check.prediction_flips == 0
        assert check.max_abs_diff < 1e-5
        assert check.bitwise_equal == (check.max_abs_diff == 0)


def test_in_train_mode_the_same_net_depends_on_the_batch() -> None:
    net, batch = conv_net(), images()
    result = restored(net, batch)
    assert (result.train_mode.batch_size, result.train_mode.reference_batch_size) == (16, 1)
    # the oracle: float64 and PyTorch's own train mode
    oracle = conv_net().double()
    oracle.load_state_dict(net.state_dict())
    with torch.no_grad():
        together = oracle(batch.double())
        alone = torch.cat([oracle(image[None].double()) for image in batch])
    expected = float((together - alone).abs().max())
    assert result.train_mode.max_abs_diff == pytest.approx(expected, rel=1e-4)
    flips = int((together.argmax(1) != alone.argmax(1)).sum())
    assert result.train_mode.prediction_flips == flips


def test_the_contrast_is_between_the_images_alone_and_the_batches_that_they_make() -> None:
    seen = []

    class Records(Flat):
        def forward(self, inputs: Tensor) -> Tensor:
            if self.training:
                seen.append(inputs)
            return super().forward(inputs)

    batch = images(5)
    certify(Records(), batch, batch_sizes=(2, 5))
    assert [len(inputs) for inputs in seen] == [1, 1, 1, 1, 1, 5, 2, 2, 2]
    assert torch.equal(torch.cat(seen[:5]), batch)
    # drawn at random, as images may come sorted by class
    assert torch.equal(seen[5], batch[random_order(5)])
    assert torch.equal(torch.cat(seen[6:])[:5], seen[5])


def test_train_mode_is_compared_in_batches_of_every_size() -> None:
    net, batch = conv_net(), images() + torch.linspace(-4, 4, 16)[:, None, None, None]
    found = restored(net, batch).train_mode
    # the oracle: PyTorch's own train mode on a copy, in random batches of 16, 7 and 2
    copied, order = copy.deepcopy(net).train(), random_order(16)
    with torch.no_grad():
        alone = torch.cat([copied(image[None]) for image in batch])[order]
        changed, apart = torch.zeros(16, dtype=torch.bool), 0.0
        for size in SIZES:
            filled = torch.cat([batch[order], batch[order]])[: -(-16 // size) * size]
            together = torch.cat([copied(part) for part in filled.split(size)])
            rows = torch.arange(len(filled)) % 16  # some images are in two batches of 7
            changed[rows[together.argmax(1) != alone[rows].argmax(1)]] = True
            apart = max(apart, float((together - alone[rows]).abs().max()))
    assert found.any_batch_size.max_abs_diff == pytest.approx(apart, rel=1e-5)
    assert found.any_batch_size.prediction_flips == int(changed.sum()) > 0


def test_the_verdict_says_what_a_prediction_depends_on_and_what_to_do() -> None:
    verdict = restored(conv_net(), images()).verdict
    assert verdict.startswith("In eval mode a prediction does not depend on its batch")
    exact = "In eval mode a prediction does not depend on its batch, and neither does any bit of its logits."
    assert restored(Flat(), images()).verdict == exact
    untracked = restored(conv_net(track_running_stats=False), images())
    assert (untracked.num_batch_norm_layers, untracked.layers_without_running_stats) == (1, ("1",))
    assert "depends on the batch is 1. It has no running statistics" in untracked.verdict
    assert "depends on the batch is (model). Look for code" in restored(AddsBatchMean(), images()).verdict
    assert "look for random numbers" in restored(Noise(), images()).verdict


def test_the_layer_named_is_one_that_changes_predictions() -> None:
    class LooksAtBatchSize(Flat):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) * (-1 if len(inputs) > 1 else 1)

    class LooksAtPlace(nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return logits * (1 + 1e-6 * torch.arange(len(logits)))[:, None]

    found = restored(nn.Sequential(LooksAtBatchSize(), LooksAtPlace()), images())
    assert found.claims.position.first_differing_layer == "1"
    assert found.claims.position.prediction_flips == 0
    assert "The first layer whose output depends on the batch is 0. Look for code" in found.verdict


def test_a_tie_that_rounding_decides_is_called_so() -> None:
    """One image whose two largest logits are equal alone, and not in a batch."""

    class Tie(Flat):
        def forward(self, inputs: Tensor) -> Tensor:
            logits = super().forward(inputs)
            if len(inputs) > 1:
                logits[:, 1] *= 1 + 1e-6
            return logits

    batch = images()
    batch[5, :, 0, 0] = torch.tensor([7.0, 7.0, 0.0])
    found = restored(Tie(), batch)
    assert (found.eval_mode.prediction_flips, found.deterministic, found.within_rounding) == (1, False, True)
    assert found.verdict.startswith("In eval mode 1 of 16 predictions changes with the batch.")
    assert "The difference is rounding" in found.verdict


@pytest.mark.parametrize(
    ("factor", "dtype", "within"),
    [(1 + 1e-6, torch.float32, True), (1.0001, torch.float32, False), (1.01, torch.bfloat16, True)],
)
def test_a_difference_is_rounding_up_to_what_the_number_format_accounts_for(
    factor: float, dtype: torch.dtype, *, within: bool
) -> None:
    class Scales(Flat):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros((), dtype=dtype))

        def forward(self, inputs: Tensor) -> Tensor:
            logits = super().forward(inputs)
            return logits * (factor if len(inputs) > 1 else 1)

    found = restored(Scales(), images().to(dtype))
    assert (found.deterministic, found.bitwise_equal, found.within_rounding) == (True, False, within)
    assert ("more than rounding" in found.verdict) == (not within)


def test_progress_counts_every_image_that_is_computed_up_to_all_of_them() -> None:
    counted, told = [], []

    class Counts(Flat):
        def forward(self, inputs: Tensor) -> Tensor:
            counted.append(len(inputs))
            return super().forward(inputs)

    certify(Counts(), images(9), batch_sizes=(1, 2, 4, 64), progress=lambda done, of: told.append((done, of)))
    assert [of for _, of in told] == [sum(counted)] * len(told)
    assert [done for done, _ in told] == torch.tensor(counted).cumsum(0).tolist()


def test_exact_arithmetic_is_bitwise_equal_in_every_order() -> None:
    result = restored(Flat(), images())
    assert all(check.bitwise_equal and check.shuffled_bitwise_equal for check in result.batch_sizes)
    assert all(check.max_abs_diff == 0 for check in result.batch_sizes)
    assert result.train_mode.max_abs_diff == 0


@pytest.mark.parametrize("net", [AddsBatchMean(), AddsRowIndex()])
def test_a_model_that_looks_at_its_batch_fails(net: nn.Module) -> None:
    result = restored(net, images())
    assert not result.deterministic
    assert result.repeat_bitwise_equal  # one by one it is steady
    for check in result.batch_sizes:
        assert not check.bitwise_equal
        assert not check.shuffled_bitwise_equal
        assert check.prediction_flips > 0


def test_differences_and_flips_are_counted_exactly() -> None:
    batch = images()
    result = restored(AddsRowIndex(), batch)
    assert [check.max_abs_diff for check in result.batch_sizes] == pytest.approx([100, 600, 1500])
    # in batches of 16, every image is once in another row than 0, and there it is forced to class 0
    num_not_class_0 = int((Flat()(batch).argmax(1) != 0).sum())
    assert result.batch_sizes[-1].prediction_flips == num_not_class_0


def test_batch_norm_without_running_statistics_depends_on_the_batch() -> None:
    result = restored(conv_net(track_running_stats=False), images())
    assert not any(check.bitwise_equal for check in result.batch_sizes)
    assert result.batch_sizes[-1].max_abs_diff > 1e-3
    assert result.running_stats_unchanged


def test_the_shuffled_order_is_looked_at() -> None:
    batch = images()
    result = restored(FailsInShuffledOrder(batch[0]), batch)
    assert [check.bitwise_equal for check in result.batch_sizes] == [True, True, False]
    assert [check.shuffled_bitwise_equal for check in result.batch_sizes] == [True, True, False]
    assert result.batch_sizes[-1].prediction_flips > 0


def test_the_given_order_is_looked_at() -> None:
    class FailsInGivenOrder(FailsInShuffledOrder):
        def forward(self, inputs: Tensor) -> Tensor:
            logits = Flat.forward(self, inputs)
            given = len(inputs) == 16 and torch.equal(inputs[0], self.first)
            return -logits if given else logits

    batch = images()
    check = restored(FailsInGivenOrder(batch[0]), batch).batch_sizes[-1]
    assert (check.bitwise_equal, check.shuffled_bitwise_equal) == (False, True)
    assert check.prediction_flips > 0


def test_a_model_with_random_numbers_in_eval_mode_does_not_repeat() -> None:
    assert not restored(Noise(), images()).repeat_bitwise_equal


def test_dropout_shows_in_train_mode_only_and_the_same_seed_gives_the_same_report() -> None:
    net = nn.Sequential(conv_net(), nn.Dropout(0.5))
    batch = images()
    first = restored(net, batch, seed=3)
    assert first.deterministic
    torch.randn(7)  # what ran before does not matter
    assert restored(net, batch, seed=3) == first
    assert restored(net, batch, seed=4).train_mode != first.train_mode


def test_equal_nans_are_equal_bits() -> None:
    class AllNan(Flat):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.full((len(inputs), 3), math.nan)

    result = restored(AllNan(), images())
    assert result.deterministic
    for check in result.batch_sizes:
        assert check.bitwise_equal
        assert (check.max_abs_diff, check.prediction_flips) == (0.0, 0)


def test_a_nan_that_depends_on_the_batch_differs_by_infinity() -> None:
    class NanInBatches(Flat):
        def forward(self, inputs: Tensor) -> Tensor:
            logits = torch.eye(3)[torch.zeros(len(inputs), dtype=torch.long)]  # class 0, as for NaN
            logits[1:, 0] = math.nan
            return logits

    result = restored(NanInBatches(), images())
    assert not result.deterministic
    for check in result.batch_sizes:
        assert check.max_abs_diff == math.inf
        assert check.prediction_flips > 0
        assert not check.bitwise_equal


def test_other_nan_bits_are_other_bits_but_no_other_prediction() -> None:
    class NanPayload(Flat):
        def forward(self, inputs: Tensor) -> Tensor:
            bits = torch.full((len(inputs), 3), 0x7FC00000, dtype=torch.int32)
            bits[1:] += 1
            return bits.view(torch.float32)

    result = restored(NanPayload(), images())
    assert result.deterministic
    for check in result.batch_sizes:
        assert not check.bitwise_equal
        assert check.max_abs_diff == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_work(dtype: torch.dtype) -> None:
    result = restored(conv_net().to(dtype), images().to(dtype))
    assert result.repeat_bitwise_equal
    assert all(check.max_abs_diff < 0.05 for check in result.batch_sizes)
    assert result.train_mode.max_abs_diff > 0


def test_sizes_beyond_the_images_mean_all_of_them() -> None:
    seen = []

    class Records(Flat):
        def forward(self, inputs: Tensor) -> Tensor:
            seen.append(len(inputs))
            return super().forward(inputs)

    result = certify(Records(), images(5), batch_sizes=(64, 3, 1, 256, 3))
    assert [check.batch_size for check in result.batch_sizes] == [1, 3, 5]
    assert set(seen) == {1, 3, 5}  # the second batch of 3 is filled from the start again
    assert result.train_mode.batch_size == 5


@pytest.mark.parametrize("count", [6, 7])
def test_where_train_mode_refuses_one_image_it_is_given_two(count: int) -> None:
    # a single value per channel; with 7 images, no batch may end up with one image either
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5))
    net(torch.randn(16, 3, 8, 8))
    result = certify(net, images(count), batch_sizes=(2, 3))
    assert (result.train_mode.reference_batch_size, result.train_mode.batch_size) == (2, 3)
    assert result.train_mode.max_abs_diff > 0.1
    assert result.deterministic


def test_a_single_image_gets_a_blank_companion_that_is_not_judged() -> None:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192))
    net(torch.randn(16, 3, 8, 8))
    result = certify(net, images(1))
    assert result.num_images == 1
    assert result.bitwise_equal
    assert result.train_mode.reference_batch_size == 2

    with torch.no_grad():
        logits = net.eval()(images(1) * 0 + 3)
    digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
    assert certify(net, images(1) * 0 + 3).logits_sha256 == digest

    class FlipsBlanks(Flat):
        def forward(self, inputs: Tensor) -> Tensor:
            logits = super().forward(inputs)
            logits[(inputs == 0).flatten(1).all(1)] = len(inputs) * torch.tensor([-1.0, 0.0, 1.0])
            return logits

    assert certify(FlipsBlanks(), images(1)).bitwise_equal
    assert not certify(AddsBatchMean(), images(1)).claims.neighbours.bitwise_equal


def test_a_model_that_changes_a_buffer_in_eval_mode_is_caught_and_put_right() -> None:
    class Counter(Flat):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, inputs: Tensor) -> Tensor:
            self.count += 1
            return super().forward(inputs)

    assert not restored(Counter(), images()).running_stats_unchanged


@pytest.mark.parametrize("calls", [5, 45])  # in eval mode; in train mode
def test_everything_is_restored_when_the_model_raises(calls: int) -> None:
    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.left = conv_net(), calls

        def forward(self, inputs: Tensor) -> Tensor:
            logits = self.net(inputs)
            torch.randn(1)
            self.left -= 1
            if self.left == 0:
                raise RuntimeError("in eval mode" if not self.training else "in train mode")
            return logits

    net, batch = Raises(), images()
    net.net[1].eval()
    digest, modes = buffers_digest(net), [module.training for module in net.modules()]
    random_state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="in eval mode" if calls == 5 else "in train mode"):
        certify(net, batch, batch_sizes=(8,))
    assert buffers_digest(net) == digest
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


def test_another_value_error_of_the_model_is_not_swallowed() -> None:
    class Refuses(Flat):
        def forward(self, inputs: Tensor) -> Tensor:
            if self.training and len(inputs) == 1:
                raise ValueError("not today")
            return super().forward(inputs)

    with pytest.raises(ValueError, match="not today"):
        certify(Refuses(), images())


def test_channels_last_images_stay_channels_last_in_every_order() -> None:
    class Formats(Flat):
        def forward(self, inputs: Tensor) -> Tensor:
            assert inputs.is_contiguous(memory_format=torch.channels_last)
            return super().forward(inputs)

    certify(Formats(), images().contiguous(memory_format=torch.channels_last))


def test_no_images_and_no_batch_sizes_are_errors() -> None:
    with pytest.raises(DataError, match="no images"):
        certify(Flat(), images(0))
    for sizes in ((), (0, 2), (-1,)):
        with pytest.raises(ValueError, match="must be 1 or more"):
            certify(Flat(), images(), batch_sizes=sizes)
    with pytest.raises(ValueError, match="not all be 1"):
        certify(Flat(), images(), batch_sizes=(1, 1))


def test_images_may_come_in_batches_of_which_256_are_taken() -> None:
    net, batch = conv_net(), images(5)
    assert certify(net, [batch[:2], (batch[2:], None)]) == certify(net, batch)
    assert certify(net, [{"clip": batch}], get_input=lambda one: one["clip"]) == certify(net, batch)
    many = (torch.zeros(100, *batch.shape[1:]) for _ in range(10))
    assert certify(net, many, batch_sizes=(2,)).num_images == 256
    assert certify(net, batch, num_images=3) == certify(net, batch[:3])


def test_the_digest_is_that_of_the_logits_of_every_image_alone() -> None:
    net, batch = conv_net().eval(), images(5)
    with torch.no_grad():
        alone = torch.cat([net(image[None]) for image in batch])
    digest = hashlib.sha256(alone.numpy().tobytes()).hexdigest()
    assert restored(net, batch).logits_sha256 == digest
    assert restored(net, batch.flip(0)).logits_sha256 != digest
