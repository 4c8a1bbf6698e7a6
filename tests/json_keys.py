"""Writes `.readme/json.md`: the keys of every JSON document, read from what the commands print.

python -m tests.json_keys > .readme/json.md
"""

import contextlib
import io
import json
import shlex
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from bncli.cli.app import main

SMALL_BATCHES = "--set data.num_train=300 --set train.batch_size=50"
SMALL = f"{SMALL_BATCHES} --set data.num_test=60 --set train.epochs=1 --set runtime.threads=1"
CONVNET = "--set model.widths=[4,8] --set model.blocks_per_stage=1"
IMAGE = "photo.png"

# the first are run for their files; those with a title are described
COMMANDS: tuple[tuple[str | None, str], ...] = (
    ("bncli train", f"train quickstart --run-dir run {SMALL} {CONVNET} --set train.recalibrate=precise"),
    ("bncli train --dry-run", f"train quickstart --dry-run {SMALL} {CONVNET}"),
    (
        "bncli eval",
        "eval run/last.pt --num-images 8 --batch-sizes 2,4 --sweep 2,4 --gap --num-calibration-images 50",
    ),
    ("bncli eval --tta flip", "eval run/last.pt --num-images 8 --batch-sizes 2 --tta flip"),
    ("bncli predict", f"predict run/last.pt {IMAGE}"),
    ("bncli export", "export run/last.pt -o run/net.pt2 --num-images 8"),
    ("bncli eval EXPORTED", "eval run/net.pt2 --num-images 8 --batch-sizes 2"),
    ("bncli predict EXPORTED", f"predict run/net.pt2 {IMAGE}"),
    (
        "bncli inspect-stats",
        "inspect-stats run/last.pt --threshold gain=0.001",
    ),
    ("bncli inspect-stats --channels", "inspect-stats run/last.pt --channels"),
    ("bncli inspect-stats --explain", "inspect-stats --explain BN002"),
    ("bncli recalibrate", "recalibrate run/last.pt -o run/new.pt --num-images 100 --verify"),
    ("bncli recalibrate --verify", "recalibrate run/last.pt --verify --num-images 100"),
    ("bncli compare", "compare run/last.pt run/new.pt"),
    ("bncli average", "average run/last.pt run/new.pt -o run/average.pt --num-images 100"),
    ("bncli compare --ranks", "compare --ranks run/last.pt run/new.pt"),
    ("bncli convert", "convert run/last.pt -o run/layers.npz"),
    ("bncli history", "history run"),
    ("bncli report", "report run"),
    ("bncli config", "config"),
    ("bncli config KEY", "config train.momentum"),
    ("bncli explain", "explain"),
    ("bncli explain TOPIC", "explain momentum"),
    ("bncli doctor", "doctor"),
    ("bncli demo", "demo run/last.pt --num-images 50"),
    (
        "bncli bench train",
        f"bench train quickstart {CONVNET} {SMALL_BATCHES} --rounds 1 --steps 1 --layers",
    ),
    ("bncli bench eval", "bench eval run/last.pt --rounds 1 --starts 0"),
)
# whose keys are names that the data, the machine or a rule give
BY_NAME = ("per_class_accuracy", "values", "thresholds")
WIDTH = 110

HEAD = """# JSON documents

`--json` on every command prints one JSON document on stdout. Here are its keys, as the commands print
them (made by `python -m tests.json_keys`, and tested). A line holds the keys of one object; an indented
line those of the object under its key, and `[]` says that the key holds a list of such objects.
Accuracies and shares are fractions from 0 to 1, times are in seconds, losses are mean cross-entropies. A
number that is not finite is `null`. Keys may be added in later versions.
"""


def documents(folder: Path) -> Iterator[tuple[str, Any]]:
    """Each title with its document, computed in a folder that is the current one and empty."""
    Image.new("RGB", (32, 32), (200, 30, 30)).save(folder / IMAGE)
    for title, command in COMMANDS:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as err:
            code = main([*shlex.split(command), "--json"])
        assert code in {0, 1}, (command, err.getvalue())
        yield title, json.loads(out.getvalue())


def merged(objects: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """All keys of some objects, each with the first value that is not null."""
    found: dict[str, Any] = {}
    for one in objects:
        found |= {name: value for name, value in one.items() if found.get(name) is None}
    return found


def key_lines(value: Mapping[str, Any], margin: str = "") -> list[str]:
    """The keys of an object on one line, and below it, indented, those of the objects in it."""
    titles: dict[tuple[str, ...], list[str]] = {}
    for key, item in value.items():
        objects = [one for one in (item if isinstance(item, list) else [item]) if isinstance(one, dict)]
        if not objects:
            continue
        is_by_name = key in BY_NAME and isinstance(item, dict)
        inner = ["a number for each name"] if is_by_name else key_lines(merged(objects), margin + "  ")
        titles.setdefault(tuple(inner), []).append(key + "[]" * isinstance(item, list))
    lines = [margin + ", ".join(value)]
    for (first, *others), keys in titles.items():
        lines += [f"{margin}  {', '.join(keys)}: {first.strip()}", *others]
    return lines


def folded(line: str) -> str:
    """A line of at most `WIDTH` characters, or several."""
    margin = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(line.strip(), WIDTH, initial_indent=margin, subsequent_indent=margin + "    ")


def page(folder: Path) -> str:
    """The whole page."""
    sections = [
        f"## `{title}`\n\n```text\n" + "\n".join(map(folded, key_lines(document))) + "\n```\n"
        for title, document in documents(folder)
    ]
    return "\n".join([HEAD, *sections])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        text = page(Path(name))
    sys.stdout.write(text)
