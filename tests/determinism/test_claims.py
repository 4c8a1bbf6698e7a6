"""Each claim fails on a model built to fail it, no other claim does, and the right layer is named."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from bncli.batchnorm.modes import buffers_digest
from bncli.determinism import Certificate, FixedShape, certify

SIZES = (2, 3, 7, 16)
CLAIMS = ("repeat", "neighbours", "position", "batch_size")


def images(count: int = 20) -> Tensor:
    """Whole numbers, whose sums are exact in any order: what then differs was meant to."""
    return torch.randint(-8, 9, (count, 4, 2, 2)).float()


class FirstPixel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0, 0].clone()  # (N, 4)


class BatchMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 3 * x.mean(0)


class RowIndex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(len(x))[:, None] * torch.eye(4)[0]


class NumRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + (len(x) > 1) * torch.eye(4)[1]


class Counter(nn.Module):
    """Something else with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


def net(spoiler: nn.Module) -> nn.Sequential:
    layers = {"first": FirstPixel(), "steady": nn.ReLU(), "spoiler": spoiler, "last": nn.Identity()}
    return nn.Sequential(OrderedDict(layers))


def failing(certificate: Certificate) -> dict[str, str | None]:
    claims = {name: getattr(certificate.claims, name) for name in CLAIMS}
    return {name: claim.first_differing_layer for name, claim in claims.items() if not claim.bitwise_equal}


def test_an_exact_model_passes_all_claims() -> None:
    found = certify(net(nn.Identity()), images(), batch_sizes=SIZES)
    assert failing(found) == {}
    assert found.bitwise_equal
    assert found.deterministic
    for claim in found.claims:
        measures = (claim.max_abs_diff, claim.max_rel_diff, claim.max_ulp, claim.prediction_flips)
        assert measures == (0, 0, 0, 0)
        assert claim.first_differing_layer is None


@pytest.mark.parametrize(
    ("spoiler", "claims"),
    [
        (BatchMean(), {"neighbours", "batch_size"}),
        (RowIndex(), {"position", "batch_size"}),
        (NumRows(), {"batch_size"}),
        (Counter(), set(CLAIMS)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_model_built_to_fail_a_claim_fails_that_one_in_that_layer(
    spoiler: nn.Module, claims: set[str]
) -> None:
    found = certify(net(spoiler), images(), batch_sizes=SIZES)
    assert failing(found) == dict.fromkeys(claims, "spoiler")
    assert not found.bitwise_equal
    assert found.repeat_bitwise_equal == ("repeat" not in claims)


def test_the_measures_of_a_claim_are_those_of_the_worst_pair() -> None:
    batch = torch.zeros(20, 4, 2, 2)
    batch[:, 1] = 0.5  # class 1 by half a point
    found = certify(net(NumRows()), batch, batch_sizes=(2,)).claims.batch_size
    # 0.5 against 1.5 in every image: by 1, two thirds of the larger, and 2**23 + 2**22 numbers
    assert found.max_abs_diff == 1
    assert found.max_rel_diff == pytest.approx(2 / 3)
    assert found.max_ulp == 2**23 + 2**22
    assert found.prediction_flips == 0
    batch[:, 0] = 1  # now class 0 wins alone, and class 1 in company
    assert certify(net(NumRows()), batch, batch_sizes=(2,)).claims.batch_size.prediction_flips == 20


def test_what_does_not_repeat_in_company_only_fails_repeat_too() -> None:
    class Moody(Counter):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if len(x) == 7 else x

    found = certify(net(Moody()), images(), batch_sizes=SIZES)
    assert failing(found) == dict.fromkeys(CLAIMS, "spoiler")


def test_a_layer_that_changes_its_input_in_place_is_named_and_not_the_one_before() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sub_(3 * x.mean(0))

    found = certify(net(InPlace()), images(), batch_sizes=SIZES)
    assert failing(found) == {"neighbours": "spoiler", "batch_size": "spoiler"}


def test_batch_norm_that_stays_in_train_mode_fails_and_is_named() -> None:
    class Stubborn(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(True)

    stubborn = nn.Sequential(nn.Conv2d(4, 4, 1), Stubborn(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    before = buffers_digest(stubborn)
    found = certify(stubborn, images(), batch_sizes=SIZES)
    assert failing(found).items() >= {"neighbours": "1", "batch_size": "1"}.items()
    assert found.repeat_bitwise_equal
    assert not found.running_stats_unchanged
    assert buffers_digest(stubborn) == before


def test_batch_norm_without_running_statistics_fails_and_is_named() -> None:
    layers = [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()]
    found = certify(nn.Sequential(*layers, nn.Linear(16, 3)), images(), batch_sizes=SIZES)
    assert failing(found).items() >= {"neighbours": "1", "batch_size": "1"}.items()
    assert found.running_stats_unchanged


class Block(nn.Module):
    """Looks at the batch in its own code, between two layers that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) - x.mean(0)).clone()


class AtTheEnd(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).clone()) - x.mean(0)


@pytest.mark.parametrize("block", [Block(), AtTheEnd()])
def test_a_difference_made_in_a_modules_own_code_is_put_down_to_that_module(block: nn.Module) -> None:
    found = certify(net(block), images(), batch_sizes=SIZES)
    assert failing(found) == {"neighbours": "spoiler", "batch_size": "spoiler"}


def test_a_difference_made_in_the_root_modules_own_code_is_put_down_to_the_model() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = FirstPixel()

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) - x.mean((0, 2, 3))

    assert set(failing(certify(Root(), images(), batch_sizes=SIZES)).values()) == {"(model)"}


def test_a_layer_used_twice_is_named_by_its_first_name() -> None:
    shared = BatchMean()
    layers = {"first": FirstPixel(), "one": shared, "two": shared}
    found = certify(nn.Sequential(OrderedDict(layers)), images(), batch_sizes=SIZES)
    assert set(failing(found).values()) == {"one"}


def test_tensors_that_are_no_part_of_an_image_do_not_mislead() -> None:
    class Table(nn.Module):
        """Gives (positions, batch): a row of it is not one of the images."""

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
            total = x.sum()
            return torch.arange(5.0), {"x": x}, [total, total * torch.ones(3, 1), len(x) * torch.ones(3)]

    class Take(nn.Module):
        def forward(self, x: tuple) -> Tensor:
            return x[1]["x"]

    layers = {"first": FirstPixel(), "table": Table(), "take": Take(), "spoiler": BatchMean()}
    found = certify(nn.Sequential(OrderedDict(layers)), images(), batch_sizes=(2, 7))
    assert set(failing(found).values()) == {"spoiler"}


def test_windows_of_an_image_are_compared_as_its_part() -> None:
    class Windows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(len(x) * 2, 2)

    class Join(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(len(x) // 2, 4)

    class Spoils(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 100 * torch.arange(len(x))[:, None].div(4, rounding_mode="floor")

    layers = {"first": FirstPixel(), "windows": Windows(), "spoils": Spoils(), "join": Join()}
    found = certify(nn.Sequential(OrderedDict(layers)), images(), batch_sizes=SIZES)
    assert failing(found) == {"position": "spoils", "batch_size": "spoils"}


@pytest.mark.parametrize(
    ("spoiler", "claims"),
    [
        (NumRows(), set()),
        (RowIndex(), {"position", "batch_size"}),
        (BatchMean(), {"neighbours", "position", "batch_size"}),  # another place may be in another chunk
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_fixed_shape_mends_what_comes_from_the_number_of_rows_and_nothing_else(
    spoiler: nn.Module, claims: set[str]
) -> None:
    found = certify(FixedShape(net(spoiler), rows=4), images(), batch_sizes=SIZES)
    assert failing(found) == dict.fromkeys(claims, "spoiler")


class Interrupts(nn.Module):
    """Raises in the given phase, after drawing a random number and depending on its batch."""

    def __init__(self, phase: str, error: type[BaseException]) -> None:
        super().__init__()
        self.phase, self.error, self.calls = phase, error, 0
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        torch.rand(1)
        phase = "train mode" if self.training else "hooked" if self._forward_hooks else "eval mode"
        if self.phase == phase and (phase == "hooked" or self.calls % 30 == 0):
            raise self.error
        return self.norm(x)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("phase", ["eval mode", "hooked", "train mode"])
@pytest.mark.parametrize("fixed", [False, True])
def test_the_model_is_as_before_also_when_certifying_is_interrupted(
    error: type[BaseException], phase: str, fixed: bool
) -> None:
    batch = images()
    head = [nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(16, 3)]
    model = nn.Sequential(nn.BatchNorm2d(4), Interrupts(phase, error), *head)
    model[0].eval()
    wrapped = FixedShape(model, rows=4) if fixed else model
    modes, digest = [module.training for module in wrapped.modules()], buffers_digest(model)
    buffers, random_state = dict(model.named_buffers()), torch.get_rng_state()
    with pytest.raises(error):
        certify(wrapped, batch, batch_sizes=SIZES)
    assert [module.training for module in wrapped.modules()] == modes
    assert buffers_digest(model) == digest
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    for module in wrapped.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_hooks_of_the_users_own_stay() -> None:
    model, calls = net(BatchMean()), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    certify(model, images(), batch_sizes=(2,))
    assert calls
    assert [len(module._forward_hooks) for module in model.modules()] == [0, 1, 0, 0, 0]
