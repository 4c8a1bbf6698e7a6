"""Population statistics layer by layer: a fixed point of eval mode.

Every layer is measured while all layers before it are in eval mode on their own new statistics, so what it
sees is what it will see from then on: over the same images, in eval mode, each layer's input has exactly
the recorded mean and (biased) variance, whatever the batch size and order, up to the rounding of its
buffers. That takes a pass per layer, made cheap in three ways: a pass stops at the last layer it measures,
layers that do not depend on each other share a pass, and a pass starts where an earlier one kept what the
layers before put out (`restart.py`, by the plan of `schedule.py`). With 5 MB for each image of 224x224 a
ResNet-50 is computed 1.2 times in its 49 passes, with 1.3 MB 4 times, and with nothing 25 times. Where all
is kept the images are read twice, the second time to see that they stay the same.

Layers without running statistics use batch statistics in eval mode too. What lies behind them depends on
the batches, whatever one does.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.batches import Batches, SameImages, check_repeatable, inputs_of
from bncli.batchnorm.layers import write_statistics
from bncli.batchnorm.modes import not_compiled, preserved_buffers
from bncli.batchnorm.population.exact.dataflow import trace_flow
from bncli.batchnorm.population.exact.restart import LostError, Restarts
from bncli.batchnorm.population.exact.stages import Stage, plan_stages
from bncli.batchnorm.population.merge_tree import BatchTree
from bncli.batchnorm.population.moments import Moments
from bncli.batchnorm.population.one_pass import WHOLE, MeasuredPass, PassProgress, Share, measure_pass
from bncli.errors import BncliError, DataError

MAX_REPEATS = 50  # of a pass over layers whose input depends on their own output


@dataclass(frozen=True, eq=False)
class ExactPasses:
    """What all passes together saw."""

    trees: dict[str, BatchTree]
    num_images: int
    num_batches: int
    stopped_early: bool
    num_passes: int
    forward_passes: float  # their cost: 1.0 is one forward pass over all the images


def measure_exact(
    model: nn.Module,
    batches: Batches,
    layers: Mapping[str, _BatchNorm],
    *,
    tolerance: float | None = None,
    share: Share = WHOLE,
    progress: PassProgress | None = None,
) -> ExactPasses:
    """Measure the layers one after the other; the model is left as it was.

    With a tolerance a first pass, of the method precise, decides how many batches all others take. Ranks
    that share the batches merge what they saw after every pass; each keeps outputs of its own batches.

    Raises DataError for batches that cannot be gone through again or that change from pass to pass, and
    BncliError where a layer used several times within a forward pass has no statistics that reproduce
    themselves.
    """
    check_repeatable(batches)
    ranks = share.ranks
    sample = next(inputs_of(batches), None)
    starts = ranks.gather(None if sample is None else share.first)
    with_images = [rank for rank, start in enumerate(starts) if start is not None]
    if not with_images:
        raise DataError("there is nothing to measure: the batches hold no images")
    leader = min(with_images, key=lambda rank: starts[rank] or 0)
    if None in starts:  # a rank without images follows with two of the leader's
        lent = ranks.gather(None if sample is None or ranks.rank != leader else sample[:2].cpu())[leader]
        sample = lent if sample is None else sample
    assert sample is not None
    with preserved_buffers(nn.ModuleList(layers.values())), not_compiled():
        flow = trace_flow(model, sample, layers)
        # in the same order on all ranks
        stages = ranks.gather(plan_stages(flow.calls) if ranks.rank == leader else ())[leader]
        with closing(Restarts(model, flow, stages, sample, num_ranks=ranks.size)) as restarts:
            passes = _Passes(model, batches, layers, stages, share, restarts, progress)
            if tolerance is not None:
                passes.limit(tolerance)
            trees: dict[str, BatchTree] = {}
            for number, stage in enumerate(stages):
                trees |= (passes.solve if stage.implicit else passes.measure)(number)
    seen = passes.last
    if seen is None:  # no layer saw an input
        raise BncliError("no BatchNorm layer to measure was reached by the first batch")
    return ExactPasses(
        trees,
        seen.num_images,
        seen.num_batches,
        passes.stopped_early,
        passes.num_passes,
        # computing the first batch once more to see what depends on what
        passes.cost + sum(ranks.gather(len(sample) - restarts.saved)) / seen.num_images,
    )


class _Passes:
    """All passes over the same images, each stage on the statistics that the stages before it left."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        layers: Mapping[str, _BatchNorm],
        stages: tuple[Stage, ...],
        share: Share,
        restarts: Restarts,
        progress: PassProgress | None,
    ) -> None:
        self.cost = 0.0  # had every pass started at the beginning
        self.num_passes = 0
        self.last: MeasuredPass | None = None
        self.stopped_early = False
        self._model = model
        self._batches = batches
        self._layers = layers
        self._stages = stages
        self._num_stages = len(stages)
        reached = {name for stage in stages for name in stage.layers}
        self._unreached = {name: layer for name, layer in layers.items() if name not in reached}
        self._share = share
        self._restarts = restarts
        self._progress = progress
        self._num_batches: int | None = None
        self._same_images = SameImages()
        self._num_reads = 0  # passes that read the images

    def limit(self, tolerance: float) -> None:
        """Find out how many batches bring every standard error below the tolerance, and take only those."""
        self._num_stages += 1
        done = self._run(self._layers, by_batch=True, until=None, cost=1.0, tolerance=tolerance)
        self._num_batches = done.num_batches
        self.stopped_early = done.stopped_early

    def measure(self, number: int) -> dict[str, BatchTree]:
        """Measure a stage in one pass and let its layers use the result from now on."""
        return self._measure(number, by_batch=False)

    def solve(self, number: int) -> dict[str, BatchTree]:
        """Repeat the pass until it finds the statistics that it started from.

        The first one normalises by batch statistics: from a stale start it might not get there.
        """
        stage = self._stages[number]
        self._num_stages += 1
        trees = self._measure(number, by_batch=True)
        for _ in range(MAX_REPEATS):
            before, trees = trees, self._measure(number, by_batch=False)
            pairs = ((self._layers[name], before[name].total(), trees[name].total()) for name in trees)
            if all(self._share.ranks.gather(all(_is_settled(*pair) for pair in pairs))):
                return trees
            self._num_stages += 1
        names = ", ".join(stage.layers)
        raise BncliError(
            f"{names}: applied again to its own output, and no statistics were found that reproduce"
            f" themselves in {MAX_REPEATS} passes; take the method precise, or leave it out"
        )

    def _measure(self, number: int, *, by_batch: bool) -> dict[str, BatchTree]:
        stage = self._stages[number]
        chosen = {name: self._layers[name] for name in stage.layers}
        self._restarts.aim(number, None if self.last is None else self.last.num_own_images)

        def run(*, replay: bool) -> MeasuredPass:
            return self._run(
                chosen | self._unreached,
                by_batch=by_batch,
                until=stage.layers,
                cost=stage.cost,
                forward=self._restarts.forward,
                replay=replay,
            )

        # the second pass reads the images again to see that they are the same
        if self._num_reads < 2 or not self._restarts.can_replay:
            done = run(replay=False)
        else:
            saved = self._restarts.saved
            try:
                done = run(replay=True)
            except LostError:
                self._restarts.saved = saved
                self._restarts.forget()
                done = run(replay=False)
        surprises = self._unreached.keys() & done.trees.keys()
        if surprises:
            raise BncliError(
                f"{min(surprises)} is reached by some batches and not by the first: the method exact needs"
                " the same layers in every batch; take the method precise"
            )
        for name, tree in done.trees.items():
            total = tree.total()
            write_statistics(chosen[name], total.mean, total.variance())
        return done.trees

    def _run(
        self,
        layers: Mapping[str, _BatchNorm],
        *,
        by_batch: bool,
        until: Mapping[str, int] | None,
        cost: float,
        forward: Callable[[Tensor], object] | None = None,
        tolerance: float | None = None,
        replay: bool = False,
    ) -> MeasuredPass:
        self.num_passes += 1
        if not replay:
            self._num_reads += 1
            self._restarts.reading()
        # a rank may read a batch more than are taken, where a tolerance ends the pass
        takes_all = tolerance is None or self._share.ranks.size == 1
        report = self._progress
        number, of = self.num_passes, max(self._num_stages, self.num_passes)
        done = measure_pass(
            self._model,
            self._restarts.replay if replay else self._batches,
            layers,
            by_batch=tuple(until or layers) if by_batch else (),
            until=until,
            num_batches=self._num_batches,
            tolerance=tolerance,
            share=self._share,
            same_images=self._same_images if takes_all and not replay else None,
            forward=forward,
            progress=None if report is None else lambda num_images: report(number, of, num_images),
        )
        self.cost += cost
        self.last = done
        return done


def _is_settled(layer: _BatchNorm, before: Moments, after: Moments) -> bool:
    """Whether two repeats agree, as far as the buffers between them can tell."""
    assert layer.running_var is not None
    tolerance = max(1e-10, 2 * torch.finfo(layer.running_var.dtype).eps)
    variance = after.variance() + layer.eps
    shifts = (after.mean - before.mean).abs() / torch.maximum(after.mean.abs(), variance.sqrt())
    ratios = (after.variance() - before.variance()).abs() / variance
    return float(torch.cat([shifts, ratios]).max()) <= tolerance
