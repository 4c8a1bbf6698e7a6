"""The help page of every command, as plain text: options in groups, whole sentences, examples at the end.

Plain text, and no frames of Rich's: it answers in two thirds of the time, has the same look in a file, and
its examples can be copied. A parameter's group is its `rich_help_panel`. A docstring that ends in a
paragraph `Examples:` has these lines printed as they are, below the options.
"""

import inspect
import re
from itertools import pairwise
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from bncli.cli.unknown_command import instead_of

ARGUMENTS = "Arguments"
INPUT = "Input"
RUN = "Run"
MEASURED = "What is measured"
COMPUTED = "How it is computed"
CHECKED = "What is checked"
SHOWN = "What is shown"
DATA = "Data and device"
OUTPUT = "Output"
OTHER = "Other options"
GROUPS = (ARGUMENTS, INPUT, RUN, MEASURED, COMPUTED, CHECKED, SHOWN, DATA, OUTPUT, OTHER)  # in this order

_EXAMPLES = "\n\nExamples:\n"
_MAX_COLUMN = 22  # of option names; help texts begin here at the latest


class _Page:
    """What the pages of a command and of a group of commands have in common. Parameters are click's."""

    help: str | None
    epilog: str | None
    params: list[Any]

    def _take_examples(self) -> None:
        self.help, _, self.epilog = inspect.cleandoc(self.help or "").partition(_EXAMPLES)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raise what click raises; whichever it is, it knows the command that was typed."""
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc,no-any-return]
        except typer.TyperException as error:
            if getattr(error, "ctx", None) is None:
                error.ctx = ctx  # type: ignore[attr-defined]
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Like `[OPTIONS] CHECKPOINT [NAME]`, with no brackets inside of brackets."""
        arguments = [param for param in self.params if param.param_type_name == "argument"]
        pieces = [param.metavar if param.required else f"[{param.metavar}]" for param in arguments]
        return ["[OPTIONS]", *pieces]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments and options, each group below its name."""
        groups: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for param in self.get_params(ctx):  # type: ignore[attr-defined]
            record = param.get_help_record(ctx)
            if record is not None and param.param_type_name == "argument":
                # without its type, which Typer adds, and without "required", which the usage line says
                text = record[1].removesuffix("  [required]")
                groups[param.rich_help_panel or ARGUMENTS].append((param.metavar, text))
            elif record is not None:
                # a default that only the text knows, such as a key, and what Typer adds
                text = record[1].replace("]  [", "; ")
                text = re.sub(r"\bx>=(\d+)\]", r"at least \1]", text)
                text = re.sub(r"\b(\d+)<=x<=(\d+)\]", r"\1 to \2]", text)
                groups[param.rich_help_panel or OTHER].append((record[0], text))
        _write(groups, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The examples, never wrapped."""
        if self.epilog:
            formatter.write(_EXAMPLES[1:])
            formatter.write("".join(f"  {line}\n" for line in inspect.cleandoc(self.epilog).splitlines()))


class CommandPage(_Page, TyperCommand):
    """A command, with its page."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._take_examples()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raise for an empty word, which would stand for the current directory; of a key it is the top."""
        for before, word in pairwise(["", *args]):
            if word == "" and before != "--key" and not ctx.resilient_parsing:
                what = f"value of {before}" if before.startswith("-") else "argument"
                ctx.fail(f"an empty {what}; is a variable of the shell not set?")
        return super().parse_args(ctx, args)


class GroupPage(_Page, TyperGroup):
    """Commands below one name, with their page."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._take_examples()

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Options and a command, with what belongs to it."""
        return ["[OPTIONS]", "COMMAND [ARGS]..."]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The commands, each with the first sentence of its help; then the options."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            sentence = (command.help or "").split("\n\n")[0].replace("\n", " ").removesuffix(".")
            groups.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append(
                (name, sentence)
            )
        _write(groups, formatter)
        super().format_options(ctx, formatter)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that was typed; of an unknown one, the error names what may have been meant."""
        name = args[0]
        if name not in self.commands and not name.startswith("-") and not ctx.resilient_parsing:
            program = ctx.command_path
            hint = instead_of(name, program, dict(self.commands))
            ctx.fail(f"no command {name!r} in {program}; {hint}")
        return super().resolve_command(ctx, args)


def _write(groups: dict[str, list[tuple[str, str]]], formatter: Any) -> None:
    """Two columns; the second begins at one place in all groups."""
    names = [name for rows in groups.values() for name, _ in rows]
    column = max((len(name) for name in names if len(name) <= _MAX_COLUMN), default=_MAX_COLUMN)
    for group, rows in groups.items():
        if rows:
            with formatter.section(group):
                formatter.write_dl([(name.ljust(column), text) for name, text in rows], col_max=column)
