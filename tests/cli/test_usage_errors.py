"""A wrong word on the command line: one line that names it, what was meant, and the help of that command."""

import shlex

import pytest
import typer

from bncli.cli.app import main
from bncli.cli.help_page import CommandPage, GroupPage
from tests.conftest import Bncli


@pytest.mark.parametrize(
    ("typed", "problem", "command"),
    [
        ("evla", "no command 'evla' in bncli; did you mean bncli eval?", "bncli"),
        ("Eval x.pt", "no command 'Eval' in bncli; did you mean bncli eval?", "bncli"),
        ("inspect x.pt", "no command 'inspect' in bncli; did you mean bncli inspect-stats?", "bncli"),
        ("audit x.pt", "no command 'audit' in bncli; did you mean bncli inspect-stats?", "bncli"),
        ("repair x.pt", "no command 'repair' in bncli; did you mean bncli recalibrate?", "bncli"),
        ("help", "no command 'help' in bncli; did you mean bncli --help?", "bncli"),
        ("bench evla", "no command 'evla' in bncli bench; did you mean bncli bench eval?", "bncli bench"),
        ("bench zzz", "no command 'zzz' in bncli bench; there are train, eval.", "bncli bench"),
        ("bench", "missing command.", "bncli bench"),
        ("--verson", "no such option: --verson; did you mean --version?", "bncli"),
        ("eval x --numimages 3", "no such option: --numimages; did you mean --num-images?", "bncli eval"),
        ("eval x --epochs 3", "no such option: --epochs.", "bncli eval"),
        ("bench eval x --round 1", "no such option: --round; did you mean --rounds?", "bncli bench eval"),
        ("eval", "missing argument 'CHECKPOINT'.", "bncli eval"),
        ("predict x.pt", "missing argument 'IMAGE...'.", "bncli predict"),
        ("eval x y", "got unexpected extra arguments (y).", "bncli eval"),
        ("eval x --sweep", "option '--sweep' requires an argument.", "bncli eval"),
        ("eval x --gap=3", "option '--gap' does not take a value.", "bncli eval"),
        ("eval x --num-images many", "--num-images: must be a whole number, not 'many'.", "bncli eval"),
        ("eval x --num-images 1.5", "--num-images: must be a whole number, not '1.5'.", "bncli eval"),
        ("eval x --num-images 0", "--num-images: must be at least 1, not 0.", "bncli eval"),
        ("bench train --rounds 5000", "--rounds: must be at most 1,000, not 5000.", "bncli bench train"),
        ("recalibrate x --max-error x", "--max-error: must be a number, not 'x'.", "bncli recalibrate"),
        (
            "recalibrate x --method exct",
            "--method: 'exct' is not one of 'exact', 'precise', 'debias'.",
            "bncli recalibrate",
        ),
        ("inspect-stats ''", "an empty argument; is a variable of the shell not set?", "bncli inspect-stats"),
        ("eval ''", "an empty argument; is a variable of the shell not set?", "bncli eval"),
        ("predict x.pt ''", "an empty argument; is a variable of the shell not set?", "bncli predict"),
        (
            "train --run-dir ''",
            "an empty value of --run-dir; is a variable of the shell not set?",
            "bncli train",
        ),
    ],
)
def test_the_error_names_the_word_and_the_help_of_the_command(
    bncli: Bncli, typed: str, problem: str, command: str
) -> None:
    outcome = bncli(*shlex.split(typed))
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"bncli: error: {problem} Try '{command} --help'\n"
    # and that command is there
    assert bncli(*command.split()[1:], "--help").code == 0


def test_a_command_that_lies_below_another_is_named_with_it(capfd: pytest.CaptureFixture[str]) -> None:
    outer, inner = typer.Typer(cls=GroupPage), typer.Typer(cls=GroupPage)
    for name in ("mend", "break"):
        inner.command(name, cls=CommandPage)(lambda: None)
    outer.command("other", cls=CommandPage)(lambda: None)
    outer.add_typer(inner, name="workshop")
    assert main(["mend"], program=outer, name="tool") == 2
    found = "no command 'mend' in tool; it belongs to workshop: tool workshop mend. Try 'tool --help'"
    assert capfd.readouterr().err == f"bncli: error: {found}\n"


def test_every_word_of_other_programs_leads_to_a_command_that_is_there(bncli: Bncli) -> None:
    from bncli.cli.unknown_command import _OTHER_WORDS

    for word, meant in _OTHER_WORDS.items():
        line = bncli(word).err
        assert f"did you mean bncli {meant}?" in line
        assert bncli(*meant.split()[:1], "--help").code == 0
