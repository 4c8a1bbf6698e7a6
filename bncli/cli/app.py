"""The `bncli` program: its commands, and the one place where errors become messages and exit codes.

Exit codes: 0 done, 1 the check's answer is no, 2 cannot run, 130 interrupted, 143 terminated. Nothing here
imports torch, so that `--help` answers at once.
"""

import os
import sys
from typing import Annotated

import typer

import bncli
from bncli.cli.commands.bench import bench_app
from bncli.cli.commands.compare import compare_checkpoints
from bncli.cli.commands.config import show_config
from bncli.cli.commands.demo import demonstrate_repair
from bncli.cli.commands.doctor import diagnose
from bncli.cli.commands.eval import evaluate_checkpoint
from bncli.cli.commands.explain import explain_topic
from bncli.cli.commands.history import show_history
from bncli.cli.commands.inspect_stats import inspect_stats
from bncli.cli.commands.predict import predict_images
from bncli.cli.commands.recalibrate import recalibrate_into_file
from bncli.cli.commands.train import train_config
from bncli.cli.messages import one_line, print_error
from bncli.cli.openmp import let_threads_sleep
from bncli.errors import BncliError

app = typer.Typer(
    add_completion=False,
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
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Train, evaluate and inspect networks with BatchNorm.

    See what train mode and eval mode really do, and what the running statistics hold.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command("train")(train_config)
app.command("config")(show_config)
app.command("eval")(evaluate_checkpoint)
app.command("predict")(predict_images)
# more than one checkpoint is answered with the command that compares two
app.command("inspect-stats", context_settings={"allow_extra_args": True})(inspect_stats)
app.command("compare")(compare_checkpoints)
app.command("history")(show_history)
app.command("recalibrate")(recalibrate_into_file)
app.command("explain")(explain_topic)
app.command("doctor")(diagnose)
app.command("demo")(demonstrate_repair)
app.add_typer(bench_app, name="bench")


def main(arguments: list[str] | None = None, program: typer.Typer = app, name: str = "bncli") -> int:
    """Run one command and return its exit code; no exception and no traceback gets out.

    Another program than `bncli`, such as a benchmark in the tests, has the same messages and exit codes.
    """
    let_threads_sleep(os.environ)  # before a command imports torch
    try:
        # not app(...), which turns Ctrl-C into an exit code without a word
        command = typer.main.get_command(program)
        with command.make_context(name, sys.argv[1:] if arguments is None else arguments) as context:
            code = command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as done:
        return done.exit_code
    except BncliError as error:
        print_error(str(error))
        return error.exit_code
    except typer.TyperException as error:
        print_error(f"{error.format_message()} (see {name} --help)")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print_error("interrupted")
        return 130
    except BrokenPipeError:
        # the reader, `head` say, has what it wanted; keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        print_error("out of memory; try smaller batches or images")
        return 2
    except ImportError as error:
        print_error(f"{error} (install torch and torchvision versions that belong together)")
        return 2
    except Exception as error:
        if os.environ.get("BNCLI_TRACEBACK"):
            raise
        hint = "this is a bug in bncli or in what it calls; set BNCLI_TRACEBACK=1 to see where"
        print_error(f"{type(error).__name__}: {one_line(str(error))} ({hint})")
        return 2
    return code if isinstance(code, int) else 0
