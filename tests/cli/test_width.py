"""Every command's output fits 80 columns off a terminal; a wider terminal is used."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len

import bncli as package
from bncli.cli.tables.layer_table import fold_name
from bncli.torchvision_compat import import_torchvision
from tests.conftest import Bncli

PREFIXES = {
    "resnet18": "",
    "lightning": "model.backbone.",
    "long": "resnet.encoder.stages.with.a.name.that.leaves.the.numbers.no.room.beside.it.",
    "without-dots": "x" * 90 + ".",
}


LONG_NAME = f"{'a-file-name-' * 6}.pt"


def ruined_state() -> dict[str, torch.Tensor]:
    """A ResNet-18 with statistics as after training, and in one layer each what a rule finds."""
    state = import_torchvision().models.resnet18(weights=None).state_dict()
    names = [key.removesuffix(".running_var") for key in state if key.endswith(".running_var")]
    for name in names:
        state[f"{name}.running_mean"] = torch.randn_like(state[f"{name}.running_mean"])
        state[f"{name}.running_var"] = torch.rand_like(state[f"{name}.running_var"]) * 3 + 0.01
        state[f"{name}.num_batches_tracked"] = torch.tensor(12_500)
    state[f"{names[1]}.running_var"][3] = torch.nan
    state[f"{names[2]}.running_var"][:4] = -1e-3
    state[f"{names[3]}.running_var"].fill_(1)
    state[f"{names[3]}.running_mean"].zero_()
    state[f"{names[4]}.num_batches_tracked"] = torch.tensor(20)
    state[f"{names[5]}.running_var"].fill_(1e-9)
    state[f"{names[6]}.weight"][7] = 0
    state[f"{names[7]}.running_mean"][3] = -3.3e8
    state[f"{names[8]}.num_batches_tracked"] = torch.tensor(12_500.5)
    state[f"{names[9]}.running_var"][0], state[f"{names[9]}.weight"][0] = 1e-5, 5.0
    state[f"{names[10]}.bias"][2], state[f"{names[10]}.weight"][2] = -9.0, 0.1
    return state


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ResNet-18's state dict under several names."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    state = ruined_state()
    small = {key: value for key, value in state.items() if value.ndim < 2}  # the rules read no others
    for kind, prefix in PREFIXES.items():
        torch.save({prefix + key: value for key, value in small.items()}, folder / f"{kind}.pt")
    other = {key: value * 1.5 if "mean" in key else value for key, value in small.items()}
    torch.save({PREFIXES["long"] + key: value for key, value in other.items()}, folder / "other.pt")
    return folder


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch, finished_run: Path, files: Path) -> Iterator[Path]:
    """A folder in which short relative paths lead to a run and the files; no width is asked for."""
    with tempfile.TemporaryDirectory() as name:  # a short path: paths are not broken
        folder = Path(name)
        (folder / "run").symlink_to(finished_run)
        (folder / LONG_NAME).symlink_to(files / "resnet18.pt")
        for file in files.iterdir():
            (folder / file.name).symlink_to(file)
        monkeypatch.chdir(folder)
        monkeypatch.delenv("COLUMNS", raising=False)
        yield folder


COMMANDS = [
    f"inspect-stats {LONG_NAME}",
    f"compare {LONG_NAME} {LONG_NAME}",
    "inspect-stats run/last.pt --all",
    "inspect-stats run/last.pt --channels",
    *(f"inspect-stats {kind}.pt{all_}" for kind in PREFIXES for all_ in ("", " --all")),
    "inspect-stats long.pt --channels --layer *.bn1",
    "inspect-stats --explain all",
    "compare run/best.pt run/last.pt",
    "compare long.pt other.pt",
    "compare long.pt other.pt --channels --layer *.layer1.*",
    "compare resnet18.pt other.pt",
    "recalibrate run/last.pt -o new.pt --verify",
    "recalibrate run/last.pt -o fast.pt --method debias",
    "recalibrate run/last.pt --verify",
    "history run",
    "report run -o page.html --measure --num-images 40",
    "doctor",
    "doctor run/last.pt",
    "bench eval run/last.pt --rounds 1 --calls 2 --starts 0",
    "explain",
    "explain momentum",
    "config",
    "config quickstart",
    "config train.momentum",
    "train run/config.yaml --dry-run",
    "train run/config.yaml --run-dir again",
    "predict run/last.pt image.png --top 10",
]


def offending(text: str) -> list[str]:
    """Lines that are too long, that end with a blank, or that hold an escape code."""
    return [
        line for line in text.splitlines()
        if cell_len(line) > 80 or line != line.rstrip() or "\x1b" in line
    ]  # fmt: skip


@pytest.mark.parametrize(
    "command",
    # a start of each way is a process that imports torch
    [*COMMANDS, pytest.param("bench eval run/last.pt --rounds 1 --starts 1", marks=pytest.mark.slow)],
)
def test_no_line_of_a_result_is_longer_than_80_columns(bncli: Bncli, anywhere: Path, command: str) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32), (200, 30, 90)).save("image.png")
    outcome = bncli(*command.split())
    assert outcome.code in (0, 1)
    assert outcome.out
    assert offending(outcome.out) == []


@pytest.mark.slow
def test_no_line_of_a_timed_training_step_is_longer_than_80_columns(bncli: Bncli, anywhere: Path) -> None:
    outcome = bncli(*f"bench train {anywhere}/run/config.yaml --rounds 1 --steps 1 --workers 0".split())
    assert outcome.code == 0
    assert offending(outcome.out) == []


def test_columns_sets_the_width_of_a_file(
    bncli: Bncli, anywhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = bncli("inspect-stats", "resnet18.pt").out
    monkeypatch.setenv("COLUMNS", "140")
    wide = bncli("inspect-stats", "resnet18.pt").out
    assert "\nlayer2.0.downsample.1\n" in narrow
    assert re.search(r"^layer2\.0\.downsample\.1 +128 ", wide, flags=re.MULTILINE)


ON_TERMINALS = """
import struct, sys, termios
from fcntl import ioctl
from bncli.cli.app import main
for columns in (80, 140):
    ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 60, columns, 0, 0))
    for file in ("resnet18.pt", "lightning.pt"):
        main(["inspect-stats", file])
        print("--end--", flush=True)
"""


@pytest.fixture(scope="module")
def screens(files: Path) -> dict[tuple[int, str], list[str]]:
    """The lines of inspect-stats by the columns of the terminal and by file."""
    leader, follower = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    environment |= {"TERM": "xterm", "PYTHONPATH": str(Path(package.__file__).parents[1]), "PYTHONUTF8": "1"}
    program = [sys.executable, "-c", ON_TERMINALS]
    streams = {"stdin": follower, "stdout": follower, "cwd": files, "env": environment}
    with subprocess.Popen(program, **streams) as process:
        os.close(follower)
        written = b""
        with contextlib.suppress(OSError):  # the other end was closed
            while part := os.read(leader, 65536):
                written += part
        assert process.wait() == 0
    os.close(leader)
    texts = written.decode().replace("\r\n", "\n").split("--end--\n")
    keys = [(columns, file) for columns in (80, 140) for file in ("resnet18", "lightning")]
    assert "\x1b[1;31m" in texts[0]  # it is a terminal: what has an error is red
    return {
        key: re.sub("\x1b\\[[0-9;]*m", "", text).splitlines()
        for key, text in zip(keys, texts[:-1], strict=True)
    }


@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("file", ["resnet18", "lightning"])
def test_a_terminal_s_width_is_kept(
    screens: dict[tuple[int, str], list[str]], columns: int, file: str
) -> None:
    assert max(map(len, screens[columns, file])) <= columns


@pytest.mark.parametrize("file", ["resnet18", "lightning"])
def test_a_name_is_whole_on_any_terminal_and_beside_its_numbers_on_a_wide_one(
    screens: dict[tuple[int, str], list[str]], file: str
) -> None:
    prefix = PREFIXES[file].removeprefix("model.")  # what wraps a network is taken off
    name = f"{prefix}layer2.0.downsample.1"
    narrow, wide = (screens[columns, file] for columns in (80, 140))
    assert narrow.count(name) == 1
    below = narrow[narrow.index(name) + 1]
    (row,) = [line for line in wide if line.startswith(f"{name} ")]
    assert below.startswith("  ")
    assert row.removeprefix(name).split() == below.split()
    assert row.split()[1:3] == ["128", "-3.3e+08"]


@pytest.mark.parametrize("width", [10, 30, 80])
@pytest.mark.parametrize(
    "name", ["a.b.c", "resnet.encoder.stages.3.layers.0.layer.2.normalization", "x" * 95, ""]
)
def test_a_name_is_broken_after_dots_where_it_has_any(name: str, width: int) -> None:
    lines = fold_name(name, width)
    assert "".join(lines) == name
    assert all(len(line) <= width for line in lines)
    if max(map(len, name.split("."))) < width:
        assert all(line.endswith(".") for line in lines[:-1])
        assert all(len(line + next_line.split(".")[0]) >= width for line, next_line in pairwise(lines))
