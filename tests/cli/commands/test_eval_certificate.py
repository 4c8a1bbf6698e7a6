"""`bncli eval`: the certificate, --batch-invariant, --save and --sweep."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bncli.checkpoints import load_checkpoint, load_model
from bncli.determinism import BATCH_SIZES, FixedShape
from bncli.models.convnet import ConvNet
from bncli.sample import stratified_sample
from tests.conftest import Bncli

CLAIMS = ["repeat", "neighbours", "position", "batch_size"]
QUICK = ("--num-images", 12, "--batch-sizes", "2,3,16")


@pytest.fixture(scope="module")
def checkpoint(finished_run: Path) -> Path:
    return finished_run / "last.pt"


def test_the_json_contract(bncli: Bncli, checkpoint: Path) -> None:
    result = bncli("eval", checkpoint, *QUICK, "--json").json
    determinism = result["determinism"]
    assert list(determinism["claims"]) == CLAIMS
    for claim in determinism["claims"].values():
        assert set(claim) == {
            "bitwise_equal",
            "max_abs_diff",
            "max_rel_diff",
            "max_ulp",
            "prediction_flips",
            "first_differing_layer",
        }
        assert (claim["first_differing_layer"] is None) == claim["bitwise_equal"]
        assert claim["prediction_flips"] == 0
    assert determinism["repeat_bitwise_equal"] is determinism["claims"]["repeat"]["bitwise_equal"] is True
    assert [check["batch_size"] for check in determinism["batch_sizes"]] == [2, 3, 12]
    assert re.fullmatch("[0-9a-f]{64}", determinism["logits_sha256"])
    assert (result["batch_invariant"], result["fixed_rows"], result["sweep"]) == (False, None, [])
    assert result["runtime"].keys() >= {"device", "precision", "threads"}
    assert result["machine"].keys() >= {"torch", "cpu"}


def test_the_default_batch_sizes_are_those_of_the_certificate(bncli: Bncli, checkpoint: Path) -> None:
    result = bncli("eval", checkpoint, "--num-images", 70, "--json").json
    sizes = [min(size, 70) for size in BATCH_SIZES]
    assert [check["batch_size"] for check in result["determinism"]["batch_sizes"]] == sizes


def test_the_digest_is_the_same_from_run_to_run_and_that_of_the_networks_logits(
    bncli: Bncli, checkpoint: Path
) -> None:
    first, second = (
        bncli("eval", checkpoint, *QUICK, "--batch-invariant", "--json").json["determinism"] for _ in range(2)
    )
    assert first == second
    from bncli.data import load_dataset

    loaded = load_checkpoint(checkpoint)
    test = load_dataset(loaded.config.data).test
    images = test.images[stratified_sample(test.labels, 12)].contiguous(memory_format=torch.channels_last)
    model = FixedShape(load_model(loaded)).to(memory_format=torch.channels_last)
    with torch.no_grad():
        digest = hashlib.sha256(model(images).numpy().tobytes()).hexdigest()
    assert first["logits_sha256"] == digest


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_batch_invariance_is_certified_to_the_last_bit(
    bncli: Bncli, checkpoint: Path, precision: str
) -> None:
    arguments = ("eval", checkpoint, *QUICK, "--batch-invariant", "--set", f"runtime.precision={precision}")
    outcome = bncli(*arguments, "--json")
    assert outcome.code == 0
    result = outcome.json
    assert (result["batch_invariant"], result["fixed_rows"]) == (True, 64)
    for claim in result["determinism"]["claims"].values():
        assert claim == {
            "bitwise_equal": True,
            "max_abs_diff": 0,
            "max_rel_diff": 0,
            "max_ulp": 0,
            "prediction_flips": 0,
            "first_differing_layer": None,
        }
    plain = bncli("eval", checkpoint, *QUICK, "--set", f"runtime.precision={precision}", "--json").json
    assert result["accuracy"] == plain["accuracy"]
    assert result["determinism"]["train_mode"] == plain["determinism"]["train_mode"]
    text = " ".join(bncli(*arguments).out.split())
    assert "chunks of 64 rows" in text
    assert "does not depend on its batch, and neither does any bit of its logits" in text


def test_batch_invariance_that_fails_by_a_bit_exits_with_1_and_names_the_layer(
    bncli: Bncli, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ConvNet.forward

    def forward(self: ConvNet, images: Tensor) -> Tensor:
        logits = plain(self, images)
        one = torch.ones_like(logits)
        one[1:] = 1 + torch.finfo(logits.dtype).eps  # every row but the first, by half a bit or one
        return logits * one

    monkeypatch.setattr(ConvNet, "forward", forward)
    outcome = bncli("eval", checkpoint, *QUICK, "--batch-invariant")
    assert outcome.code == 1
    text = " ".join(outcome.out.split())
    assert "Batches of a fixed shape do not give equal bits on this machine." in text
    assert "The first layer whose output depends on the batch is (model)." in text
    # without the promise it is no failure, as long as no prediction changes
    assert bncli("eval", checkpoint, *QUICK).code == 0


def test_the_details_fit_80_columns(bncli: Bncli, checkpoint: Path) -> None:
    for option in ((), ("--batch-invariant",), ("--sweep", "1,2,100")):
        outcome = bncli("eval", checkpoint, *QUICK, *option, "--details")
        lines = outcome.out.splitlines()
        assert max(len(line.rstrip()) for line in lines if str(checkpoint) not in line) <= 80
        assert "In eval mode a prediction does not depend on its batch" in outcome.out
        for name in ("repeat", "neighbours", "position", "batch size"):
            assert re.search(rf"^{name} +(yes|no) ", outcome.out, flags=re.MULTILINE)
        assert re.search("^[0-9a-f]{64}$", outcome.out, flags=re.MULTILINE)


def test_the_certificate_is_saved_with_what_it_was_obtained_on(
    bncli: Bncli, checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "certificate.json"
    path.write_text("an older one")
    outcome = bncli("eval", checkpoint, *QUICK, "--batch-invariant", "--save", path, "--json")
    assert f"wrote {path}" in outcome.err
    saved, shown = json.loads(path.read_text()), outcome.json
    for key in ("determinism", "runtime", "machine", "batch_invariant", "fixed_rows", "checkpoint", "epoch"):
        assert saved[key] == shown[key]
    assert saved["checkpoint_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert [item.name for item in tmp_path.iterdir()] == ["certificate.json"]


def test_a_sweep_is_shown_written_and_drawn(
    bncli: Bncli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bncli.cli.progress.FIRST_LINE", 0.0)
    path = tmp_path / "sweep.svg"
    arguments = ("eval", checkpoint, *QUICK, "--sweep", "60,1,2,2,120", "--plot", path)
    outcome = bncli(*arguments, "--json")
    assert outcome.code == 0
    points = outcome.json["sweep"]
    assert [point["batch_size"] for point in points] == [1, 2, 60, 120]
    for point in points:
        assert point["eval_accuracy"] == outcome.json["accuracy"]
        low, high = point["eval_interval"]
        assert low < point["eval_accuracy"] < high
    assert points[0]["batch_statistics_accuracy"] < points[2]["batch_statistics_accuracy"]
    assert path.read_text().lstrip().startswith("<?xml")
    assert "passes over the test images, in both modes: 8" in outcome.err
    assert f"wrote {path}" in outcome.err
    text = bncli("eval", checkpoint, *QUICK, "--sweep", "2,60").out
    assert f"{points[1]['batch_statistics_accuracy']:.2%}" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--batch-sizes", "2,x"), "--batch-sizes: expected batch sizes such as 1,2,4,8, found '2,x'"),
        (("--batch-sizes", "0"), "--batch-sizes"),
        (("--batch-sizes", ""), "an empty value of --batch-sizes"),
        (("--batch-sizes", "1"), "above 1"),
        (("--sweep", "1,,2"), "--sweep"),
        (("--sweep", "1,121"), "batches of 121 asked for, but there are 120 images"),
        (("--plot", "x.png"), "add --sweep"),
        (("--sweep", "2", "--plot", "x.gif"), "use .png or .svg"),
        (("--sweep", "2", "--plot", "nowhere/x.png"), "there is no directory nowhere"),
        (("--save", "nowhere/x.json"), "there is no directory nowhere"),
        (("--save", "."), "it is a directory"),
    ],
)
def test_wrong_options_are_answered_by_one_line_and_exit_2(
    bncli: Bncli,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = bncli("eval", checkpoint, "--num-images", 4, *arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert expected in outcome.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_single_image_is_enough_for_a_certificate(bncli: Bncli, checkpoint: Path) -> None:
    outcome = bncli("eval", checkpoint, "--num-images", 1, "--json")
    assert outcome.code == 0
    assert outcome.json["determinism"]["num_images"] == 1
