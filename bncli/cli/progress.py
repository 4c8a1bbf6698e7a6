"""Progress on stderr: a bar on a terminal, plain lines otherwise."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bncli.busy_cpus import ShortageWatch
from bncli.cli.messages import note_emulation, note_idle_cpus, one_line, print_note
from bncli.cli.tables.table import runtime_line
from bncli.distributed.launch import launched
from bncli.training import EpochDone, Started, StepDone
from bncli.training.convergence import eval_lag
from bncli.wording import plural

# two lines for whole words in 80 columns
HEADER = """\
eval lag: how far running statistics are from the epoch's batch statistics
          train     train       test      test      eval  learning
epoch      loss  accuracy       loss  accuracy       lag      rate  images/s"""
PAUSE = 0.1  # seconds between two pictures of the bar
FIRST_LINE = 2.0  # seconds after which a part says how far it is, off a terminal; a shorter one is silent
PAUSE_OF_LINES = 10.0  # seconds between that and the next line, and so on


class _Display:
    """Lines on stderr, and below them, on a terminal alone, one bar that leaves nothing behind."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._bar: Progress | None = None
        self._shown = 0.0

    def line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)
        sys.stderr.flush()

    def show(self, text: str, done: int, total: int | None, speed: str = "") -> None:
        """How far it is; without a total only that it goes on. Most of many calls do nothing."""
        now = time.monotonic()
        if not self._console.is_terminal or now - self._shown < PAUSE:
            return
        self._shown = now
        amount = f"{done / total:.0%}" if total else f"{done:,}"
        if self._bar is None:
            self._bar = _bar(self._console)
            self._bar.add_task("", visible=False)
            self._bar.start()
        self._bar.update(
            self._bar.task_ids[0], total=total, completed=done, description=one_line(text), visible=True,
            amount=f"{amount:>4}", speed=speed, refresh=True,
        )  # fmt: skip

    def hide(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[amount]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        auto_refresh=False,  # without a thread, which a signal or a fork could meet
    )


class ProgressReporter:
    """Shows what is being done and how far it is: a bar on a terminal, which leaves nothing behind.

    Off a terminal a part that takes more than 2 seconds says in lines how far it is, one every 10 seconds,
    and when it is done. Leave the `with` block to finish, whatever happened; of a part that broke off nothing
    more is said.
    """

    def __init__(self) -> None:
        self._display = _Display()
        # now: while a bar is shown, what rich before version 15 puts in place of stderr denies it
        self._is_terminal = sys.stderr.isatty()
        self._what: str | None = None
        self._done = 0
        self._start = time.monotonic()  # of the part, whose first call comes when some of it is done
        self._next_line = 0.0

    def __enter__(self) -> Self:
        """Nothing is shown before the first call."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finish the last part."""
        self._finish(is_whole=kind is None)

    def __call__(self, what: str, done: int, total: int | None = None) -> None:
        """Take note of `done` of `total`; where the total is unknown, a part ends when another begins."""
        if what != self._what:
            self._finish(is_whole=True)
            self._next_line = self._start + FIRST_LINE
        self._what, self._done = what, done
        if total is not None and done >= total:
            self._finish(is_whole=True)
        elif self._is_terminal:
            self._display.show(what, done, total)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PAUSE_OF_LINES
            of = "" if total is None else f" of {total:,}"
            self._display.line(f"{one_line(what)}: {done:,}{of}")

    def note(self, message: str) -> None:
        """Say something between two parts."""
        self._finish(is_whole=True)
        print_note(message)

    def _finish(self, *, is_whole: bool) -> None:
        self._display.hide()
        if self._what is None:
            return
        # a line for each of many short passes would push the results out of sight
        took_long = time.monotonic() - self._start >= FIRST_LINE
        if is_whole and took_long and not self._is_terminal:
            self._display.line(f"{one_line(self._what)}: {self._done:,}")
        self._what = None
        self._start = time.monotonic()


class TrainReporter:
    """Shows a training run: its data, a header, a bar within each epoch, a line for each epoch."""

    def __init__(self) -> None:
        self.data = ProgressReporter()
        self._display = _Display()
        self._num_epochs = 0
        self._num_steps = 0
        self._images = 0
        self._start = 0.0
        self._watch: ShortageWatch | None = None

    def __enter__(self) -> Self:
        """Nothing is shown before `Started` comes."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the bar away, whatever happened."""
        self.data.__exit__(kind, error, traceback)
        self._display.hide()

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
        note_idle_cpus(setup.runtime, setup.config.runtime, launched())
        for note in setup.dataset.notes:
            print_note(note)
        self._num_epochs = setup.config.train.epochs
        self._display.line(
            f"Training on {plural(len(setup.dataset.train), 'image')} of {setup.dataset.name}"
            f" into {one_line(str(event.run_dir))}\n({runtime_line(setup.runtime.describe_training())})"
        )
        if event.step > event.epoch * setup.plan.num_steps:
            self._display.line(
                f"Resuming after step {event.step:,} of {setup.num_steps:,}, in epoch {event.epoch + 1}"
            )
        elif event.epoch:
            self._display.line(f"Resuming after epoch {event.epoch} of {self._num_epochs}")
        elsewhere = "so the run ends elsewhere than without the break, as if with another seed"
        if event.former_threads not in {None, setup.runtime.threads}:
            print_note(
                f"{plural(setup.runtime.threads, 'thread')}, {event.former_threads} before: they round"
                f" differently, {elsewhere}"
            )
        if event.changes:
            print_note(f"{'; '.join(event.changes)}: numbers round differently, {elsewhere}")
        if event.former_processes not in {None, setup.runtime.processes}:
            print_note(
                f"{plural(setup.runtime.processes, 'process', 'processes')}, {event.former_processes} before:"
                " sums round differently, and nothing else changes"
            )
        self._display.line(HEADER)
        # on a GPU its own threads compute; torch.compile has processes of its own at work
        if setup.runtime.device.type == "cpu" and not setup.runtime.compiles:
            self._watch = ShortageWatch(setup.runtime.threads)
        self._num_steps = setup.num_steps
        self._start = time.monotonic()

    def _step(self, event: StepDone) -> None:
        self._images += event.num_images
        shortage = self._watch.after_step() if self._watch else None
        if shortage is not None:
            self._display.hide()
            print_note(str(shortage))
        speed = self._images / max(time.monotonic() - self._start, 1e-9)
        self._display.show(
            f"epoch {event.epoch}/{self._num_epochs}", event.step, self._num_steps, f"{speed:,.0f} images/s"
        )

    def _epoch(self, event: EpochDone) -> None:
        metrics = event.metrics
        is_evaluated = metrics["test_accuracy"] is not None
        test_loss = f"{metrics['test_loss']:.4f}" if is_evaluated else "-"
        test_accuracy = f"{metrics['test_accuracy']:.2%}" if is_evaluated else "-"
        lag = eval_lag(metrics["layers"])
        self._display.line(
            f"{metrics['epoch']:>5}  {metrics['train_loss']:>8.4f}  {metrics['train_accuracy']:>8.2%}"
            f"   {test_loss:>8}  {test_accuracy:>8}  {'-' if lag is None else f'{lag:.3f}':>8}"
            f"  {metrics['learning_rate']:>8.3g}  {metrics['images_per_second']:>8,.0f}"
        )
