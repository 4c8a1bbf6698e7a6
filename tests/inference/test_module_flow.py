"""Networks whose code decides whether a layer may be folded. The oracle is the network itself, in float64."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bncli.inference import Folding, fold_batch_norm
from bncli.inference.module_flow import calls_parts_whole


class Pair(nn.Module):
    """A convolution and BatchNorm; what their classes' `forward` does with them is the matter here."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.2, 3)
        nn.init.uniform_(self.norm.weight, 0.3, 2)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def fold_and_compare(model: nn.Module) -> Folding:
    model = model.double().eval()
    folding = fold_batch_norm(model)
    for sign in (-1, 1):  # for code that asks
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64) + 3 * sign
        with torch.no_grad():
            torch.testing.assert_close(folding.model(x.clone()), model(x.clone()), rtol=1e-10, atol=1e-10)
    return folding


class Recurrent(Pair):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = super().forward(x)
        return x


class AsksLater(Pair):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x.relu() if x.mean() > 0 else x.flip(0)


class AsksFirst(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x if x.mean() > 0 else x.flip(0)))


class AsksTheKindOfASize(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if isinstance(x.shape[0] + 1, Tensor) else super().forward(x)


class Checks(Pair):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError(f"3 channels, not {x.shape[1]}")
        h = self.conv(x)
        return self.norm(h).reshape(h.shape[0], -1)


class WithOptions(Pair):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, early: bool = False) -> Tensor:
        h = self.conv(input=x)
        if mask is not None:
            h = h * mask
        return h if early else self.norm(input=h)


class InAList(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.conv, self.norm]  # the layers themselves, not registered here

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class OnItsDevice(Pair):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


@pytest.mark.parametrize(
    "kind",
    [
        Pair,
        Recurrent,
        AsksLater,
        AsksFirst,
        AsksTheKindOfASize,
        Checks,
        WithOptions,
        InAList,
        OnItsDevice,
    ],
)
def test_where_every_output_of_the_convolution_goes_into_the_norm_it_is_folded(kind: type[Pair]) -> None:
    assert len(fold_and_compare(kind()).folded) == 1


class Shared(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(super().forward(x))


class OneWayWithout(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() > 0 else self.conv(x)


class Skip(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.norm(h) + h


class InPlace(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        h[0].mul_(2)
        return self.norm(h)


class OneWayInPlace(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        if h.mean() > 0:
            h.mul_(2)
        return self.norm(h)


class NormTwice(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.norm(self.other(x))


class UsesWeight(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.conv2d(x, self.conv.weight, padding=1)


class UsesWeightQuietly(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.conv2d(x, self.conv._parameters["weight"], padding=1)


class UsesStatistics(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(self.norm.running_var.sum())


class Measure(nn.Module):
    """Cannot be followed: a number that decides what is computed."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.mean())


class FeedsTheUnknown(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.measure = Measure()
        self.measure.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.norm(h) + self.measure(h)


class Endless(Pair):
    def forward(self, x: Tensor) -> Tensor:
        while x.abs().mean() > 1e9:
            x = self.conv(x)
        return super().forward(x)


class AsksTheKind(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if isinstance(x, Tensor) else super().forward(x)


class AsksTorchTheKind(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if torch.is_tensor(x) else super().forward(x)


class AsksTheUnknown(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.measure = Measure()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if isinstance(self.measure(x), Tensor) else super().forward(x)


class AsksWhatALayerGives(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if isinstance(self.cells(x[0]), tuple) else super().forward(x)


class SharedPool(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(self.conv(x))
        return self.norm(h) + h


class AsksForMore(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.tensors) if hasattr(x, "tensors") else self.conv(x)


class Functional(Pair):
    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        return F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight, n.bias)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Shared, "the Conv2d before it is called elsewhere as well"),
        (OneWayWithout, "the Conv2d before it is called elsewhere as well"),
        (Skip, "the Conv2d before it feeds something else as well"),
        (InPlace, "the Conv2d before it feeds something else as well"),
        (OneWayInPlace, "the Conv2d before it feeds something else as well"),
        (NormTwice, "it is called several times, next to different layers"),
        (UsesWeight, "the Conv2d before it: code outside reads the weights"),
        (UsesWeightQuietly, "the Conv2d before it: code outside reads the weights"),
        (UsesStatistics, "code outside reads the weights or statistics"),
        (FeedsTheUnknown, "the Conv2d before it feeds something else as well"),
        (Endless, "torch.fx cannot follow Endless.forward (TraceError: "),
        (AsksTheKind, "the network does not call it in eval mode"),
        (AsksTorchTheKind, "the network does not call it in eval mode"),
        (AsksTheUnknown, "torch.fx cannot follow AsksTheUnknown.forward (TraceError: it asks what kind"),
        (AsksWhatALayerGives, "torch.fx cannot follow AsksWhatALayerGives.forward (TraceError: it asks"),
        (SharedPool, "it lies between AvgPool2d and add"),
        (AsksForMore, "the network does not call it in eval mode"),
        (Functional, "code outside reads the weights or statistics"),
    ],
)
def test_where_anything_else_is_done_with_it_the_norm_stays(kind: type[Pair], reason: str) -> None:
    (kept,) = fold_and_compare(kind()).kept
    assert kept.reason.startswith(reason)


class AsksBetween(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        if x.mean() > 0:
            return self.norm(h)
        return self.norm(h).flip(0)


def test_modules_that_ask_are_followed_each_by_itself() -> None:
    # twelve questions, of which every combination would be 4,096 ways
    model = nn.Sequential(*(AsksBetween() for _ in range(6)), *(AsksLater() for _ in range(6)))
    assert len(fold_and_compare(model).folded) == 12


@pytest.mark.parametrize("is_before", [False, True])
def test_what_passes_a_hook_may_be_changed_by_it(is_before: bool) -> None:
    pair = Pair()
    inner = nn.Sequential(pair.norm if is_before else pair.conv)
    if is_before:
        inner.register_forward_pre_hook(lambda _module, args: args[0].abs())
    else:
        inner.register_forward_hook(lambda _module, _args, output: output.abs())
    model = nn.Sequential(pair.conv, inner) if is_before else nn.Sequential(inner, pair.norm)
    assert "a module with a hook" in fold_and_compare(model).kept[0].reason


def test_what_is_inside_a_layer_of_torch_is_called_out_of_sight() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2).transpose(1, 2)  # (N, H * W, C)
            x, _ = self.attention(x, x, x, need_weights=False)
            return self.norm(self.attention.out_proj(x[:, 0]))

    (kept,) = fold_and_compare(Attention()).kept
    assert kept.reason.endswith("Linear before it: MultiheadAttention calls it out of sight")


def test_what_the_network_does_not_call_stays() -> None:
    class WithHead(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.training_head = Pair()

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return self.training_head(x) if self.training else x

    folding = fold_and_compare(WithHead())
    assert [layer.name for layer in folding.folded] == ["norm"]
    assert [layer.reason for layer in folding.kept] == ["the network does not call it in eval mode"]


class Unseen(nn.Module):
    """Its own code cannot be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.blocks = nn.ModuleList([Pair(), Pair()])
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.skip = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.pair(x) / float(x.std()))
        if self.skip is not None:
            x = self.skip(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)

    def last(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def test_below_code_that_cannot_be_followed_each_module_is_followed_by_itself() -> None:
    folding = fold_and_compare(Unseen())
    assert [layer.name for layer in folding.folded] == [
        "pair.norm",
        "block.1",
        "blocks.0.norm",
        "blocks.1.norm",
    ]
    (kept,) = folding.kept
    assert kept.name == "norm"
    assert kept.reason.startswith("torch.fx cannot follow Unseen.forward (TypeError: float() ")


class ReachesIn(Unseen):
    def last(self, x: Tensor) -> Tensor:
        return super().last(x) + self.block[0](x)


class TakesOut(Unseen):
    def last(self, x: Tensor) -> Tensor:
        pair = self.pair
        return self.norm(pair.conv(x))


class GoesThrough(Unseen):
    def last(self, x: Tensor) -> Tensor:
        for layer in self.block:
            x = layer(x)
        return x


class GoesOn(Unseen):
    def last(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return block.conv(x)


class WalksAbout(Unseen):
    def last(self, x: Tensor) -> Tensor:
        return next(iter(self.children())).conv(x)


class HandsItselfOn(Unseen):
    def last(self, x: Tensor) -> Tensor:
        return Unseen.last(self, x) + self.pair.conv(x)


class ReachesInThroughItsParent(ReachesIn):
    def last(self, x: Tensor) -> Tensor:
        return super().last(x)


class HasAList(Unseen):
    def __init__(self) -> None:
        super().__init__()
        self.convolutions = [self.pair.conv]

    def last(self, x: Tensor) -> Tensor:
        return self.convolutions[0](x)


class HasAProperty(Unseen):
    @property
    def first(self) -> nn.Module:
        return self.pair.conv

    def last(self, x: Tensor) -> Tensor:
        return self.first(x)


@pytest.mark.parametrize(
    "kind",
    [
        ReachesIn,
        TakesOut,
        GoesThrough,
        GoesOn,
        WalksAbout,
        HandsItselfOn,
        ReachesInThroughItsParent,
        HasAList,
        HasAProperty,
    ],
)
def test_code_that_cannot_be_followed_and_reaches_into_its_modules_keeps_them(kind: type[Unseen]) -> None:
    assert not calls_parts_whole(kind())
    folding = fold_and_compare(kind())
    assert not folding.folded
    assert all("torch.fx cannot follow" in layer.reason for layer in folding.kept)


def made(line: str) -> nn.Module:
    """A network whose `forward` is that line, without a source to read; pytest rewrites no `assert` there."""
    names: dict[str, object] = {"nn": nn, "Pair": Pair}
    code = "class Made(nn.Module):\n def __init__(self):\n  super().__init__()\n  self.pair = Pair()\n"
    exec(f"{code} def forward(self, x): {line}", names)
    kind = names["Made"]
    assert isinstance(kind, type)
    model = kind()
    assert isinstance(model, nn.Module)
    return model


def test_code_without_source_is_taken_to_reach_into_its_modules() -> None:
    assert len(fold_and_compare(made("return self.pair(x) * float(x.mean())")).kept) == 1


def test_an_assertion_leads_nowhere_unless_all_ways_do() -> None:
    assert len(fold_and_compare(made("assert x.dim() == 4, x.shape; return self.pair(x)")).folded) == 1
    folding = fold_batch_norm(made("assert x.dim() == 4; raise ValueError('never'); return self.pair(x)"))
    assert "torch.fx cannot follow Made.forward" in folding.kept[0].reason


def test_wrapped_and_traced_networks_are_followed() -> None:
    for model in (nn.DataParallel(Pair()), torch.fx.symbolic_trace(Pair())):
        assert len(fold_and_compare(model).folded) == 1


def test_other_threads_may_use_their_networks_meanwhile() -> None:
    theirs, x = Pair().eval(), torch.randn(1, 3, 4, 4)
    expected, found, stop = theirs(x), [], threading.Event()

    def use() -> None:
        while not stop.is_set():
            found.append(theirs(x))

    thread = threading.Thread(target=use)
    thread.start()
    try:
        for _ in range(20):
            assert len(fold_batch_norm(Pair()).folded) == 1
    finally:
        stop.set()
        thread.join()
    assert found
    assert all(type(one) is Tensor and torch.equal(one, expected) for one in found)
