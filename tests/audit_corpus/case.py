"""One file, or a pair of files, whose state is known because it was made here."""

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

Severities = frozenset[str]

ANY: Severities = frozenset({"error", "warning", "info"})
LOUD: Severities = frozenset({"error", "warning"})  # what a user sees without asking
ERROR: Severities = frozenset({"error"})

REFUSED = "refused"  # exit code 2, in the place of a rule's code


@dataclass(frozen=True)
class Case:
    """A checkpoint and what an audit may say of it.

    `expected` holds the codes of rules, or flags of a comparison, of which one at least has to be found; a
    healthy case has none. `facts` holds codes that are true of this network and no alarm, such as the counter
    of a layer that was frozen. Any other error or warning is a false alarm.
    """

    name: str  # kind/what: the files are named after it
    what: str  # in one line
    make: Callable[[Path], None]  # writes the files, whose stem it is given; see `paths`
    expected: frozenset[str] = frozenset()
    accepted: Severities = LOUD  # severities that count as naming it
    facts: frozenset[str] = frozenset()
    blind: str = ""  # why a miss is expected: mostly, because nothing in the file can tell
    parts: tuple[str, ...] = field(default=(".pt",))  # two: they are compared

    @property
    def healthy(self) -> bool:
        """Whether nothing is to be found."""
        return not self.expected

    def paths(self, folder: Path) -> list[Path]:
        """Its files."""
        return [folder / f"{self.name}{part}" for part in self.parts]

    def generate(self, folder: Path) -> None:
        """Make its files, unless they lie there."""
        if all(path.exists() for path in self.paths(folder)):
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as place:
            stem = Path(place) / self.name
            stem.parent.mkdir()
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torchvision, timm and fvcore about themselves
                self.make(stem)
            (folder / self.name).parent.mkdir(exist_ok=True)
            for path in stem.parent.glob(f"{stem.name}.*"):  # beside them, what was observed
                path.replace(folder / path.relative_to(place))


def file(stem: Path, part: str = ".pt") -> Path:
    """The path of one file of a case."""
    return stem.with_name(stem.name + part)
