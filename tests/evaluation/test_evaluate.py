import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bncli.batchnorm.modes import buffers_digest
from bncli.errors import BncliError, DataError
from bncli.evaluation.evaluate import evaluate

SIZES = [8, 8, 3]


def conv_net(num_classes: int = 5) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, num_classes),
    )
    for _ in range(3):
        net(torch.randn(16, 3, 6, 6))
    return net


def labelled_batches(num_labels: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 3, 6, 6), torch.randint(num_labels, (size,))) for size in SIZES]


class Answers(nn.Module):
    """Returns what it is given: the inputs are the logits."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


def test_accuracy_and_loss_are_those_of_a_float64_formula() -> None:
    net, batches = conv_net(), labelled_batches()
    result = evaluate(net, iter(batches))

    oracle = conv_net().double()
    oracle.load_state_dict(net.state_dict())
    oracle.eval()
    images = torch.cat([images for images, _ in batches]).double()
    labels = torch.cat([labels for _, labels in batches])
    with torch.no_grad():
        logits = oracle(images)
    hits = logits.argmax(1) == labels
    log_probabilities = logits - logits.exp().sum(1, keepdim=True).log()
    assert result.num_images == sum(SIZES)
    assert result.accuracy == float(hits.double().mean())
    assert result.loss == pytest.approx(float(-log_probabilities[range(19), labels].mean()), rel=1e-6)
    for label, accuracy in enumerate(result.per_class_accuracy):
        chosen = hits[labels == label]
        assert accuracy == (float(chosen.double().mean()) if len(chosen) else None)
    assert result.per_class_accuracy[4] is None  # no image has the fifth label
    assert result.seconds > 0
    assert result.images_per_second == pytest.approx(19 / result.seconds)


def test_the_cut_into_batches_does_not_matter() -> None:
    net, batches = conv_net(), labelled_batches()
    single = [(image[None], label[None]) for images, labels in batches for image, label in
              zip(images, labels, strict=True)]  # fmt: skip
    whole, alone = evaluate(net, batches), evaluate(net, single)
    assert alone.per_class_accuracy == whole.per_class_accuracy
    assert alone.loss == pytest.approx(whole.loss, rel=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    net = conv_net()
    net[1].eval()
    digest, modes = buffers_digest(net), [module.training for module in net.modules()]
    evaluate(net, labelled_batches())
    assert buffers_digest(net) == digest
    assert [module.training for module in net.modules()] == modes
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_model_is_left_as_it_was_when_the_loader_raises() -> None:
    net = conv_net()
    modes = [module.training for module in net.modules()]

    def broken():
        yield labelled_batches()[0]
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        evaluate(net, broken())
    assert [module.training for module in net.modules()] == modes
    assert torch.is_grad_enabled()


def test_a_model_that_counts_in_a_buffer_gets_it_back() -> None:
    class Counter(Answers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, inputs: Tensor) -> Tensor:
            self.count += 1
            return inputs

    net = Counter()
    evaluate(net, [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))])
    assert float(net.count) == 0


@pytest.mark.parametrize(("num_batches", "size"), [(2000, 1), (2, 1000)])
def test_many_small_losses_add_up_in_float64(num_batches: int, size: int) -> None:
    # 0.1 is no binary fraction: float32 sums of it drift visibly
    logits = torch.tensor([[0.0, math.log(math.exp(0.1) - 1)]])  # cross-entropy 0.1 for label 0
    batch = (logits.repeat(size, 1), torch.zeros(size, dtype=torch.long))
    result = evaluate(Answers(), [batch] * num_batches)
    expected = float(F.cross_entropy(logits, torch.tensor([0])))
    assert result.loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_precision_are_judged_in_float32_or_better(dtype: torch.dtype) -> None:
    logits = (torch.randn(16, 5) * 3).to(dtype)
    labels = torch.randint(5, (16,))
    result = evaluate(Answers(), [(logits, labels)])
    exact = float(F.cross_entropy(logits.double(), labels))
    assert result.loss == pytest.approx(exact, rel=1e-12 if dtype == torch.float64 else 1e-6)


def test_a_nan_is_neither_right_nor_hidden() -> None:
    logits = torch.tensor([[math.nan, 0.0], [9.0, 0.0]])
    result = evaluate(Answers(), [(logits, torch.tensor([0, 0]))])
    assert result.accuracy == 0.5
    assert math.isnan(result.loss)


def test_labels_may_be_small_integers() -> None:
    labels = torch.tensor([0, 2], dtype=torch.uint8)
    assert evaluate(Answers(), [(torch.eye(3)[[0, 2]], labels)]).accuracy == 1.0


def test_progress_hears_the_number_of_images_done() -> None:
    seen: list[int] = []
    evaluate(conv_net(), labelled_batches(), progress=seen.append)
    assert seen == [8, 16, 19]


@pytest.mark.parametrize("empty", [[], [(torch.zeros(0, 3, 6, 6), torch.zeros(0).long())]])
def test_no_images_are_an_error(empty: list[tuple[Tensor, Tensor]]) -> None:
    with pytest.raises(DataError, match="no images"):
        evaluate(conv_net(), empty)


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_that_is_no_class_is_named(label: int) -> None:
    with pytest.raises(DataError, match=f"label {label} .* 0 to 4"):
        evaluate(conv_net(), [(torch.randn(2, 3, 6, 6), torch.tensor([0, label]))])


def test_another_number_of_labels_than_inputs_is_an_error() -> None:
    with pytest.raises(DataError, match=r"shape \(3,\), expected one per input: \(2,\)"):
        evaluate(Answers(), [(torch.eye(2), torch.zeros(3).long())])


def test_outputs_that_are_no_logits_are_an_error() -> None:
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(BncliError, match=r"shape \(2, 3, 4\) for 2 inputs"):
        evaluate(Answers(), [(torch.zeros(2, 3, 4), labels)])
    with pytest.raises(BncliError, match="returned a tuple"):
        evaluate(nn.LSTM(3, 3), [(torch.zeros(2, 3), labels)])


def test_autocast_is_the_callers_choice() -> None:
    net = conv_net().eval()
    seen: list[torch.dtype] = []
    net[-1].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    evaluate(net, labelled_batches())
    with torch.autocast("cpu", torch.bfloat16):
        evaluate(net, labelled_batches())
    assert set(seen[:3]) == {torch.float32}
    assert set(seen[3:]) == {torch.bfloat16}
