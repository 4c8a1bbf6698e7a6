"""The training loop, from the first step to the last checkpoint.

The order of the images and their augmentation are functions of (seed, epoch, step), and so is the
learning rate and what the network itself draws. Nothing else is random, so a run that was interrupted
continues bit for bit.
"""

import contextlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bncli.batchnorm import batch_norm_layers
from bncli.checkpoints import Checkpoint, save_checkpoint
from bncli.config import Config, TrainConfig
from bncli.data import Progress as DataProgress
from bncli.distributed import LastWords, processes, rank_device
from bncli.errors import CompileError, DivergedError, PeerLostError, StoppedError
from bncli.evaluation import Evaluation
from bncli.runtime import resolve_device, short_compile_errors
from bncli.training.bad_numbers import IN_THE_UPDATE, find_origin
from bncli.training.event_log import check_log, logged
from bncli.training.last_good_step import LastGoodStep
from bncli.training.losses import loss_and_logits
from bncli.training.open_run import open_run
from bncli.training.optimizer import learning_rate_at
from bncli.training.run import Run
from bncli.training.run_dir import RECALIBRATED, append_metrics, epoch_file, kept_epochs, writing
from bncli.training.setup import Setup

if TYPE_CHECKING:
    from bncli.training.agreement import Agreement


@dataclass(frozen=True)
class Started:
    """Reported once, when everything is decided and the first step is next."""

    setup: Setup
    run_dir: Path
    epoch: int  # epochs finished already: 0, or more in a resumed run
    step: int  # steps finished already
    former_threads: int | None  # of the run that is resumed; None: of a new one, or not recorded
    former_processes: int | None = None  # of the run that is resumed; None: of a new one
    changes: tuple[str, ...] = ()  # in words, what the run that is resumed computed otherwise


@dataclass(frozen=True)
class StepDone:
    """Reported after every training step."""

    epoch: int  # from 1
    step: int  # of the whole run, from 1
    num_images: int


@dataclass(frozen=True)
class EpochDone:
    """Reported after every epoch, once its metrics and its checkpoint, if one is due, are on the disk."""

    metrics: dict[str, Any]  # the line of metrics.jsonl


Report = Callable[[Started | StepDone | EpochDone], None]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run has to show."""

    run_dir: Path
    checkpoint: Path  # the one to use: last.pt, or recalibrated.pt with train.recalibrate
    last_checkpoint: Path  # to resume from
    best_checkpoint: Path
    test_accuracy: float  # of `checkpoint`, as a fraction
    test_loss: float  # nats
    best_accuracy: float
    epochs: int
    seconds: float  # of all epochs: training, evaluation and checkpoints
    images_per_second: float  # of all epochs, evaluation and checkpoints included
    ema_epochs: float | None  # over which the weights of `checkpoint` are averaged; None: they are not
    recalibration: dict[str, Any] | None  # how `checkpoint` was made from last.pt; None: it is last.pt
    model: str  # the network's name
    num_batch_norm_layers: int
    agreement: "Agreement | None"  # of its running statistics with batch statistics; None: it has none

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        agreement = None if self.agreement is None else self.agreement.to_dict()
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"agreement": agreement}


def train(
    config: Config,
    run_dir: str | Path,
    *,
    resume: bool = False,
    report: Report = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    data_progress: DataProgress | None = None,
    words: LastWords | None = None,
) -> TrainResult:
    """Train the configured network and write its checkpoints into `run_dir`.

    With `resume` the run in `run_dir` continues after its last saved step; on a CPU it ends with the same
    bits as an uninterrupted one. `stop` is asked after every step and before every test batch; when it
    says True, or on KeyboardInterrupt, the last step taken is saved first. (A KeyboardInterrupt while
    `stop` says True already is not kept waiting: the checkpoint before stays the last.)

    `words` are those of a launch of several processes, all of which call this: they share the parts of every
    batch, and rank 0 alone writes. They stop when one of them is told to.

    Raises:
        StoppedError: when `stop` said so.
        CompileError: when `runtime.compile` is set and PyTorch cannot do so; the steps before are saved.
        DivergedError: when a loss, gradient, weight or running statistic stops being finite; saved is the
            last good step.
        PeerLostError: when another process of the launch is gone; the steps before are saved.
        torch.OutOfMemoryError: when a device has no room for a step; the steps before are saved.
        BncliError: on a configuration, data or directory that cannot be used.
    """
    run_dir = Path(run_dir)
    check_log(config.train.log)
    with contextlib.ExitStack() as stack:
        team = None
        if words is not None:
            name = rank_device(config.runtime.device, words.launch)
            facts = {"configuration": config.model_dump(mode="json")}
            team = stack.enter_context(
                processes(words, resolve_device(name), timeout=config.runtime.timeout, facts=facts)
            )
        run = stack.enter_context(
            open_run(run_dir, config, resume=resume, data_progress=data_progress, processes=team, stop=stop)
        )
        log = config.train.log if run.setup.is_main else ()
        tell = stack.enter_context(logged(report, log, run_dir))
        former = (run.former_threads, run.former_processes, run.changes)
        tell(Started(run.setup, run_dir, run.epoch, run.step, *former))
        last_good = LastGoodStep(run)
        try:
            _train_to_the_end(run, last_good, run_dir, tell, stop)
            return _result_of(run, run_dir, stop)
        except (StoppedError, CompileError) as error:
            _save_last_step(run, last_good, run_dir)
            # Ctrl-C on a terminal also ends the C++ compiler that is at work, and that comes first
            if isinstance(error, CompileError) and not stop():
                raise
            raise StoppedError(
                f"stopped after step {run.step} of {run.setup.num_steps}; continue with:"
                f" bncli train --resume {shlex.quote(str(run_dir))}"
            ) from None
        except (DivergedError, PeerLostError, torch.OutOfMemoryError):
            _save_last_step(run, last_good, run_dir)
            raise
        except KeyboardInterrupt:
            if not stop():
                _save_last_step(run, last_good, run_dir)
            raise


def _train_to_the_end(
    run: Run, last_good: LastGoodStep, run_dir: Path, report: Report, stop: Callable[[], bool]
) -> None:
    """All epochs that are left, from the running one's next step on."""
    config = run.setup.config.train
    while run.epoch < config.epochs:
        run.model.train()
        for images, labels in run.batches():
            batch_size = run.share_in(labels).batch_size
            take_step(run, last_good, images, labels)
            if run.team is not None and run.running_epoch.num_steps == 1:
                run.team.check_buffers()
            report(StepDone(run.epoch + 1, run.step, batch_size))
            if config.checkpoint_unit == "steps" and run.step % config.checkpoint_every == 0:
                check_steps(run, last_good)
                if run.setup.is_main:
                    _save_last(run, run.checkpoint(run.model, None), run_dir)
            if run.stops(stop):
                check_steps(run, last_good)
                raise StoppedError
        check_steps(run, last_good)
        metrics = _training_metrics(run)
        is_due = _ends_interval(run.epoch + 1, config.evaluate_every, config)
        network = run.network_to_use(stop) if is_due else run.model
        evaluation = run.evaluate(network, stop) if is_due else None

        run.is_whole = False
        is_best = run.end_epoch(evaluation)
        metrics |= {
            "test_loss": evaluation.loss if evaluation else None,
            "test_accuracy": evaluation.accuracy if evaluation else None,
            "seconds": run.seconds,
        }
        # last.pt comes last: it says that the epoch is done, so everything else of it must be on the disk
        if run.setup.is_main:
            _write_epoch(run, network, evaluation, metrics, run_dir, is_best=is_best)
        run.is_whole = True
        report(EpochDone(metrics))
    # here the weights are final
    if config.recalibrate != "none":
        # most of bncli.batchnorm and bncli.evaluation: imported in this case only
        from bncli.training.recalibrated import save_recalibrated

        save_recalibrated(run, run_dir, config.recalibrate, stop)


def _write_epoch(
    run: Run,
    network: nn.Module,
    evaluation: Evaluation | None,
    metrics: dict[str, Any],
    run_dir: Path,
    *,
    is_best: bool,
) -> None:
    """An epoch's metrics and, where they are due, its checkpoints."""
    config = run.setup.config.train
    with writing(run_dir):
        append_metrics(run_dir / "metrics.jsonl", metrics)
        last = run.checkpoint(network, evaluation)
        if is_best:
            save_checkpoint(last.finished(), run_dir / "best.pt")
        if evaluation is not None and config.keep_epochs:
            _keep_epoch(last, run_dir, config.keep_epochs)
    every = config.checkpoint_every if config.checkpoint_unit == "epochs" else 1
    if _ends_interval(run.epoch, every, config):
        _save_last(run, last, run_dir)


def take_step(run: Run, last_good: LastGoodStep, images: Tensor, labels: Tensor) -> None:
    """One training step and its place in the epoch's sums, or nothing; on a CPU its numbers are checked.

    Raises:
        DivergedError: see `check_steps`.
    """
    _take_unchecked(run, last_good, images, labels)
    if last_good.num_unchecked == run.setup.steps_between_checks:
        check_steps(run, last_good)


def check_steps(run: Run, last_good: LastGoodStep) -> None:
    """Make sure that every step taken so far ended in finite numbers: what waits for the device.

    Raises:
        DivergedError: with the step, the learning rate and the layer, where one did not; the run is as it
            was before that step.
    """
    num_steps = run.step
    if last_good.holds():
        return
    last_good.go_back()
    for images, labels in run.batches():  # the same steps once more, each looked at
        _take_unchecked(run, last_good, images, labels)
        if not last_good.holds():
            last_good.go_back()
            origin = find_origin(run, images, labels)
            if run.setup.processes is not None:  # the first part that begins it is somewhere
                found = run.setup.processes.gather_values(origin)
                origin = next((each for each in found if each != IN_THE_UPDATE), origin)
            raise DivergedError(
                f"not a finite number in step {run.step + 1} (epoch {run.epoch + 1}), at a learning rate"
                f" of {run.learning_rate:.3g}: {origin}; step {run.step}, the last"
                " good one, is saved; start again with a lower train.learning_rate"
            )
        if run.step == num_steps:  # on a GPU sums may round otherwise, and all end well this time
            return


def _take_unchecked(run: Run, last_good: LastGoodStep, images: Tensor, labels: Tensor) -> None:
    batch_size = run.share_in(labels).batch_size
    with last_good.or_back(), short_compile_errors():
        loss, num_correct = training_step(run, images, labels)
        # not in the next step: its images would be laid between them, and its activations around
        run.optimizer.zero_grad()
        run.running_epoch.add(loss, num_correct, batch_size)


def _save_last(run: Run, checkpoint: Checkpoint, run_dir: Path) -> None:
    with writing(run_dir):
        save_checkpoint(checkpoint, run_dir / "last.pt")
    run.saved_step = run.step


def _keep_epoch(checkpoint: Checkpoint, run_dir: Path, number: int) -> None:
    """Save the network of this epoch, and remove the oldest of those that are more than `number`."""
    save_checkpoint(checkpoint.finished(), run_dir / epoch_file(checkpoint.epoch))
    for path in kept_epochs(run_dir)[:-number]:
        path.unlink()


def _save_last_step(run: Run, last_good: LastGoodStep, run_dir: Path) -> None:
    """Save a run that ends before its time, unless its last good step is saved already."""
    if not run.is_whole or not run.setup.is_main:
        return
    if not last_good.holds():
        last_good.go_back()
    if run.saved_step != run.step:
        _save_last(run, run.checkpoint(run.model, None), run_dir)


def _ends_interval(epoch: int, every: int, config: TrainConfig) -> bool:
    return epoch % every == 0 or epoch == config.epochs


def _training_metrics(run: Run) -> dict[str, Any]:
    """The training half of the epoch's line in metrics.jsonl."""
    run.tick()
    epoch = run.running_epoch
    return {
        "epoch": run.epoch + 1,
        "step": run.step,
        "learning_rate": learning_rate_at(run.step - 1, run.setup.num_steps, run.setup.config.train),
        "images_per_second": epoch.num_images / epoch.seconds,
        **epoch.metrics(),
    }


def _result_of(run: Run, run_dir: Path, stop: Callable[[], bool]) -> TrainResult:
    from bncli.training.agreement import measure_agreement  # needed here only

    recalibrated = run.setup.config.train.recalibrate != "none"
    path = run_dir / (RECALIBRATED if recalibrated else "last.pt")
    last = run.setup.loaded(path)
    # every configuration has at least one epoch, and the end of the last one is evaluated
    assert last.test_accuracy is not None and last.test_loss is not None
    return TrainResult(
        run_dir=run_dir,
        checkpoint=path,
        last_checkpoint=run_dir / "last.pt",
        best_checkpoint=run_dir / "best.pt",
        test_accuracy=last.test_accuracy,
        test_loss=last.test_loss,
        best_accuracy=last.best_accuracy,
        epochs=last.epoch,
        seconds=last.seconds,
        images_per_second=last.epoch * run.setup.plan.num_images_per_epoch / last.seconds,
        ema_epochs=run.setup.config.train.ema_epochs,
        recalibration=last.recalibration if recalibrated else None,
        model=run.setup.config.model.name,
        num_batch_norm_layers=len(batch_norm_layers(run.model)),
        agreement=measure_agreement(last, run.setup, stop),
    )


def training_step(run: Run, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One step of gradient descent on uint8 images (B, 3, H, W) with labels (B,): the own share of a batch.

    Returns the whole batch's mean loss in nats and its number of correct predictions, both on the device.
    """
    config, runtime, team = run.setup.config.train, run.setup.runtime, run.team
    share, observe = run.share_in(labels), run.running_epoch.statistics.observe
    labels = labels.to(runtime.device)
    run.set_learning_rate(run.step)
    losses, hits = [], []
    run.optimizer.zero_grad()
    parts = zip(images.split(share.sizes), labels.split(share.sizes), strict=True)
    for number, (part, part_labels) in enumerate(parts, share.first):
        with (
            run.network_randomness(number),
            run.synchronized(),
            contextlib.nullcontext()
            if team is None
            else team.part(is_last=number + 1 == share.first + len(share.sizes)),
        ):
            with runtime.autocast():
                outputs = run.forward(runtime.place(part))
            loss, logits = loss_and_logits(outputs, part_labels, config.label_smoothing)
            loss = loss * (len(part_labels) / share.batch_size)  # its share of the batch's mean
            loss.backward()
        if team is None:
            observe()
        losses.append(loss.detach())
        hits.append((logits.detach().argmax(1) == part_labels).sum())
    if team is not None:
        losses, hits = team.finish(share, losses, hits, observe)
    run.optimizer.step()
    run.step += 1
    run.settle_memory()
    if run.average is not None:
        run.average.add(run.step)
    return torch.stack(losses).sum(), torch.stack(hits).sum()
