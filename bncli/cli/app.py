"""The `bncli` program: its commands, and the one place where errors become messages and exit codes.

Exit codes: 0 done, 1 the check's answer is no, 2 cannot run, 130 interrupted, 143 terminated. Nothing here
imports torch, so that `--help` answers at once.
"""

import errno
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any

import typer

import bncli
from bncli.cli.commands.average import average_into_file
from bncli.cli.commands.bench import bench_app
from bncli.cli.commands.compare import compare_checkpoints
from bncli.cli.commands.config import show_config
from bncli.cli.commands.convert import convert_checkpoint
from bncli.cli.commands.demo import demonstrate_repair
from bncli.cli.commands.doctor import diagnose
from bncli.cli.commands.eval import evaluate_checkpoint
from bncli.cli.commands.explain import explain_topic
from bncli.cli.commands.export import export_checkpoint
from bncli.cli.commands.history import show_history
from bncli.cli.commands.inspect_stats import inspect_stats
from bncli.cli.commands.predict import predict_images
from bncli.cli.commands.recalibrate import recalibrate_into_file
from bncli.cli.commands.report import write_report
from bncli.cli.commands.train import train_config
from bncli.cli.help_page import CommandPage, GroupPage
from bncli.cli.messages import print_error, usage_error
from bncli.cli.one_voice import OneVoice
from bncli.cli.openmp import shorten_waiting
from bncli.distributed.launch import launched
from bncli.errors import BncliError

app = typer.Typer(
    cls=GroupPage,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bncli {bncli.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, evaluate and inspect networks with BatchNorm.

    See what train mode and eval mode really do, and what the running statistics hold.

    Examples:
    bncli train --run-dir runs/first
    bncli eval runs/first/last.pt
    bncli explain train-and-eval
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


TRAIN, STATISTICS, LEARN, MACHINE = (
    "Train and evaluate",
    "Running statistics of a checkpoint",
    "Learn about BatchNorm",
    "This machine",
)
app.command("train", cls=CommandPage, rich_help_panel=TRAIN)(train_config)
app.command("config", cls=CommandPage, rich_help_panel=TRAIN)(show_config)
app.command("eval", cls=CommandPage, rich_help_panel=TRAIN)(evaluate_checkpoint)
app.command("export", cls=CommandPage, rich_help_panel=TRAIN)(export_checkpoint)
app.command("predict", cls=CommandPage, rich_help_panel=TRAIN)(predict_images)
app.command(
    "inspect-stats",
    cls=CommandPage,
    rich_help_panel=STATISTICS,
    # more than one checkpoint is answered with the command that compares two
    context_settings={"allow_extra_args": True},
)(inspect_stats)
app.command("compare", cls=CommandPage, rich_help_panel=STATISTICS)(compare_checkpoints)
app.command("convert", cls=CommandPage, rich_help_panel=STATISTICS)(convert_checkpoint)
app.command("history", cls=CommandPage, rich_help_panel=STATISTICS)(show_history)
app.command("report", cls=CommandPage, rich_help_panel=STATISTICS)(write_report)
app.command("recalibrate", cls=CommandPage, rich_help_panel=STATISTICS)(recalibrate_into_file)
app.command("average", cls=CommandPage, rich_help_panel=STATISTICS)(average_into_file)
app.command("explain", cls=CommandPage, rich_help_panel=LEARN)(explain_topic)
app.command("demo", cls=CommandPage, rich_help_panel=LEARN)(demonstrate_repair)
app.command("doctor", cls=CommandPage, rich_help_panel=MACHINE)(diagnose)
app.add_typer(bench_app, name="bench", rich_help_panel=MACHINE)


def main(arguments: list[str] | None = None, program: typer.Typer = app, name: str = "bncli") -> int:
    """Run one command and return its exit code; no exception and no traceback gets out.

    Another program than `bncli`, such as a benchmark in the tests, has the same messages and exit codes.
    """
    shorten_waiting(os.environ)  # before a command imports torch
    words = sys.argv[1:] if arguments is None else arguments
    try:
        launch = launched()
    except BncliError as error:
        return _fail(error, error.exit_code)
    if launch is None or launch.num_ranks == 1:
        return _guarded(lambda: _invoke(program, name, words), name, _fail)
    voice = OneVoice(launch, name)

    def invoke() -> int:
        voice.check(words)
        return _invoke(program, name, words)

    return voice.end(_guarded(invoke, name, voice.fail))


def _fail(error: str | BaseException, code: int) -> int:
    print_error("interrupted" if isinstance(error, KeyboardInterrupt | typer.Abort) else str(error))
    return code


def _guarded(run: Callable[[], int], name: str, fail: Callable[[str | BaseException, int], int]) -> int:
    """The exit code of `run`; what it raises is told by `fail`."""
    try:
        code = run()
        sys.stdout.flush()  # here, where what fails is told; at its end Python would only complain
    except BncliError as error:
        return fail(error, error.exit_code)
    except typer.TyperException as error:
        return fail(usage_error(error, name), 2)
    except (KeyboardInterrupt, typer.Abort) as error:
        return fail(error, 130)
    except BrokenPipeError:
        _drop_output()  # the reader, `head` say, has what it wanted
        return 0
    except Exception as error:
        if os.environ.get("BNCLI_TRACEBACK"):
            raise
        if isinstance(error, OSError):
            _drop_output()
        return fail(_unforeseen(error), 2)
    return code


def _invoke(program: typer.Typer, name: str, arguments: list[str]) -> int:
    """Run the command that the words name; its exit code."""
    # not app(...), which turns Ctrl-C into an exit code without a word
    command = _command_of(program)
    try:
        # the shell asks what the words could go on with
        if f"_{name}_COMPLETE".replace("-", "_").upper() in os.environ:
            os.environ["COLUMNS"] = "1000"  # each answer on one line, which Typer wraps otherwise
            command.main([], prog_name=name)
        with command.make_context(name, arguments) as context:
            code = command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except SystemExit as done:  # so ends what Typer does for completion
        return done.code if isinstance(done.code, int) else 0
    return code if isinstance(code, int) else 0


@cache
def _command_of(program: typer.Typer) -> Any:
    """Built once: from Python, `main` may be called many times."""
    return typer.main.get_command(program)


def _drop_output() -> None:
    """Keep Python from writing at its end what could not be written, and from complaining about it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch, which is not imported here, or a library of its found no memory on its device."""
    signs = ("DefaultCPUAllocator: can't allocate memory", "STATUS_ALLOC_FAILED", "MPS backend out of memory")
    return type(error).__name__ == "OutOfMemoryError" or any(sign in str(error) for sign in signs)


def _unforeseen(error: Exception) -> str:
    """What no command expects, and whether it is a bug: a full disk, say, is none."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return f"{where}the disk is full; free some space, or write to another one"
        return f"{where}{error.strerror}"
    if isinstance(error, MemoryError):
        return "out of memory; try smaller batches or images"
    if _is_out_of_memory(error):
        # PyTorch's first sentences say how much there is; what follows is for programmers
        known = ". ".join(" ".join(str(error).split()).split(". ")[:3]).rstrip(".")
        keys = "train.micro_batch_size, runtime.eval_batch_size"
        return f"out of memory; try smaller batches ({keys}) or images; PyTorch says: {known[:300]}"
    if isinstance(error, ImportError):
        return f"{error} (install torch and torchvision versions that belong together)"
    hint = "this is a bug in bncli or in what it calls; set BNCLI_TRACEBACK=1 to see where"
    return f"{type(error).__name__}: {error} ({hint})"
