"""The errors a user can cause, each with the exit code of the command that meets it.

A message stands on one line and says where, what was found, what was expected, and the fix if known.
The command line prints it and exits; library users catch `BncliError`.
"""


class BncliError(Exception):
    """Base of every error that bncli raises on purpose."""

    exit_code = 2


class ConfigError(BncliError):
    """A configuration file or an override that cannot be used; lists every problem at once."""

    def __init__(self, source: str, problems: list[str]) -> None:
        """`source` is a file, an option or a section; a problem starts with its dotted key, if it has one."""
        self.source = source
        self.problems = problems
        # the key of a section names it already: train.epochs, and not train: train.epochs
        named = all(problem.startswith(f"{source}.") for problem in problems)
        super().__init__(("" if named else f"{source}: ") + "; ".join(problems))


class DataError(BncliError):
    """A data set that is missing, incomplete or damaged."""


class NoTestSplitError(DataError):
    """Images to train on, and none to test with."""


class CheckpointError(BncliError):
    """A file that is no checkpoint, or a checkpoint that cannot be used."""


class OtherFormatError(CheckpointError):
    """A file or directory of another kind: nothing is known to be wrong with it, and the message names it."""


class ForeignNetworkError(OtherFormatError):
    """A checkpoint that another program than bncli saved: it does not describe its network."""


class NoBatchNormError(CheckpointError):
    """A checkpoint that is sound as far as it was read, and holds no BatchNorm layer."""


class NoClassifierError(BncliError):
    """A network that does not tell the classes of the images apart, where it is to be evaluated."""


class RunError(BncliError):
    """A run directory that cannot be created, written or resumed."""


class DeviceError(BncliError):
    """A device or precision that this machine does not have."""


class CompileError(BncliError):
    """A network that PyTorch cannot compile here."""


class IncomparableError(BncliError):
    """Two checkpoints that have no BatchNorm layer in common."""


class DivergedError(RunError):
    """A run that reached a number that is not finite."""


class StoppedError(BncliError):
    """A run that was asked to stop, and has saved its state; resuming it continues bit for bit."""

    exit_code = 130


class ProcessesError(BncliError):
    """Several processes that cannot work together as they were started."""


class PeerLostError(ProcessesError):
    """Another process of the launch died, ended or did not answer; which, is found out at the end."""
