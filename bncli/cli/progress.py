"""Progress on stderr: a bar on a terminal, plain lines otherwise."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bncli.cli.messages import note_emulation, one_line
from bncli.cli.tables.table import runtime_line
from bncli.training import EpochDone, Started, StepDone

HEADER = "  epoch  train loss  train acc  test loss  test acc  learning rate  images/s"


def _console() -> Console:
    return Console(stderr=True, highlight=False, markup=False)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


class DataReporter:
    """Shows how far a data set has been decoded: a bar, or one line when it is done."""

    def __init__(self) -> None:
        self._console = _console()
        self._bar: Progress | None = None
        self._shown = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Take note of `done` of `total`, and show it when it is time."""
        now = time.monotonic()
        if done < total and now - self._shown < 0.1:
            return
        self._shown = now
        if self._console.is_terminal:
            if self._bar is None:
                self._bar = _bar(self._console)
                self._bar.add_task(what, total=total, speed="")
                self._bar.start()
            self._bar.update(self._bar.task_ids[0], completed=done)
        if done >= total:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None
            self._console.print(f"{what}: {total:,}", soft_wrap=True)


class TrainReporter:
    """Shows a training run: a header, a bar within each epoch, a line for each epoch."""

    def __init__(self) -> None:
        self._console = _console()
        self._bar: Progress | None = None
        self._num_epochs = 0
        self._images = 0
        self._start = 0.0

    def __enter__(self) -> "TrainReporter":
        """Nothing is shown before `Started` comes."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the bar away, whatever happened."""
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Started | StepDone | EpochDone) -> None:
        """Show one event of `bncli.train`."""
        if isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, EpochDone):
            self._epoch(event)
        else:
            self._started(event)

    def _started(self, event: Started) -> None:
        setup = event.setup
        note_emulation(setup.runtime)
        self._num_epochs = setup.config.train.epochs
        self._line(
            f"Training on {len(setup.dataset.train):,} images of {setup.dataset.name}"
            f" ({runtime_line(setup.runtime.describe_training())}) into {one_line(str(event.run_dir))}"
        )
        if event.step > event.epoch * setup.plan.num_steps:
            self._line(
                f"Resuming after step {event.step:,} of {setup.num_steps:,}, in epoch {event.epoch + 1}"
            )
        elif event.epoch:
            self._line(f"Resuming after epoch {event.epoch} of {self._num_epochs}")
        self._line(HEADER)
        if self._console.is_terminal:
            self._bar = _bar(self._console)
            self._bar.add_task("", total=setup.num_steps, completed=event.step, speed="")
            self._bar.start()
        self._start = time.monotonic()

    def _step(self, event: StepDone) -> None:
        if self._bar is None:
            return
        self._images += event.num_images
        speed = self._images / max(time.monotonic() - self._start, 1e-9)
        self._bar.update(
            self._bar.task_ids[0],
            completed=event.step,
            description=f"epoch {event.epoch}/{self._num_epochs}",
            speed=f"{speed:,.0f} images/s",
        )

    def _epoch(self, event: EpochDone) -> None:
        metrics = event.metrics
        is_evaluated = metrics["test_accuracy"] is not None
        test_loss = f"{metrics['test_loss']:.4f}" if is_evaluated else "-"
        test_accuracy = f"{metrics['test_accuracy']:.2%}" if is_evaluated else "-"
        self._line(
            f"{metrics['epoch']:>7}  {metrics['train_loss']:>10.4f}  {metrics['train_accuracy']:>8.2%}"
            f"   {test_loss:>9}  {test_accuracy:>7}"
            f"   {metrics['learning_rate']:>13.4g}  {metrics['images_per_second']:>8,.0f}"
        )

    def _line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)
        sys.stderr.flush()
