"""Export in one call: fold, write, open again, compare, and only then move the file to its place."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bncli.export.prepared import AS_ASKED, BY_DEFAULT, prepare
from bncli.export.proof import TOLERANCES, Proof, opened_again, prove
from bncli.export.record import ExportRecord
from bncli.export.write import format_of, move_into_place, require_writer, written
from bncli.inference.fold_error import FoldError, fold_errors

MAX_MEASURED = 16  # images on which the errors of single layers are measured, whose activations are kept


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what was found about it."""

    files: tuple[Path, ...]  # empty where it was not kept, as it does not compute what the network does
    num_bytes: int
    record: ExportRecord
    proof: Proof
    layers: tuple[FoldError, ...]  # that were folded

    @property
    def beyond_precision(self) -> tuple[FoldError, ...]:
        """Folded layers whose gain the precision cannot carry."""
        return tuple(layer for layer in self.layers if not layer.carries)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        record = self.record
        return {
            "files": [str(file) for file in self.files],
            "num_bytes": self.num_bytes,
            "precision": record.precision,
            "pixels": record.pixels,
            "image_shape": record.image_shape,
            "normalization": record.normalization,
            "class_names": record.class_names,
            "source": record.source,
            "statistics": record.statistics,
            "layers": [{**asdict(layer), "error_added": layer.added} for layer in self.layers],
            "kept": [{"name": name, "reason": reason} for name, reason in record.kept],
            "proof": {**asdict(self.proof), "holds": self.proof.holds},
        }


def export_network(
    model: nn.Module,
    path: Path,
    images: Tensor,
    record: ExportRecord,
    *,
    fold: bool | None,
    what: str,
    tolerance: float | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Exported:
    """Write `model`, in float32 on the CPU, to `path`, and prove it on `images` (N, ...), which are `what`.

    `record` says in which precision, and which pixels the file takes; what became of BatchNorm is added.
    With `fold` None BatchNorm is folded but for .safetensors. The model is left as it was. With `force` the
    file is kept whatever the proof says.

    Raises BncliError for a network that cannot be exported, or a file that cannot be opened again;
    MissingEngineError; OSError where the disk says no. Then nothing is written.
    """
    kind = format_of(path)
    require_writer(kind)
    precision: torch.dtype = getattr(torch, record.precision)
    # OpenVINO stores and computes a float32 graph in another precision by itself
    kept_for = BY_DEFAULT if fold is None else AS_ASKED
    fold = kind != "safetensors" if fold is None else fold
    folding = prepare(model, fold=fold, precision=precision, casts=kind != "openvino", kept_for=kept_for)
    record = replace(
        record,
        folded=tuple((layer.name, layer.into) for layer in folding.folded),
        kept=tuple((layer.name, layer.reason) for layer in folding.kept),
    )
    example = images[:1].expand(2, *images.shape[1:]).contiguous()
    with written(folding.model, example, path, record) as file:
        network, engine = opened_again(file, folding.model, threads)
        progress("images through both", 0, len(images))
        proof = prove(
            model,
            network,
            images,
            engine=engine,
            what=what,
            tolerance=TOLERANCES[record.precision] if tolerance is None else tolerance,
            tolerance_was_given=tolerance is not None,
            progress=lambda done: progress("images through both", done, len(images)),
        )
        del network  # an engine may keep its file open
        num_bytes = sum(one.stat().st_size for one in file.parent.iterdir())
        keeps = proof.holds or force
        files = move_into_place(file, path) if keeps else ()
    measured = folding.model
    if kind == "openvino" and record.precision != "float32":  # what it does to the graph, done by PyTorch
        measured = prepare(model, fold=fold, precision=precision).model
    layers = fold_errors(model, measured, folding.folded, images[:MAX_MEASURED], precision)
    return Exported(files, num_bytes, record, proof, layers)
