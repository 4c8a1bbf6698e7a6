"""What goes to stderr: one line each, with nothing in it that a terminal would obey."""

import difflib
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from bncli import wording
from bncli.usable_cpus import usable_cpus
from bncli.wording import expected_value

MAX_WIDTH = 80  # columns of a paragraph: longer lines are hard to read

if TYPE_CHECKING:
    from bncli.config import RuntimeConfig
    from bncli.distributed.launch import Launch
    from bncli.runtime import Runtime


one_line = wording.one_line  # here for all that is printed


def shorten(text: str, length: int) -> str:
    """The text on one line of at most `length` letters; of a longer one the end, which tells names apart."""
    text = one_line(text)
    return text if len(text) <= length else f"…{text[1 - length :]}"


def wrapped(text: str, width: int, *, first: str = "", break_words: bool = True) -> list[str]:
    """Lines of at most `width` columns; the second and later ones are indented as far as `first` is long.

    With `break_words=False` a longer word, such as a path, stays whole on a longer line.
    """
    indent = " " * len(first)
    width = max(width, len(first) + 10)  # a word a line, where there is hardly any room
    return textwrap.wrap(
        one_line(text),
        width,
        initial_indent=first,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=break_words,
    )


def print_error(message: str) -> None:
    """Say on stderr why the command ends."""
    print(f"bncli: error: {one_line(message)}", file=sys.stderr)


def usage_error(error: Any, program: str) -> str:
    """What is wrong with the words of a command, an exception of click's, and whose help says more."""
    text = error.format_message().replace("argument(s)", "arguments")
    problems = error.__cause__.errors() if hasattr(error.__cause__, "errors") else []
    if problems:  # pydantic's, by which Typer reads values since 0.27
        name = error.param.metavar if error.param.param_type_name == "argument" else error.param.opts[-1]
        problem = problems[0]
        found = repr(problem["input"]) if problem["type"].endswith("_parsing") else problem["input"]
        text = f"{name}: must be {expected_value(problem)}, not {found}"
        if problem["type"] == "value_error":  # Typer's own words
            text = f"{name}: {problem['msg'].removeprefix('Value error, ')}"
    elif hasattr(error, "possibilities"):
        near = difflib.get_close_matches(error.option_name, error.possibilities or (), n=1, cutoff=0.7)
        text = f"no such option: {error.option_name}" + (f"; did you mean {near[0]}?" if near else "")
    text = text[:1].lower() + text[1:].removesuffix(".")
    command = program if getattr(error, "ctx", None) is None else error.ctx.command_path
    return f"{text}{'' if text.endswith('?') else '.'} Try '{command} --help'"


def note_emulation(runtime: "Runtime") -> None:
    """Say that bfloat16 was asked for where it does not pay: a wait without a visible reason."""
    if runtime.emulates_bfloat16:
        print_note(
            f"warning: runtime.precision: bfloat16 may take many times as long as float32 on"
            f" {runtime.device}, which does not compute in it; use auto or float32"
        )


def note_idle_cpus(runtime: "Runtime", config: "RuntimeConfig", launch: "Launch | None") -> None:
    """Say that processes leave CPUs idle, as they do where torchrun chose their threads: one for each."""
    num_local = None if launch is None else launch.num_local
    if num_local is None or num_local == 1 or config.threads is not None or runtime.device.type != "cpu":
        return
    cpus = usable_cpus().count
    fitting = cpus // num_local
    if fitting > runtime.threads:
        print_note(
            f"{num_local} processes of {wording.plural(runtime.threads, 'thread')} use"
            f" {num_local * runtime.threads} of {cpus} CPUs; runtime.threads={fitting} uses all"
        )


def print_note(message: str) -> None:
    """Say something on stderr that is no result."""
    print(f"bncli: {one_line(message)}", file=sys.stderr)


def after_epoch(epoch: int | None) -> str:
    """What stands behind the name of a checkpoint that tells its epoch."""
    return "" if epoch is None else f", after epoch {epoch}"
