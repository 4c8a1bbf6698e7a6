"""Two open checkpoints compared, with errors that name them."""

from bncli.batchnorm import Comparison, compare
from bncli.checkpoints.any_file import OpenCheckpoint
from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.errors import CheckpointError, IncomparableError


def compare_checkpoints(first: OpenCheckpoint, second: OpenCheckpoint) -> Comparison:
    """The second against the first.

    Raises IncomparableError where they have no layer in common, CheckpointError where one is damaged.
    """
    try:
        return compare(first, second)
    except IncomparableError as error:
        raise IncomparableError(f"{first.source}, {second.source}: {error}") from None
    except UnreadableFileError as error:
        raise CheckpointError(f"{first.source} or {second.source}: {error}") from None
