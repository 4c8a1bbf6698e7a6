"""A line of `bncli doctor`'s answer, and those about a CHECKPOINT: is it whole, what is in a foreign one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bncli.errors import BncliError, CheckpointError, NoBatchNormError, OtherFormatError
from bncli.wording import plural


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Literal["ok", "warning", "problem"]
    found: str
    fix: str | None = None  # what to do about a warning or a problem


def checks_of_checkpoint(path: Path) -> list[Check]:
    """Whether every part of a checkpoint of bncli is what was saved."""
    from bncli.checkpoints import check_integrity, load_model

    try:
        found = check_integrity(path)
    except OtherFormatError:
        return [_of_foreign_checkpoint(path)]
    except CheckpointError as error:
        return [Check("file", "problem", str(error), "restore it from a copy, or train again")]
    progress = f"format {found.format_version}, epoch {found.epoch}, step {found.step}"
    checks = [Check("file", "ok", f"{path}: {progress}")]
    compared = f"of {plural(found.num_tensors, 'tensor')} and of all other values"
    if not found.digest_stored:
        checks.append(Check("SHA-256", "warning", "none stored", "made by an old bncli; cannot be verified"))
    elif found.damaged:
        damaged = f"differs from what was saved in {', '.join(found.damaged[:5])}"
        checks.append(Check("SHA-256", "problem", damaged, "restore it from a copy, or train again"))
    else:
        checks.append(Check("SHA-256", "ok", f"the stored ones {compared} match"))
    if found.non_finite:
        what = f"NaN or infinity in {', '.join(found.non_finite[:5])}"
        checks.append(Check("numbers", "problem", what, "the run diverged: train with a lower learning rate"))
    else:
        checks.append(
            Check("numbers", "ok", f"all numbers of {plural(found.num_tensors, 'tensor')} are finite")
        )
    try:
        load_model(path)
        checks.append(Check("network", "ok", "the tensors are those of the stored configuration"))
    except BncliError as error:
        checks.append(Check("network", "problem", str(error), "restore it from a copy, or train again"))
    return checks


def _of_foreign_checkpoint(path: Path) -> Check:
    """What lies in a file that bncli did not write; one that is damaged remains a problem."""
    from bncli.checkpoints import open_checkpoint

    fix = "inspect-stats reads its running statistics; eval and predict need a file of bncli train"
    try:
        with open_checkpoint(path) as found:
            place = f" under {found.key}" if found.key else ""
            tensors, layers = (
                plural(len(found.tensors), "tensor"),
                plural(len(found.layer_names), "BatchNorm layer"),
            )
            count = f"{tensors}{place}, {layers}"
            what = f"{path}: foreign ({found.kind}): {count}; no digest to compare with"
        return Check("file", "warning", what, fix)
    except NoBatchNormError as error:
        return Check("file", "warning", str(error), "eval and predict need a file of bncli train")
    except OtherFormatError as error:  # which says what to do
        return Check("file", "problem", str(error))
    except CheckpointError as error:
        return Check("file", "problem", str(error), "restore it from a copy")
