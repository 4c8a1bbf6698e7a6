"""What a report is about: everything that was read or measured, each part only where it exists."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bncli.batchnorm import Comparison, Finding, LayerStats
from bncli.report.measurement import Measurement
from bncli.training.convergence import Convergence


@dataclass(frozen=True)
class Fact:
    """One line of the table of sources at the end of the page."""

    name: str
    value: str


@dataclass(frozen=True)
class Training:
    """What a run recorded, epoch by epoch: the lines of its metrics.jsonl."""

    epochs: Sequence[dict[str, Any]]  # by epoch, each with the keys of a line
    planned_epochs: int | None  # None: not recorded


@dataclass(frozen=True)
class Content:
    """A report's subject; None or empty for what there is not."""

    title: str  # of the page: a file or a run
    sources: tuple[str, ...]  # as the user named them
    layers: Sequence[LayerStats]  # of the checkpoint; of two, the second's
    findings: Sequence[Finding]
    num_rules: int  # that were checked
    training: Training | None = None
    convergence: Convergence | None = None
    comparison: Comparison | None = None
    measurement: Measurement | None = None
    facts: tuple[Fact, ...] = ()  # the machine, versions, digests
    configuration: str | None = None  # YAML
    notes: tuple[str, ...] = ()  # what the file's format leaves open, a sentence each
    how_to_measure: str = ""  # the command that adds what needs the network's images
    how_to_repair: str = ""  # the command that saves running statistics measured anew

    def of_layers(self, names: Collection[str]) -> "Content":
        """The same of these layers only."""
        return replace(
            self,
            layers=[layer for layer in self.layers if layer.name in names],
            findings=[finding for finding in self.findings if finding.layer in names],
        )
