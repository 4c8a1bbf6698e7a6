"""The output of `bncli config`."""

from collections.abc import Mapping, Sequence

from bncli.cli.messages import MAX_WIDTH, wrapped
from bncli.config_file import dump_value
from bncli.explained_config import ExplainedKey

_NEXT = """
bncli train NAME              train it; without a NAME it is the quickstart
bncli config NAME > my.yaml   write it to a file, with the meaning of every key
bncli config KEY              what a key means, such as train.momentum
"""


def builtin_configs_text(known: Sequence[Mapping[str, str]]) -> str:
    """A paragraph for each built-in configuration, beside its name; then what to type next."""
    indent = max(len(each["name"]) for each in known) + 2
    lines = []
    for each in known:
        lines += wrapped(each["what"], MAX_WIDTH, first=each["name"].ljust(indent))
        lines += wrapped(each["time"], MAX_WIDTH, first=" " * indent)
    return "\n".join(lines) + "\n" + _NEXT


def explained_keys_text(keys: Sequence[ExplainedKey]) -> str:
    """A paragraph for each key: its name, what is allowed, the default, and the meaning."""
    paragraphs = []
    for key in keys:
        kind = key.data_set or key.network
        where = f" ({kind})" if kind else ""
        default = (
            "" if key.default is None and "null" not in key.allowed else f"; default {_shown(key.default)}"
        )
        lines = [
            *wrapped(f"{key.key}{where}: {key.allowed}{default}", MAX_WIDTH),
            *wrapped(key.meaning, MAX_WIDTH, first="  "),
        ]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs) + "\n"


def _shown(default: object) -> str:
    """As the bounds beside it are: thousands have commas."""
    return f"{default:,}" if type(default) is int else dump_value(default)
