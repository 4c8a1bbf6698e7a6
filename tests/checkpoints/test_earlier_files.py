"""Files that earlier versions of bncli wrote are read as they were meant; torch.load is the oracle.

`earlier/` holds what version 0.1.0 wrote: one epoch of the quickstart with one stage of 4 channels, 200
training images, `train.recalibrate=exact`.
"""

from pathlib import Path

import pytest
import torch

from bncli.checkpoints import check_integrity, load_checkpoint, load_model
from tests.conftest import Bncli

EARLIER = Path(__file__).parent / "earlier"
FILES = sorted(EARLIER.glob("*.pt"))


def test_there_are_earlier_files() -> None:
    assert [path.name for path in FILES] == ["last-0.1.0.pt", "recalibrated-0.1.0.pt"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_earlier_file_is_read_to_the_last_bit(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    found = load_checkpoint(path)
    assert found.state_dict.keys() == content["state_dict"].keys()
    for key, value in content["state_dict"].items():
        assert torch.equal(found.state_dict[key], value)
    assert found.test_accuracy == content["test_accuracy"]
    assert check_integrity(path).digest_matches
    logits = load_model(found)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert logits.shape == (2, 10)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_command_takes_an_earlier_file(bncli: Bncli, path: Path, tmp_path: Path) -> None:
    content = torch.load(path, weights_only=True)
    evaluated = bncli("eval", path, "--num-images", 2, "--json")
    assert evaluated.json["accuracy"] == pytest.approx(content["test_accuracy"], abs=0.011)  # one image
    layers = bncli("inspect-stats", path, "--json").json["layers"]
    assert [layer["name"] for layer in layers] == ["stages.0.0.norm"]
    assert bncli("recalibrate", path, "-o", tmp_path / "new.pt").code == 0
