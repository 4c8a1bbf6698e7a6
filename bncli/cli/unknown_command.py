"""What somebody may have meant who typed a command that does not exist."""

import difflib
from typing import Any

# what the commands do, in the words of other programs
_OTHER_WORDS = {
    "help": "--help",
    "version": "--version",
    "fit": "train",
    "evaluate": "eval",
    "test": "eval",
    "validate": "eval",
    "certify": "eval",
    "classify": "predict",
    "infer": "predict",
    "stats": "inspect-stats",
    "show": "inspect-stats",
    "audit": "inspect-stats",
    "check": "inspect-stats",
    "diff": "compare",
    "calibrate": "recalibrate",
    "repair": "recalibrate",
    "fix": "recalibrate",
    "verify": "recalibrate --verify",
    "topics": "explain",
    "rules": "explain findings",
    "configs": "config",
}


def instead_of(name: str, program: str, commands: dict[str, Any]) -> str:
    """A sentence with what to type instead of `program` and `name`; `commands` are those of click by name."""
    below = [group for group, command in commands.items() if name in getattr(command, "commands", {})]
    if below:
        return f"it belongs to {below[0]}: {program} {below[0]} {name}"
    words = {word: meant for word, meant in _OTHER_WORDS.items() if _is_there(meant, commands)}
    near = difflib.get_close_matches(name.lower(), [*commands, *words], n=1, cutoff=0.6)
    if near:
        return f"did you mean {program} {words.get(near[0], near[0])}?"
    return f"there are {', '.join(commands)}"


def _is_there(meant: str, commands: dict[str, Any]) -> bool:
    return meant.startswith("-") or meant.split(maxsplit=1)[0] in commands
