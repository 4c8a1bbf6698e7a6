"""The output of `bncli train` and `train --dry-run`."""

import shlex
from typing import TYPE_CHECKING

from rich.console import Console

from bncli.cli.messages import one_line
from bncli.cli.tables.table import console_for_results, print_wrapped, runtime_line, show_lines, table_of
from bncli.config_file import dump_config
from bncli.network_name import runs_foreign_code
from bncli.training.run_dir import RECALIBRATED

if TYPE_CHECKING:
    from bncli.training import SetupDescription, TrainResult
    from bncli.training.agreement import Agreement


def show_dry_run(setup: "SetupDescription") -> None:
    """The resolved configuration, the network and the steps of a run that is not started."""
    console = console_for_results()
    console.print("# the resolved configuration", style="dim")
    console.print(dump_config(setup.config), soft_wrap=True)
    table = table_of("Network, for one image", "layer", "kind", "output", "parameters", "MFLOPs", left=2)
    for layer in setup.layers:
        shape = "x".join(map(str, layer.output_shape))
        flops = f"{layer.flops / 1e6:.2f}" if layer.flops else ""
        parameters = f"{layer.num_parameters:,}" if layer.num_parameters else ""
        table.add_row(layer.name, layer.kind, shape, parameters, flops)
    table.add_section()
    total = f"{setup.flops_per_image / 1e6:.2f}"
    table.add_row("in all", "", "", f"{setup.num_parameters:,}", total)
    console.print(table)
    console.print()
    left_out = setup.images_left_out_per_epoch
    size = setup.config.train.micro_batch_size
    lines = {
        "data": f"{setup.dataset}, {len(setup.class_names)} classes, {setup.num_train_images:,} training and"
        f" {setup.num_test_images:,} test images of {'x'.join(map(str, setup.image_shape))}",
        "pixel mean": ", ".join(f"{value:.4f}" for value in setup.normalization.mean),
        "pixel std": ", ".join(f"{value:.4f}" for value in setup.normalization.std),
        "runtime": runtime_line(setup.runtime),
        "steps": f"{setup.steps_per_epoch:,} an epoch, {setup.num_steps:,} in all",
        "batches": f"{setup.batch_size:,} images, the last of an epoch {setup.last_batch_size:,}"
        + (f"; {left_out:,} images are left out, others in each epoch" if left_out else ""),
        **({"at once": f"{size:,} images at most, normalised apart"} if size else {}),
        "trained": "nothing (--dry-run)",
    }
    show_lines(console, lines)


def show_training(result: "TrainResult") -> None:
    """What a finished run leaves behind."""
    averaged = "" if result.ema_epochs is None else ", averaged weights"
    accuracy = f"{result.test_accuracy:.2%} after epoch {result.epochs}{averaged}, in eval mode"
    if result.recalibration is not None:
        before = result.recalibration["before"]["accuracy"]
        accuracy += f", recalibrated ({before:.2%} before)"
    console = console_for_results()
    numbers = {
        "test accuracy": f"{accuracy} (best epoch {result.best_accuracy:.2%})",
        "time": f"{result.seconds:.1f} s, {result.images_per_second:,.0f} training images/s"
        " with evaluation and checkpoints",
    }
    show_lines(console, numbers)
    files = {"checkpoint": str(result.checkpoint), "best": str(result.best_checkpoint)}
    if result.checkpoint != result.last_checkpoint:
        files["last"] = f"{result.last_checkpoint}, to resume from"
    width = max(map(len, numbers))
    for key, value in files.items():
        _print_whole(console, f"{key:<{width}}  ", value)
    if result.num_batch_norm_layers == 0:
        print_wrapped(console, "The network has no BatchNorm layers: there is nothing to inspect in it.")
    if result.agreement is not None:
        _show_agreement(console, result.agreement, result)


def _show_agreement(console: Console, agreement: "Agreement", result: "TrainResult") -> None:
    """Whether running and batch statistics agree, and what to do if eval mode is behind."""
    if not agreement.eval_mode_is_behind:
        print_wrapped(console, agreement.verdict)
        return
    file = shlex.quote(str(result.checkpoint))
    named = f" --model {shlex.quote(result.model)}" if runs_foreign_code(result.model) else ""
    if agreement.recalibrated:  # then the training images are not what the test images are like
        print_wrapped(console, f"{agreement.verdict} To see why:")
        _print_whole(console, "  ", f"bncli eval {file} --gap{named}")
    else:
        print_wrapped(console, f"{agreement.verdict} To measure them anew:")
        new = shlex.quote(str(result.checkpoint.with_name(RECALIBRATED)))
        _print_whole(console, "  ", f"bncli recalibrate {file} -o {new}{named}")


def _print_whole(console: Console, start: str, text: str) -> None:
    """One line however long: with a path or a command that is to be copied."""
    console.print(f"{start}{one_line(text)}", soft_wrap=True)
