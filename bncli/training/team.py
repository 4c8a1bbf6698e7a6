"""A training step of several processes: each computes its parts of the batch, and all take the same step.

Gradients are summed over all parts with PyTorch's all-reduce, which begins while the rest of the backward
pass is still computed. Running statistics cannot be summed: each part pulls them a little its own way, in the
order of the parts. With momentum m, n batches of one part make r into (1 - m)^n r + c, where c is what they
make of statistics that begin at 0. So a part begins at 0, its n and c go to all processes, and each of them
applies the parts of all, one after the other: they keep the same bits, and one process would have got the
same to rounding.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.batchnorm import batch_norm_layers
from bncli.batchnorm.bits import as_bytes
from bncli.distributed import Processes
from bncli.errors import ConfigError
from bncli.training.share import Share, split_evenly

_BUCKET_BYTES = 4 * 2**20  # of gradients that are sent at once: few waits, and an early beginning


class Team:
    """The processes that take a run's steps together."""

    def __init__(
        self, processes: Processes, model: nn.Module, stop: Callable[[], bool], *, sync: bool = False
    ) -> None:
        """`sync`: BatchNorm layers exchange their statistics themselves, and are alike in all processes."""
        self.processes = processes
        self.sync = sync
        self.stops = False  # whether some process was asked to stop, before the last step ended: alike in all
        self._stop = stop
        self._model = model
        self._gradients = _Gradients(processes, model)
        self._statistics = _Statistics(model) if not sync else None

    def check_buffers(self) -> None:
        """Make sure that no buffer is another one in some process: those of other layers are not exchanged.

        Raises:
            ConfigError: one is.
        """
        followed = {id(buffer) for _, layer in batch_norm_layers(self._model) for buffer in layer.buffers()}
        others = {name: b for name, b in self._model.named_buffers() if id(b) not in followed}
        if not others:  # alike in all processes, which have one network
            return
        digests = [hashlib.sha256(as_bytes(b).cpu().numpy().data).digest() for b in others.values()]
        everyone = self.processes.gather_values(digests)
        for name, *found in zip(others, *everyone, strict=True):
            if len(set(found)) > 1:
                problem = f"its buffer {name} changes in training, and is no running statistic of BatchNorm"
                raise ConfigError("model", [f"{problem}: train it in one process"])

    @contextlib.contextmanager
    def part(self, *, is_last: bool) -> Iterator[None]:
        """The context of the forward and backward pass of each own part; the last sends gradients."""
        self._gradients.is_last = is_last
        if self._statistics is not None:
            self._statistics.begin_part()
        yield
        if self._statistics is not None:
            self._statistics.end_part()

    def finish(
        self, share: Share, losses: list[Tensor], hits: list[Tensor], observe: Callable[[], None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Make gradients and running statistics the whole batch's; `observe` is called after each part.

        Returns losses and hits of the parts of all processes, in their order.

        Raises:
            PeerLostError: another process died or did not answer; then the step is half done.
        """
        present, dtype = self._gradients.send_rest(), self._gradients.dtype
        own = [
            self._encode(loss, hit, part) for part, (loss, hit) in enumerate(zip(losses, hits, strict=True))
        ]
        width = 2 + (0 if self._statistics is None else self._statistics.width)
        slots = -(-share.num_parts // self.processes.num_ranks)
        device = self.processes.device
        head = torch.tensor([float(self._stop()), *map(float, present)], dtype=torch.float64, device=device)
        blank = torch.zeros(width, dtype=torch.float64, device=device)
        everyone = self.processes.gather(torch.cat([head, *own, *[blank] * (slots - len(own))]))
        heads, bodies = everyone[:, : len(head)], everyone[:, len(head) :].view(-1, slots, width)
        present_anywhere = heads.amax(0).tolist()
        self.stops = bool(present_anywhere[0])
        self._gradients.receive([bool(value) for value in present_anywhere[1:]])
        counts = split_evenly(share.num_parts, self.processes.num_ranks)
        parts = [bodies[rank, slot] for rank, count in enumerate(counts) for slot in range(count)]
        if self._statistics is None:
            observe()
        else:
            self._statistics.apply((part[2:] for part in parts), observe)
        return [part[0].to(dtype) for part in parts], [part[1].long() for part in parts]

    def _encode(self, loss: Tensor, hits: Tensor, part: int) -> Tensor:
        numbers = torch.stack([loss.double(), hits.double()])
        statistics = self._statistics
        return torch.cat([numbers, statistics.parts[part]]) if statistics and statistics.width else numbers


class _Statistics:
    """What the own parts of a step did to running statistics."""

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for _, layer in batch_norm_layers(model)]
        self._layers = [layer for layer in layers if layer.running_mean is not None]
        self.width = sum(1 + 2 * layer.num_features for layer in self._layers)
        self.parts: list[Tensor] = []  # of each own part, (width,) float64
        self._start: list[Tensor] = []  # the buffers of all layers as the step found them

    def begin_part(self) -> None:
        """Let the layers that follow this part begin at 0."""
        if not self._start:
            self._start = [buffer.clone() for layer in self._layers for buffer in _buffers(layer)]
            self.parts = []
        for layer in self._layers:
            if layer.training:
                torch._foreach_zero_(_buffers(layer))

    def end_part(self) -> None:
        """Keep what the part has made of 0."""
        numbers = []
        for layer in self._layers:
            mean, var, count = _buffers(layer)
            made = torch.cat([count.view(1).double(), mean.double(), var.double()])
            numbers.append(made if layer.training else torch.zeros_like(made))
        if numbers:
            self.parts.append(torch.cat(numbers))

    def apply(self, parts: Iterator[Tensor], observe: Callable[[], None]) -> None:
        """Go back to the start, and from there through the parts (width,) of all processes in their order."""
        if self._start:
            buffers = [buffer for layer in self._layers for buffer in _buffers(layer)]
            torch._foreach_copy_(buffers, self._start)
        self._start, self.parts = [], []
        sizes = [size for layer in self._layers for size in (1, layer.num_features, layer.num_features)]
        for part in parts:
            pieces = iter(part.split(sizes))
            for layer in self._layers:
                _follow(layer, next(pieces), next(pieces), next(pieces))
            observe()


def _follow(layer: _BatchNorm, count: Tensor, mean: Tensor, var: Tensor) -> None:
    """Let running statistics go on by `count` (1,) batches, which make `mean` and `var` (C,) of 0."""
    running_mean, running_var, tracked = _buffers(layer)
    if layer.momentum is None:  # an average of all batches, each counting once
        kept = tracked / (tracked + count).clamp(min=1)
        new = 1 - kept
    else:
        kept, new = (1 - layer.momentum) ** count, torch.ones_like(count)
    for running, made in ((running_mean, mean), (running_var, var)):
        running.copy_(torch.where(count > 0, running.double() * kept + made * new, running.double()))
    tracked.add_(count.view(()).to(tracked.dtype))


def _buffers(layer: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """running_mean and running_var (C,), num_batches_tracked ()."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked is not None
    return layer.running_mean, layer.running_var, layer.num_batches_tracked


class _Bucket:
    """Some weights whose gradients are sent together, in one piece of memory."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = weights
        self.flat = weights[0].new_zeros(sum(weight.numel() for weight in weights))
        self.missing = len(weights)  # gradients that are not there yet
        self.work: Any = None  # under way
        offset = 0
        self.views = []
        for weight in weights:
            piece = self.flat[offset : offset + weight.numel()]
            is_dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
            # in the order of the weight, as the optimiser reads it
            self.views.append(
                piece.as_strided(weight.shape, weight.stride(), piece.storage_offset())
                if is_dense
                else piece.view(weight.shape)
            )
            offset += weight.numel()


class _Gradients:
    """The sums of all processes' gradients, of which the last layers' are sent first."""

    def __init__(self, processes: Processes, model: nn.Module) -> None:
        self._processes = processes
        self._group = processes.new_group()
        self._weights: list[Tensor] = [weight for weight in model.parameters() if weight.requires_grad]
        self.dtype = torch.promote_types(self._weights[0].dtype, torch.float32)  # of losses
        self._buckets = list(_in_buckets(self._weights))
        self.is_last = False  # whether the part under way is the last: then gradients are complete
        self._next = 0  # the first bucket that is not sent
        for bucket in self._buckets:
            for weight in bucket.weights:
                weight.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._arrived(bucket))

    def send_rest(self) -> list[bool]:
        """Send what is not under way, of weights without a gradient too; which weights have one here."""
        while self._next < len(self._buckets):
            self._send()
        return [weight.grad is not None for weight in self._weights]

    def receive(self, present: list[bool]) -> None:
        """Wait for the sums, and make them the gradients of all weights that have one anywhere."""
        for bucket in self._buckets:
            with self._processes.exchanging():
                bucket.work.wait()
        for bucket in self._buckets:
            bucket.work, bucket.missing = None, len(bucket.weights)
        self._next, self.is_last = 0, False
        sums = {
            id(w): view
            for bucket in self._buckets
            for w, view in zip(bucket.weights, bucket.views, strict=True)
        }
        for weight, is_present in zip(self._weights, present, strict=True):
            weight.grad = sums[id(weight)] if is_present else None

    def _arrived(self, bucket: _Bucket) -> None:
        if not self.is_last:
            return
        bucket.missing -= 1
        # in one order in all processes, whichever is complete first
        while self._next < len(self._buckets) and self._buckets[self._next].missing <= 0:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        for view, weight in zip(bucket.views, bucket.weights, strict=True):
            if weight.grad is None:
                view.zero_()
            else:
                view.copy_(weight.grad)
        with self._processes.exchanging():
            bucket.work = dist.all_reduce(bucket.flat, group=self._group, async_op=True)


def _in_buckets(weights: list[Tensor]) -> Iterator[_Bucket]:
    """From the last layer to the first, as their gradients come; of one type each."""
    bucket: list[Tensor] = []
    for weight in reversed(weights):
        size = sum(each.numel() * each.element_size() for each in [*bucket, weight])
        if bucket and (size > _BUCKET_BYTES or weight.dtype != bucket[0].dtype):
            yield _Bucket(bucket)
            bucket = []
        bucket.append(weight)
    if bucket:
        yield _Bucket(bucket)
