"""The whole report in one call: each part is what the function for that part gives."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bncli import FixedShape, certify, evaluate, measure_gap
from bncli.batchnorm import buffers_digest
from bncli.evaluation import Evaluation, evaluate_augmented, examine, sweep_batch_sizes
from bncli.sample import stratified_sample
from bncli.torchvision_compat import import_torchvision

IMAGES = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24) % 10
TRAINING = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(2)).split(10)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return import_torchvision().models.resnet18(num_classes=10)


def without_time(found: Evaluation) -> Evaluation:
    return dataclasses.replace(found, seconds=0, images_per_second=0)


def test_each_part_is_what_its_own_function_gives(network: nn.Module) -> None:
    before = buffers_digest(network)
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=7)
    shuffled = [(IMAGES, LABELS)]
    found = examine(
        network, loader, TRAINING, shuffled=shuffled, num_images=5, batch_size=8, sweep=(4,), views="flip"
    )
    assert without_time(found.evaluation) == without_time(
        evaluate(network, zip(IMAGES.split(8), LABELS.split(8), strict=True))
    )
    sample = stratified_sample(LABELS, 5)
    assert found.sample == tuple(sample.tolist())
    assert found.certificate == certify(network, IMAGES[sample])
    assert found.sample_sweep == sweep_batch_sizes(network, (IMAGES[sample], LABELS[sample]), (1,))
    assert found.sweep == sweep_batch_sizes(network, (IMAGES, LABELS), (4,))
    assert found.gap == measure_gap(network, shuffled, TRAINING)
    assert found.tta is not None
    assert found.tta.accuracy == evaluate_augmented(network, [(IMAGES, LABELS)], "flip").accuracy
    assert buffers_digest(network) == before
    assert network.training


def test_what_is_not_asked_for_is_not_measured(network: nn.Module) -> None:
    found = examine(network, (IMAGES, LABELS), num_images=2, batch_sizes=(2,))
    assert (found.gap, found.tta, found.sweep) == (None, None, ())
    assert found.passed == found.certificate.deterministic
    document = found.to_dict(class_names=tuple("abcdefghij"))
    assert document["accuracy"] == found.evaluation.accuracy
    assert list(document["per_class_accuracy"]) == list("abcdefghij")
    assert document["determinism"]["num_images"] == 2


@pytest.mark.parametrize(("last", "said"), [(nn.Identity(), ""), (nn.BatchNorm1d(10), ", in both modes")])
def test_two_modes_are_spoken_of_where_there_are_two(last: nn.Module, said: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10), last).eval()
    phases: set[str] = set()

    def progress(phase: str, _: int, __: int | None) -> None:
        phases.add(phase)

    examine(model, (IMAGES, LABELS), num_images=2, batch_sizes=(2,), sweep=(4,), progress=progress)
    passes = {phase for phase in phases if phase.startswith("passes over")}
    assert passes == {f"passes over the {images}{said}" for images in ("compared images", "test images")}


def test_of_a_fixed_shape_every_bit_counts(network: nn.Module) -> None:
    found = examine(FixedShape(network.eval(), rows=8), (IMAGES, LABELS), num_images=4, batch_size=12)
    network.train()
    assert found.certificate.fixed_rows == 8
    assert found.passed == found.certificate.bitwise_equal


def test_results_say_what_they_found_in_a_few_lines(network: nn.Module) -> None:
    found = examine(network, (IMAGES, LABELS), TRAINING, num_images=3, sweep=(2,), views="shifts")
    text = str(found)
    assert len(text.splitlines()) < 20
    assert "object at 0x" not in text
    assert found.certificate.verdict in text
    assert found.gap is not None
    assert found.gap.verdict in text
    assert f"{found.evaluation.accuracy:.2%}" in text
