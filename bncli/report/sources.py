"""What a run or a checkpoint tells without computing anything: a report but for measurements."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bncli.batchnorm import RULES, Comparison, LayerStats, audit_layers
from bncli.checkpoints import (
    Checkpoint,
    OpenCheckpoint,
    compare_checkpoints,
    file_sha256,
    load_checkpoint,
    open_checkpoint,
)
from bncli.config_file import dump_config, load_config
from bncli.errors import CheckpointError, RunError
from bncli.hardware import describe_machine
from bncli.report.content import Content, Fact, Training
from bncli.training.convergence import METRICS, Convergence, read_convergence
from bncli.training.run_dir import RECALIBRATED
from bncli.wording import plural


@dataclass(frozen=True)
class Source:
    """A file to be read, and the run that it is of."""

    checkpoint: str | None  # a path or a URL; None: a run that has not saved one yet
    run_dir: Path | None  # None: a file that was named itself


def find_source(name: str) -> Source:
    """A run's folder stands for the checkpoint to use: the recalibrated one where there is one."""
    folder = Path(name)
    if not (folder.is_dir() and any((folder / file).is_file() for file in (METRICS, "config.yaml"))):
        return Source(name, None)
    for file in (RECALIBRATED, "last.pt"):
        if (folder / file).is_file():
            return Source(str(folder / file), folder)
    return Source(None, folder)


def checkpoint_of(name: str) -> Path:
    """The file that a source stands for.

    Raises CheckpointError for a run without one.
    """
    source = find_source(name)
    if source.checkpoint is None:
        raise CheckpointError(f"{name}: the run has saved no checkpoint yet")
    return Path(source.checkpoint)


def read_content(names: Sequence[str], key: str | None = None) -> Content:
    """Read a run or a checkpoint, or two to be compared; `key` as for `open_checkpoint`.

    Raises CheckpointError, RunError, ConfigError or IncomparableError.
    """
    sources = [find_source(name) for name in names]
    run_dir = sources[0].run_dir if len(sources) == 1 else None
    training = None if run_dir is None else read_training(run_dir)
    if run_dir is not None and training is None and sources[0].checkpoint is None:
        raise RunError(f"{run_dir}: none of its epochs has ended yet, so there is nothing to report")
    with ThreadPoolExecutor(max_workers=1) as pool:  # a large file is digested while its layers are judged
        digests = [pool.submit(_digest, source) for source in sources]
        paths = [None if len(sources) == 1 else str(checkpoint_of(name)) for name in names]
        paths = [path or source.checkpoint for path, source in zip(paths, sources, strict=True)]
        read = _read([path for path in paths if path is not None], key)
        findings = audit_layers(read.layers)
        owns = [_own(file) for file in read.files]
        facts = [
            fact
            for file, own, digest in zip(read.files, owns, digests, strict=False)
            for fact in _facts(file, own, digest)
        ]
    return Content(
        title=names[0] if len(names) == 1 else f"{names[0]} and {names[1]}",
        sources=tuple(names),
        layers=read.layers,
        findings=findings,
        num_rules=len(RULES),
        training=training,
        convergence=None if run_dir is None or training is None else _convergence(run_dir, training),
        comparison=read.comparison,
        facts=(*facts, Fact("report made on", _listed(describe_machine()))),
        configuration=None if run_dir is None else _configuration(run_dir),
        notes=read.notes,
        how_to_measure=_how_to_measure(names, read.files, is_own=any(owns)),
    )


@dataclass(frozen=True)
class _Read:
    layers: tuple[LayerStats, ...]
    comparison: Comparison | None
    files: tuple[OpenCheckpoint, ...]  # closed again
    notes: tuple[str, ...]


def _read(paths: Sequence[str], key: str | None) -> _Read:
    if not paths:
        return _Read((), None, (), ())
    with open_checkpoint(paths[0], key) as one:
        if len(paths) == 1:
            return _Read(one.layers(), None, (one,), one.notes)
        with open_checkpoint(paths[1], key) as two:
            notes = tuple(dict.fromkeys((*one.notes, *two.notes)))
            return _Read(two.layers(), compare_checkpoints(one, two), (one, two), notes)


def _digest(source: Source) -> str | None:
    """None for what is no file on this machine."""
    path = None if source.checkpoint is None else Path(source.checkpoint)
    return file_sha256(path) if path is not None and path.is_file() else None


def _own(file: OpenCheckpoint) -> Checkpoint | None:
    """What more a checkpoint of `bncli train` tells; None of any other file."""
    if file.key != "state_dict" or not Path(file.source).is_file():
        return None
    try:
        return load_checkpoint(file.source)
    except CheckpointError:
        return None


def _facts(file: OpenCheckpoint, own: Checkpoint | None, digest: "Future[str | None]") -> list[Fact]:
    """What is known of one file."""
    layers = plural(len(file.layer_names), "BatchNorm layer")
    where = f", under {file.key}" if file.key else ""
    facts = [
        Fact("checkpoint", file.source),
        Fact("format", f"{file.kind}, {plural(len(file.tensors), 'tensor')}{where}, {layers}"),
    ]
    sha256 = digest.result()
    if sha256 is not None:
        facts.append(Fact("SHA-256", sha256))
    if own is not None:
        facts += [
            Fact(
                "trained", f"{plural(own.epoch, 'epoch')}, {plural(own.step, 'step')}, {own.seconds:,.1f} s"
            ),
            Fact("data", f"{own.config.data.name}, SHA-256 {own.data_digest}"),
            Fact("computed with", _listed(own.runtime)),
            Fact("trained on", _listed(own.machine)),
        ]
    return facts


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _configuration(run_dir: Path) -> str | None:
    path = run_dir / "config.yaml"
    return dump_config(load_config(path)) if path.is_file() else None


def _how_to_measure(names: Sequence[str], files: Sequence[OpenCheckpoint], *, is_own: bool) -> str:
    """Nothing for two files, for a run without one, and for those of other frameworks, whose names differ."""
    if len(files) != 1 or not files[0].kind.startswith(("torch", "safetensors")):
        return ""
    command = f"bncli report {shlex.quote(names[0])} --measure"
    return command if is_own else f"{command} --model NAME --data-root FOLDER"


def read_training(run_dir: Path) -> Training | None:
    """The epochs that have ended, each once; None where there is none.

    A line that was torn by a crash, or that is none of ours, is left out.
    """
    path = run_dir / METRICS
    try:
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from None
    epochs: dict[int, dict[str, Any]] = {}
    for line in lines:
        try:
            found = json.loads(line)
            epochs[int(found["epoch"])] = {
                name: value for name, value in found.items() if name == "layers" or _is_number(value)
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    if not epochs:
        return None
    return Training([epochs[epoch] for epoch in sorted(epochs)], _planned(run_dir))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _planned(run_dir: Path) -> int | None:
    path = run_dir / "config.yaml"
    return load_config(path).train.epochs if path.is_file() else None


def _convergence(run_dir: Path, training: Training) -> Convergence | None:
    """None for a network without BatchNorm."""
    return read_convergence(run_dir) if any(epoch.get("layers") for epoch in training.epochs) else None
