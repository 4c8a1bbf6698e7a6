"""The program as a whole: exit codes, messages on one line, and no traceback for anybody."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bncli as package
from tests.conftest import Bncli, save_as_if_whole

PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489")


def is_one_line(text: str) -> bool:
    """Only the last line counts: progress may have been reported before."""
    return text.endswith("\n") and text.splitlines()[-1].startswith("bncli: error: ")


def test_version_and_help_answer(bncli: Bncli) -> None:
    assert bncli("--version").out == f"bncli {package.__version__}\n"
    for arguments in ((), ("--help",), ("-h",)):
        outcome = bncli(*arguments)
        assert outcome.code == 0
        assert all(name in outcome.out for name in ("train", "eval", "predict", "inspect-stats"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("train", "--nonsense"),
        ("eval",),
        ("train", "x.yaml", "--resume", "y"),
        ("train", "--resume", "y", "--run-dir", "z"),
        ("predict", "x.pt"),
        ("eval", "x.pt", "--num-images", "many"),
        ("eval", "x.pt", "--num-images", "0"),
    ],
)
def test_a_wrong_command_line_is_answered_by_one_line_and_exit_2(bncli: Bncli, arguments: tuple) -> None:
    outcome = bncli(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1
    assert is_one_line(outcome.err)


@pytest.mark.parametrize("command", ["eval", "inspect-stats"])
@pytest.mark.parametrize(
    "content", [None, "directory", b"", b"some text", PNG, "truncated"], ids=lambda content: str(content)[:9]
)
def test_what_is_no_checkpoint_is_answered_by_one_line_and_exit_2(
    bncli: Bncli, finished_run: Path, tmp_path: Path, command: str, content: object
) -> None:
    path = tmp_path / "file.pt"
    if content == "directory":
        path.mkdir()
    elif content == "truncated":
        path.write_bytes((finished_run / "last.pt").read_bytes()[:-100])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    outcome = bncli(command, path)
    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1
    assert str(path) in outcome.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trian: {}", "trian: unknown key; did you mean 'train'?"),
        ("train: {epochs: many}", "train.epochs: must be a whole number, not 'many'"),
        ("train: {epochs: 0}", "train.epochs: must be at least 1, not 0"),
        ("", "empty"),
        ("[1, 2]", "found a list"),
        ("runtime: {device: abacus}", "unknown device 'abacus'"),
        ("runtime: {device: 'cuda:63'}", "'cuda:63'"),
        ("data: {name: cifar10, root: nowhere, url: 'http://127.0.0.1:9/x.tar.gz'}", "data.archive"),
        ("data: {name: imagefolder, root: nowhere}", "nowhere"),
        ("augment: {crop_padding: 40}", "augment.crop_padding"),
        ("train: {batch_size: 100000}", "train.batch_size"),
        ("model: {widths: [4, 4, 4, 4, 4, 4]}", "model.widths"),
    ],
)
def test_a_bad_configuration_is_answered_by_one_line_and_exit_2(
    bncli: Bncli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    outcome = (
        bncli("train", "config.yaml", "--set", "train.epochs=1")
        if "epochs" not in text
        else bncli("train", "config.yaml")
    )
    assert outcome.code == 2
    assert outcome.out == ""
    assert is_one_line(outcome.err)
    assert expected in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "runs").exists()


def test_a_run_directory_that_cannot_be_written_is_answered_by_one_line(
    bncli: Bncli, tiny_config: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = bncli("train", tiny_config, "--run-dir", tmp_path / "file" / "run")
    assert outcome.code == 2
    assert "cannot be written" in outcome.err.splitlines()[-1]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory that even root cannot write")
def test_a_read_only_file_system_is_answered_by_one_line(bncli: Bncli, tiny_config: Path) -> None:
    outcome = bncli("train", tiny_config, "--run-dir", "/proc/run")
    assert outcome.code == 2
    assert "/proc/run" in outcome.err.splitlines()[-1]


def test_names_with_escape_sequences_do_not_reach_the_terminal(bncli: Bncli) -> None:
    outcome = bncli("eval", "\x1b[31mred\x07.pt")
    assert outcome.code == 2
    assert "\x1b" not in outcome.err
    assert "\x07" not in outcome.err


def test_an_unforeseen_error_is_one_line_too_unless_its_traceback_is_asked_for(
    bncli: Bncli, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr("bncli.checkpoints.load_checkpoint", fail)
    outcome = bncli("eval", finished_run / "last.pt")
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert "ZeroDivisionError: first second" in outcome.err
    monkeypatch.setenv("BNCLI_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        bncli("eval", finished_run / "last.pt")


def test_an_interrupted_run_exits_with_130_and_says_how_to_go_on(
    bncli: Bncli, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bncli.training.loop.training_step", interrupt)
    outcome = bncli("train", tiny_config, "--run-dir", tmp_path / "run")
    assert outcome.code == 130
    assert f"bncli train --resume {tmp_path / 'run'}" in outcome.err


@pytest.mark.parametrize(
    ("command", "place"),
    [("eval", "bncli.evaluation.examine"), ("inspect-stats", "bncli.checkpoints.open_checkpoint")],
)
def test_ctrl_c_is_answered_in_every_command(
    bncli: Bncli, finished_run: Path, monkeypatch: pytest.MonkeyPatch, command: str, place: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    outcome = bncli(command, finished_run / "last.pt")
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == "bncli: error: interrupted"


def test_output_into_a_closed_pipe_ends_quietly(finished_run: Path) -> None:
    command = (
        f"{sys.executable} -m bncli inspect-stats {finished_run / 'last.pt'} --channels --json | head -c 1"
    )
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "{"
    assert done.stderr == ""


@pytest.mark.slow
def test_help_takes_at_most_a_quarter_of_importing_torch() -> None:
    import time

    def seconds(*arguments: str) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            times.append(time.perf_counter() - start)
        return min(times)

    for option in ("--help", "--version"):
        assert seconds("-m", "bncli", option) <= seconds("-c", "import torch") / 4


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("explain",),
        ("config", "cifar10"),
        pytest.param(("inspect-stats", "CHECKPOINT", "--json"), marks=pytest.mark.slow),  # imports torch
    ],
)
def test_a_full_disk_is_called_so(finished_run: Path, words: tuple[str, ...]) -> None:
    arguments = [str(finished_run / "last.pt") if word == "CHECKPOINT" else word for word in words]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bncli", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
        )
    expected = "bncli: error: the disk is full; free some space, or write to another one\n"
    assert (done.returncode, done.stderr) == (2, expected)


def test_what_the_operating_system_refuses_is_not_called_a_bug(
    bncli: Bncli, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr("bncli.checkpoints.load_checkpoint", fail)
    outcome = bncli("eval", finished_run / "last.pt")
    assert (outcome.code, outcome.err) == (2, "bncli: error: /some/file: Permission denied\n")


def test_tensors_that_do_not_fit_are_told_with_the_name_of_the_file(
    bncli: Bncli, finished_run: Path, tmp_path: Path
) -> None:
    content = torch.load(finished_run / "last.pt", weights_only=True)
    name = next(name for name in content["state_dict"] if name.endswith("running_mean"))
    content["state_dict"][name] = torch.zeros(3)
    save_as_if_whole(content, tmp_path / "file.pt")
    for command in ("eval", "predict"):
        outcome = bncli(command, tmp_path / "file.pt", *(["x.png"] if command == "predict" else []))
        assert outcome.code == 2
        expected = f"bncli: error: {tmp_path / 'file.pt'}: its tensors do not fit its configuration: {name}: "
        assert outcome.err.startswith(expected)
