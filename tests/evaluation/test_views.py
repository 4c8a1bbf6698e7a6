from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bncli.errors import DataError
from bncli.evaluation import evaluate_augmented
from bncli.evaluation.views import shifted
from tests.conftest import Bncli


def network() -> nn.Module:
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4 * 5, 4))
    return nn.Sequential(*layers).double()


def by_hand(model: nn.Module, images: Tensor, views: str) -> Tensor:
    """Image by image and view by view, with PyTorch's own reflection padding."""
    rows = []
    for image in images:
        padded = F.pad(image[None], (1, 1, 1, 1), mode="reflect")
        height, width = image.shape[1:]
        corners = {1: 0.5} if views == "flip" else {1: 0.25, 0: 0.125, 2: 0.125}
        total = torch.zeros(1, 4, dtype=torch.float64)
        for corner, weight in corners.items():
            view = padded[:, :, corner : corner + height, corner : corner + width]
            total += weight * (model(view) + model(view.flip(-1)))
        rows.append(total)
    return torch.cat(rows)


@pytest.mark.parametrize(("views", "num_views"), [("flip", 2), ("shifts", 6)])
def test_the_views_are_averaged_as_an_explicit_loop_averages_them(views: str, num_views: int) -> None:
    model, images, labels = network(), torch.randn(20, 3, 6, 7).double(), torch.randint(4, (20,))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [(images[:13], labels[:13]), (images[13:], labels[13:])]
    found = evaluate_augmented(model, batches, views)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        logits = by_hand(model.eval(), images, views)
    assert found.accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-12)
    assert (found.num_views, found.num_images) == (num_views, 20)


@pytest.mark.parametrize(("pixels", "corner"), [(-1, 2), (0, 1), (1, 0)])
def test_a_shift_is_a_crop_of_the_reflected_image(pixels: int, corner: int) -> None:
    images = torch.randn(2, 3, 4, 5)
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    assert torch.equal(shifted(images, pixels), padded[:, :, corner : corner + 4, corner : corner + 5])


def test_no_images_are_refused() -> None:
    with pytest.raises(DataError, match="no images"):
        evaluate_augmented(network(), [], "flip")


def test_eval_reports_the_views_apart_and_the_plain_accuracy_as_before(
    bncli: Bncli, finished_run: Path
) -> None:
    plain = bncli("eval", finished_run / "last.pt", "--num-images", 4, "--json").json
    found = bncli("eval", finished_run / "last.pt", "--num-images", 4, "--json", "--tta", "shifts").json
    assert plain["tta"] is None
    assert (found["accuracy"], found["loss"]) == (plain["accuracy"], plain["loss"])
    assert found["tta"]["views"] == "shifts"
    assert found["tta"]["loss"] != found["loss"]
    shown = bncli("eval", finished_run / "last.pt", "--num-images", 4, "--tta", "shifts").out
    assert f"accuracy {found['tta']['accuracy']:.2%} averaged over 6 views of each image" in shown
    assert f"(--tta shifts, loss {found['tta']['loss']:.4f})" in shown


@pytest.mark.parametrize("other", [("--batch-invariant",), ("--sweep", "1,2"), ("--gap",)])
def test_views_are_refused_beside_other_measurements(bncli: Bncli, other: tuple[str, ...]) -> None:
    outcome = bncli("eval", "no-such-file.pt", "--tta", "flip", *other)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "--tta: cannot be combined with" in outcome.err
