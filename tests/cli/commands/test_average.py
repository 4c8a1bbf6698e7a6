"""`bncli average`: files, accuracies and words; PyTorch is the oracle for what is in the new file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bncli.checkpoints import load_checkpoint, own
from bncli.evaluation import evaluate
from tests.cli.commands.test_named_networks import COMPUTED, DATA, NET
from tests.conftest import Bncli, save_as_if_whole


@pytest.fixture(scope="module")
def kept_run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bncli.cli.app import main

    run = tmp_path_factory.mktemp("kept") / "run"
    options = ["--set", "train.epochs=4", "--set", "train.keep_epochs=3"]
    assert main(["train", str(tiny_config), "--run-dir", str(run), *options]) == 0
    return run


def test_a_run_keeps_its_last_epochs(kept_run: Path) -> None:
    assert sorted(path.name for path in kept_run.glob("epoch-*")) == [
        "epoch-0002.pt",
        "epoch-0003.pt",
        "epoch-0004.pt",
    ]
    last, kept = load_checkpoint(kept_run / "last.pt"), load_checkpoint(kept_run / "epoch-0004.pt")
    assert all(torch.equal(kept.state_dict[name], value) for name, value in last.state_dict.items())
    assert (kept.epoch, kept.optimizer) == (4, None)


def test_epochs_of_a_run(bncli: Bncli, kept_run: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.pt"
    outcome = bncli("average", "--of", kept_run, "--last", 2, "-o", new, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert [(Path(source["path"]).name, source["share"]) for source in found["sources"]] == [
        ("epoch-0003.pt", 0.5),
        ("epoch-0004.pt", 0.5),
    ]
    parts = [load_checkpoint(kept_run / f"epoch-000{number}.pt") for number in (3, 4)]
    for source, part in zip(found["sources"], parts, strict=True):
        assert source["score"]["accuracy"] == pytest.approx(part.test_accuracy)
    made = load_checkpoint(new)
    for name, value in made.state_dict.items():
        if "running" not in name and value.is_floating_point():
            both = torch.stack([part.state_dict[name].double() for part in parts])
            assert torch.equal(value, both.mean(0).float()), name
    assert made.recalibration is not None
    assert made.test_accuracy == found["scores"]["recalibrate"]["accuracy"]
    assert set(found["scores"]) == {"recalibrate", "first", "average", "pooled"}
    # what it says of itself holds: its statistics are measured, and its accuracy is what eval finds
    assert bncli("recalibrate", new, "--verify").code == 0
    again = json.loads(bncli("eval", new, "--json", "--num-images", 8, "--batch-sizes", 2).out)
    assert again["accuracy"] == made.test_accuracy


def test_more_epochs_than_a_run_keeps_are_told(bncli: Bncli, kept_run: Path, tmp_path: Path) -> None:
    outcome = bncli(
        "average", "--of", kept_run, "--last", 9, "-o", tmp_path / "a.pt", "--no-evaluate", "--json"
    )
    assert f"{kept_run} keeps 3 epochs, so --last 9 takes these" in outcome.err
    assert len(json.loads(outcome.out)["sources"]) == 3


def test_greedy_leaves_out_what_lowers_the_accuracy(bncli: Bncli, kept_run: Path, tmp_path: Path) -> None:
    ruined = tmp_path / "ruined.pt"
    from dataclasses import replace

    from bncli.checkpoints import save_checkpoint

    checkpoint = load_checkpoint(kept_run / "last.pt")
    state = {
        name: torch.randn_like(value) * 50 if name.endswith("weight") else value
        for name, value in checkpoint.state_dict.items()
    }
    save_checkpoint(replace(checkpoint, state_dict=state), ruined)
    out = tmp_path / "new.pt"
    outcome = bncli("average", ruined, kept_run / "last.pt", "-o", out, "--greedy", "--json")
    assert outcome.code == 0, outcome.err
    assert [source["share"] for source in json.loads(outcome.out)["sources"]] == [0, 1]
    assert all(
        torch.equal(load_checkpoint(out).state_dict[name], value)
        for name, value in checkpoint.state_dict.items()
        if "running" not in name
    )


def test_a_file_is_read_once_and_once_more_where_it_is_tried(
    bncli: Bncli, kept_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = own.load_content

    def counted(path: Path) -> Any:
        read.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(own, "load_content", counted)
    names = [f"epoch-000{number}.pt" for number in (2, 3, 4)]
    words = ("average", "--of", kept_run, "--statistics", "pooled", "--set", "runtime.eval_batch_size=60")
    assert bncli(*words, "-o", tmp_path / "a.pt").code == 0
    assert read == [names[0], *names]  # the first one also tells the network
    read.clear()
    assert bncli(*words, "-o", tmp_path / "b.pt", "--greedy").code == 0
    assert sorted(read) == sorted([names[0], *names, *names])
    read.clear()
    assert bncli(*words, "-o", tmp_path / "c.pt", "--no-evaluate").code == 0
    assert read == [names[0], *names]


def test_a_damaged_file_is_not_averaged(bncli: Bncli, kept_run: Path, tmp_path: Path) -> None:
    content = torch.load(kept_run / "last.pt", weights_only=True)
    content["state_dict"]["head.weight"][0] += 1  # and its digest stays
    torch.save(content, tmp_path / "damaged.pt")
    for more in ((), ("--no-evaluate", "--statistics", "pooled")):
        words = ("average", kept_run / "last.pt", tmp_path / "damaged.pt", "-o", tmp_path / "a.pt", *more)
        outcome = bncli(*words)
        assert outcome.code == 2
        assert "damaged.pt: damaged: its SHA-256 is not" in outcome.err.splitlines()[-1]
    assert not (tmp_path / "a.pt").exists()


@pytest.fixture
def foreign(tmp_path: Path) -> list[Path]:
    (tmp_path / "net.py").write_text(NET)
    namespace: dict[str, object] = {}
    exec(NET, namespace)
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = namespace["make"]()  # type: ignore[operator]
        model(torch.rand(16, 3, 32, 32))
        state = {f"module.{name}": value for name, value in model.state_dict().items()}
        found.append(tmp_path / f"{seed}.pt")
        torch.save({"state_dict": state, "epoch": seed}, found[-1])
    return found


def test_a_strangers_checkpoints_without_the_network(
    bncli: Bncli, foreign: list[Path], tmp_path: Path
) -> None:
    outcome = bncli("average", *foreign, "-o", tmp_path / "new.pt", "--statistics", "average")
    assert outcome.code == 0, outcome.err
    assert "is that of" in outcome.err
    first, second, new = (torch.load(path, weights_only=True) for path in (*foreign, tmp_path / "new.pt"))
    assert new["epoch"] == 0
    for name, value in new["state_dict"].items():
        both = torch.stack([one["state_dict"][name].double() for one in (first, second)])
        expected = both.mean(0) if value.is_floating_point() else both[0]
        torch.testing.assert_close(value.double(), expected, rtol=1e-7, atol=1e-8)


def test_a_strangers_network_is_recalibrated(bncli: Bncli, foreign: list[Path], tmp_path: Path) -> None:
    new = tmp_path / "new.pt"
    model = ("--model", f"{tmp_path / 'net.py'}:make", *DATA, *COMPUTED)
    outcome = bncli("average", *foreign, "-o", new, *model)
    assert outcome.code == 0, outcome.err
    assert "recalibrate (written)" in outcome.out
    again = bncli("recalibrate", new, "--verify", *model)
    assert again.code == 0, again.out


def test_what_cannot_be_averaged(bncli: Bncli, foreign: list[Path], kept_run: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.pt"
    last = kept_run / "last.pt"
    other = tmp_path / "other.pt"
    content = torch.load(last, weights_only=True)
    content["state_dict"] = {f"other.{name}": tensor for name, tensor in content["state_dict"].items()}
    save_as_if_whole(content, other)
    for arguments, said in (
        ((last, other, "-o", new), "only checkpoints of one network are averaged"),
        ((last, "-o", new), "give two or more checkpoints, or --of RUN_DIR"),
        ((last, last), "give -o NEW"),
        ((last, last, "-o", last), "is an input, which is never changed"),
        ((last, last, "-o", new, "--weights", "1"), "expected 2 numbers of 0 or more"),
        ((last, last, "-o", new, "--weights", "0,0"), "one of them has to be above 0"),
        ((last, foreign[0], "-o", new), "no bncli checkpoint"),
        ((*foreign, "-o", new), "or --statistics pooled, which needs none"),
        ((*foreign, "-o", new, "--statistics", "pooled", "--greedy"), "give --model NAME"),
        (("--of", tmp_path, "-o", new), "keeps 0 epochs, and two are needed"),
        (("--of", tmp_path / "none", "-o", new), "none: no such directory"),
        (("--of", kept_run, last, "-o", new), "not both"),
        ((last, last, "--last", 2, "-o", new), "goes with --of"),
        ((last, last, "-o", tmp_path / "a.npz"), "a.npz: would be a file of PyTorch, as the source is; give"),
        ((*foreign, "-o", tmp_path / "a.ONNX", "--statistics", "first"), "a name that ends in .pt"),
    ):
        outcome = bncli("average", *arguments)
        assert (outcome.code, outcome.out) == (2, ""), arguments
        assert said in outcome.err, outcome.err
        assert outcome.err.count("\n") == 1, outcome.err
    assert not new.exists()


def test_the_score_is_a_plain_evaluation(kept_run: Path, bncli: Bncli, tmp_path: Path) -> None:
    from bncli.checkpoints import load_model
    from bncli.data import load_dataset

    new, precise = tmp_path / "new.pt", ("--set", "runtime.precision=float32")
    outcome = bncli("average", "--of", kept_run, "-o", new, "--statistics", "pooled", "--json", *precise)
    checkpoint = load_checkpoint(new)
    test = load_dataset(checkpoint.config.data).test
    found = evaluate(load_model(new), [(test.images, test.labels)])
    assert json.loads(outcome.out)["scores"]["pooled"]["accuracy"] == found.accuracy
