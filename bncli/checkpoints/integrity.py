"""Whether a checkpoint is what was saved, and whether its numbers are numbers."""

from dataclasses import dataclass
from pathlib import Path

from bncli.checkpoints.own import find_damaged_parts, load_content
from bncli.checkpoints.part_digests import is_plain, tensors_of


@dataclass(frozen=True)
class Integrity:
    """The state of one checkpoint file."""

    format_version: int
    digest_stored: bool  # False in files of format version 1, which cannot be verified
    digest_matches: bool | None  # None where none is stored
    damaged: tuple[str, ...]  # names of the parts whose digest does not match; names come from the file
    num_tensors: int
    non_finite: tuple[str, ...]  # names of the tensors that hold a NaN or an infinity
    epoch: int | None  # epochs finished; None where the file says nothing usable
    step: int | None  # training steps finished


def check_integrity(path: str | Path) -> Integrity:
    """Compare every part of a checkpoint with its stored SHA-256; nothing is trusted, nothing executed.

    Raises:
        CheckpointError: when the file is so damaged that it cannot be read, or no checkpoint of bncli.
    """
    content = load_content(path)
    damaged = find_damaged_parts(content)
    epoch, step = (content.get(key) for key in ("epoch", "step"))
    try:
        tensors = dict(tensors_of(content))
    except RecursionError:  # nested so deeply that it is none of ours; `damaged` says so
        tensors = {}
    return Integrity(
        format_version=content["format_version"],
        digest_stored=isinstance(content.get("digests"), dict),
        digest_matches=None if damaged is None else not damaged,
        damaged=damaged or (),
        num_tensors=len(tensors),
        non_finite=tuple(
            name for name, tensor in tensors.items() if is_plain(tensor) and not bool(tensor.isfinite().all())
        ),
        epoch=epoch if type(epoch) is int else None,
        step=step if type(step) is int else None,
    )
