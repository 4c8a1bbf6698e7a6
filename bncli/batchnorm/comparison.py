"""What a comparison of two checkpoints found, and what it says of it."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from bncli.batchnorm.conversion import Relation
from bncli.batchnorm.distance import Divergence, DivergenceSummary
from bncli.batchnorm.moved_alone import MovedAlone
from bncli.wording import list_names, plural

STATISTICS_ALONE = "statistics_moved_weights_unchanged"  # flags of a layer, which `compare` explains
WEIGHTS_ALONE = "weights_moved_statistics_unchanged"
FROZEN_OR_STALE = (
    "Frozen BatchNorm keeps its statistics on purpose. Averaged, pruned, merged or quantised weights must"
    " not: their statistics are those of another network, and have to be measured again."
)
_IN_WORDS = {
    "bessel": "the same but for Bessel's correction",
    "swapped": "with mean and variance exchanged",
    "permuted": "with channels in another order",
    "different": "with other numbers",
    "unknown": "without statistics in one file",
}


@dataclass(frozen=True, eq=False)
class LayerComparison:
    """One BatchNorm layer in both checkpoints: the second's distance from the first."""

    name: str  # in the first
    name_in_second: str
    divergence: Divergence | None  # per channel; None where either has no running statistics
    summary: DivergenceSummary | None
    statistics_moved: bool  # running_mean or running_var
    weights_moved: bool  # its own weight or bias
    feeding_weights_moved: bool | None  # None: no tensor is known to feed it
    hyperparameters_changed: bool  # momentum or eps, where both know them
    num_batches_tracked: tuple[int | None, int | None]
    flags: tuple[str, ...]
    relation: Relation  # whether the second's numbers follow from the first's

    def to_dict(self, *, channels: bool = False) -> dict[str, Any]:
        """Its entry in the JSON document: plain values, and with `channels` tensors (C,)."""
        summary = self.summary or DivergenceSummary(num_incomparable=0)
        numbers = dict(vars(summary))
        num_incomparable = numbers.pop("num_incomparable")
        return {
            "name": self.name,
            "name_in_second": self.name_in_second,
            **numbers,
            "num_incomparable_channels": num_incomparable,
            "num_batches_tracked_first": self.num_batches_tracked[0],
            "num_batches_tracked_second": self.num_batches_tracked[1],
            "statistics_moved": self.statistics_moved,
            "weights_moved": self.weights_moved,
            "feeding_weights_moved": self.feeding_weights_moved,
            "hyperparameters_changed": self.hyperparameters_changed,
            "flags": self.flags,
            "relation": self.relation.kind,
            "values_per_channel": self.relation.values,
            **({"channels": self.divergence} if channels else {}),
        }

    def __str__(self) -> str:
        """One line."""
        flags = f" [{', '.join(self.flags)}]" if self.flags else ""
        return f"{self.name}: {self.summary or 'no running statistics in one or both'}{flags}"


@dataclass(frozen=True, eq=False)
class Comparison:
    """The second checkpoint against the first, in the first's order."""

    identical: bool  # every tensor in every bit, and every hyperparameter that both know
    matched_by: Literal["name", "order", "values"]
    frameworks: tuple[str, str]  # whose conventions the files follow
    only_batch_norm: bool  # other tensors were not compared, as between frameworks
    conversion: tuple[str, ...]  # what was done on the way from the first to the second, a sentence each
    order_known: bool  # whether a file keeps the order of registration
    layers: tuple[LayerComparison, ...]
    only_in_first: tuple[str, ...]  # BatchNorm layers
    only_in_second: tuple[str, ...]
    different_num_features: tuple[str, ...]  # layers of one name but other channels: not compared
    num_tensors: int  # of any kind, that both have
    num_tensors_changed: int  # of these
    num_tensors_only_in_first: int
    num_tensors_only_in_second: int
    moved_alone: MovedAlone | None  # what is known where statistics moved and no weight did; None: nowhere

    @property
    def verdict(self) -> str:
        """What differs, in a sentence or two."""
        if self.only_batch_norm:
            return self._verdict_across()
        if self.identical:
            return f"Identical: all {self.num_tensors:,} tensors agree in every bit."
        parts = [f"{self.num_tensors_changed:,} of {self.num_tensors:,} tensors differ"]
        lone = {"first": self.num_tensors_only_in_first, "second": self.num_tensors_only_in_second}
        parts += [f"{count:,} only in the {which} file" for which, count in lone.items() if count]
        if changed := [layer.name for layer in self.layers if layer.hyperparameters_changed]:
            parts.append(f"other momentum or eps in {list_names(changed)}")
        if {layer.relation.kind for layer in self.layers} in ({"rounded"}, {"rounded", "equal"}):
            largest = max(layer.relation.largest for layer in self.layers)
            same = f"All BatchNorm layers are the same within rounding (at most {largest:.2g})."
            return f"{'; '.join(parts)}. {same}"
        moved = [
            (layer.summary.kl, layer.name) for layer in self.layers if layer.summary and layer.summary.kl
        ]
        moved.sort(key=lambda item: -item[0])
        most = ", ".join(name for _, name in moved[:3])
        return f"{'; '.join(parts)}." + (
            f" The statistics that moved farthest are in {most}." if most else ""
        )

    def _verdict_across(self) -> str:
        """In words; other tensors than those of BatchNorm cannot be compared between frameworks."""
        kinds = Counter(layer.relation.kind for layer in self.layers)
        num_same = kinds.pop("equal", 0) + kinds.pop("rounded", 0)
        layers = plural(len(self.layers), "BatchNorm layer")
        differences = (layer.relation.largest for layer in self.layers if layer.relation.kind == "rounded")
        largest = max(differences, default=0.0)
        within = f"within rounding (at most {largest:.2g})" if largest else "in every bit"
        if self.identical:
            return f"The same in {' and '.join(dict.fromkeys(self.frameworks))}: {layers}, {within}."
        parts = [f"{num_same:,} the same {within}"] if num_same else []
        parts += [f"{count:,} {_IN_WORDS[kind]}" for kind, count in kinds.items()]
        lone = len(self.only_in_first) + len(self.only_in_second)
        parts += [f"{lone:,} without a counterpart"] if lone else []
        return f"{self.frameworks[0]} against {self.frameworks[1]}, {layers}: {', '.join(parts)}."

    def flagged(self, flag: str) -> list[str]:
        """The names of the layers with that flag."""
        return [layer.name for layer in self.layers if flag in layer.flags]

    def to_dict(self, *, channels: bool = False) -> dict[str, Any]:
        """The JSON document; with `channels` every layer's numbers per channel."""
        alone = self.moved_alone
        return {
            "identical": self.identical,
            "verdict": self.verdict,
            "matched_by": self.matched_by,
            "frameworks": self.frameworks,
            "only_batch_norm": self.only_batch_norm,
            "conversion": self.conversion,
            "order_known": self.order_known,
            "num_layers": len(self.layers),
            "layers": [layer.to_dict(channels=channels) for layer in self.layers],
            "moved_alone": None if alone is None else alone.to_dict(),
            "only_in_first": self.only_in_first,
            "only_in_second": self.only_in_second,
            "different_num_features": self.different_num_features,
            "num_tensors": self.num_tensors,
            "num_tensors_changed": self.num_tensors_changed,
            "num_tensors_only_in_first": self.num_tensors_only_in_first,
            "num_tensors_only_in_second": self.num_tensors_only_in_second,
        }

    def __str__(self) -> str:
        """The verdict, and a line for each flag that a layer has."""
        lines = [
            f"{plural(len(self.layers), 'BatchNorm layer')} compared, matched by {self.matched_by}.",
            self.verdict,
            *self.conversion,
        ]
        for flag, text in self.explanations().items():
            lines.append(f"{flag} ({list_names(self.flagged(flag))}): {text}")
        return "\n".join(lines)

    def explanations(self) -> dict[str, str]:
        """What each flag that was raised means here."""
        texts = {STATISTICS_ALONE: str(self.moved_alone), WEIGHTS_ALONE: FROZEN_OR_STALE}
        return {flag: text for flag, text in texts.items() if self.flagged(flag)}
