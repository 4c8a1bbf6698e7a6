"""bncli's own checkpoints, by its own command line: healthy, recalibrated and ruined."""

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.audit_corpus.case import Case, file
from tests.audit_corpus.program import ruining, run

CONFIG = """
data: {name: synthetic, num_train: 2500, num_test: 200}
model: {widths: [8, 16, 32], blocks_per_stage: 1}
train: {epochs: 1, batch_size: 50, learning_rate: 0.1}  # 50 steps an epoch
runtime: {device: cpu, precision: float32, threads: 1, eval_batch_size: 100}
"""
LONG = "train.epochs=10"


@functools.cache
def trained(*overrides: str) -> dict[str, bytes]:
    """The checkpoints of one run, by file name."""
    with tempfile.TemporaryDirectory() as place:
        config = Path(place, "config.yaml")
        config.write_text(CONFIG)
        options = [part for override in overrides for part in ("--set", override)]
        run("train", config, "--run-dir", Path(place, "run"), *options)
        return {path.name: path.read_bytes() for path in Path(place, "run").glob("*.pt")}


@functools.cache
def ruins() -> dict[str, bytes]:
    """The accidents that bncli makes of a network to show them, by file name."""
    with tempfile.TemporaryDirectory() as place:
        intact = Path(place, "last.pt")
        intact.write_bytes(trained(LONG)["last.pt"])
        run(*ruining(), intact, "--num-images", 200, "--save-dir", Path(place, "ruined"))
        return {path.name: path.read_bytes() for path in Path(place, "ruined").glob("*.pt")}


def _run(overrides: tuple[str, ...], name: str, stem: Path) -> None:
    file(stem).write_bytes(trained(*overrides)[name])


def _recalibrate(method: str, stem: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        stale = Path(place, "last.pt")
        stale.write_bytes(trained()["last.pt"])
        run("recalibrate", stale, "-o", file(stem), "--method", method, "--num-images", 500)


def _ruin(name: str, stem: Path) -> None:
    file(stem).write_bytes(ruins()[name])


def _ruined_pair(name: str, stem: Path) -> None:
    file(stem, ".first.pt").write_bytes(trained(LONG)["last.pt"])
    file(stem, ".second.pt").write_bytes(ruins()[name])


def _case(
    name: str, what: str, *overrides: str, made: str = "last.pt", expected: frozenset[str] = frozenset()
) -> Case:
    return Case(name, what, functools.partial(_run, overrides, made), expected)


def own_cases() -> Iterator[Case]:
    """Healthy ones first."""
    yield _case("healthy/own-50", "bncli's own network, 50 steps")
    yield _case("healthy/own-500", "500 steps", LONG)
    yield _case("healthy/own-best", "500 steps, best.pt", LONG, made="best.pt")
    yield _case("healthy/own-momentum-0.4", "50 steps, momentum 0.4", "model.batch_norm.momentum=0.4")
    yield _case("healthy/own-momentum-null", "50 steps, momentum null", "model.batch_norm.momentum=null")
    yield _case(
        "healthy/own-whitened",
        "50 steps: whitening, Dirac, GELU, pooling first",
        "model.whitening=true",
        "model.init=dirac",
        "model.activation=gelu",
        "model.pool_before_norm=true",
    )
    yield _case(
        "healthy/own-averaged",
        "50 steps, averaged weights, measured",
        "train.ema_epochs=0.2",
    )
    yield _case(
        "healthy/own-recalibrated-by-train",
        "50 steps, train.recalibrate exact",
        "train.recalibrate=exact",
        made="recalibrated.pt",
    )
    yield from (
        Case(
            f"healthy/own-recalibrated-{method}",
            f"50 steps, bncli recalibrate --method {method}",
            functools.partial(_recalibrate, method),
        )
        for method in ("exact", "precise")
    )
    residue = frozenset({"BN002", "BN014"})
    yield _case(
        "ill/own-momentum-0.001",
        "50 steps, momentum 0.001, known: 0.95 of (0, 1) left",
        "model.batch_norm.momentum=0.001",
        expected=residue,
    )
    yield _case(
        "ill/own-momentum-0.99",
        "50 steps, momentum 0.99, known: one batch",
        "model.batch_norm.momentum=0.99",
        expected=frozenset({"BN015"}),
    )
    yield _case(
        "ill/own-no-running-stats",
        "50 steps, track_running_stats false",
        "model.batch_norm.track_running_stats=false",
        expected=frozenset({"BN013"}),
    )
    yield from _accidents(residue)


def _accidents(residue: frozenset[str]) -> Iterator[Case]:
    """Those of the README."""
    few = "the numbers of few images look like those of many: eval --gap tells, or a comparison"
    other = "statistics of other weights are statistics: eval --gap tells, or a comparison"
    for name, what, expected, blind in (
        ("short_average", "momentum 0.001, 20 steps from (0, 1)", residue, ""),
        ("batches_of_2", "statistics of 50 batches of 2 images", frozenset({"BN015"}), few),
        ("averaged_weights", "weights averaged, statistics from before", frozenset({"BN009"}), other),
        ("one_layer_reset", "one layer's statistics reset to 0 and 1", frozenset({"BN001"}), ""),
    ):
        yield Case(
            f"ill/readme-{name}",
            f"README: {what}",
            functools.partial(_ruin, f"{name}.pt"),
            expected,
            blind=blind,
        )
        flag = "weights_moved_statistics_unchanged"
        if name != "averaged_weights":
            flag = "statistics_moved_weights_unchanged"
        yield Case(
            f"ill/pair-readme-{name}",
            f"the intact network and it: {what}",
            functools.partial(_ruined_pair, f"{name}.pt"),
            frozenset({flag}),
            facts=frozenset({"hyperparameters_changed"} if name == "short_average" else ()),
            parts=(".first.pt", ".second.pt"),
        )
