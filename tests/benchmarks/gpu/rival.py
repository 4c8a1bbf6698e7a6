"""The rival on a GPU: a loop of our own after airbench94_muon, as its README and its paper describe it.

K. Jordan, arXiv 2404.00498 and github.com/KellerJordan/cifar10-airbench: 2.59 s on an A100, 94.01 % over
views. Network, data and hyperparameters are its own: float16 weights with BatchNorm in float32, 8 epochs of
25 batches of 2000, Muon for the filters and SGD for the rest, `torch.compile(mode="max-autotune")`. It is
timed as that is: whitening, training and the pass over the views count; loading and compiling do not.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bncli.data import Split
from bncli.runtime import synchronize
from bncli.training.optimizer import orthogonalize

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH_SIZE, EPOCHS, BIAS_EPOCHS = 2000, 8, 3
FILTER_RATE, BIAS_RATE, HEAD_RATE = 0.24, 0.053, 0.67
DECAY = 2e-6 * BATCH_SIZE  # divided by a group's rate, so that the rate is no part of it
NUM_WHITENING_IMAGES = 5000


@dataclass(frozen=True)
class Finished:
    """One run."""

    seconds: float
    accuracy: float  # plain, a fraction
    views_accuracy: float


class Block(nn.Module):
    """Convolution, pooling, BatchNorm, GELU; convolution, BatchNorm, GELU."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, padding="same", bias=False)
        self.second = nn.Conv2d(outside, outside, 3, padding="same", bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outside, eps=1e-12, momentum=0.4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norms[0](F.max_pool2d(self.first(x), 2)))
        return F.gelu(self.norms[1](self.second(x)))


class Network(nn.Module):
    """Normalised images (N, 3, 32, 32) to logits (N, 10)."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2, bias=True)
        inside = (24, *widths[:-1])
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in zip(inside, widths, strict=True)))
        self.head = nn.Linear(widths[-1], 10, bias=False)
        self.whiten.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.requires_grad_(False)

    def forward(self, x: Tensor, trains_bias: bool = True) -> Tensor:
        bias = self.whiten.bias
        assert bias is not None
        x = F.conv2d(x, self.whiten.weight, bias if trains_bias else bias.detach())
        x = F.max_pool2d(self.blocks(F.gelu(x)), 3).flatten(1)
        logits: Tensor = self.head(x)
        return logits / x.shape[1]

    @torch.no_grad()
    def begin(self, images: Tensor) -> None:
        """Everything anew: PyTorch's weights, filters that copy their channels, whitening of the images."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
                module.reset_parameters()
        for block in self.blocks:
            for convolution in (block.first, block.second):
                nn.init.dirac_(convolution.weight[: convolution.in_channels])
        self.head.weight.div_(self.head.weight.std())
        patches = F.unfold(images.float(), 2).transpose(1, 2).flatten(0, 1)  # (patches, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors.T / (values[:, None] + 5e-4).sqrt()).view(-1, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


class Rival:
    """The network, compiled once, and the data on the device."""

    def __init__(
        self,
        train: Split,
        test: Split,
        device: torch.device,
        *,
        dtype: torch.dtype,
        mode: str | None,
        widths: tuple[int, int, int] = (64, 256, 256),
        epochs: int = EPOCHS,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        self.device, self.epochs, self.batch_size = device, epochs, batch_size
        self.train, self.test = (self._placed(split, dtype) for split in (train, test))
        self.labels, self.test_labels = train.labels.to(device), test.labels.to(device)
        network = Network(widths).to(device, dtype)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.orthogonalize = orthogonalize
        if mode is not None:
            self.network.compile(mode=mode)
            self.orthogonalize = torch.compile(orthogonalize)

    def _placed(self, split: Split, dtype: torch.dtype) -> Tensor:
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (MEAN, STD))
        parts = split.images.split(10_000)
        images = torch.cat([((part.to(self.device) / 255 - mean) / std).to(dtype) for part in parts])
        return images.contiguous(memory_format=torch.channels_last)

    @property
    def num_steps(self) -> int:
        """Of a run."""
        return self.epochs * (len(self.train) // self.batch_size)

    def run(self, seed: int) -> Finished:
        """Train, and evaluate as the published figure is."""
        torch.manual_seed(seed)
        synchronize(self.device)
        start = time.perf_counter()
        self.network.begin(self.train[:NUM_WHITENING_IMAGES])
        self.train_epochs()
        right = self._right(views=True)
        seconds = time.perf_counter() - start
        return Finished(seconds, self._right(views=False), right)

    def train_epochs(self) -> None:
        """All steps, from the weights that are there."""
        torch.backends.cudnn.benchmark = True  # which ours switches off where it does without
        network, step = self.network.train(), 0
        norms = [p for name, p in network.named_parameters() if "norm" in name and p.requires_grad]
        rates = ((network.whiten.bias, BIAS_RATE), (norms, BIAS_RATE), (network.head.weight, HEAD_RATE))
        groups = [
            {"params": params, "lr": rate, "weight_decay": DECAY / rate, "peak": rate}
            for params, rate in rates
        ]
        fused = self.device.type == "cuda"
        sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True, fused=fused)
        filters = [p for p in network.parameters() if p.ndim == 4 and p.requires_grad]
        momenta = [torch.zeros_like(p) for p in filters]
        steps, bias_steps = self.num_steps, self.num_steps * BIAS_EPOCHS / EPOCHS
        padded, flipped = self._prepared()
        for epoch in range(self.epochs):
            images = self._augmented(padded, flipped, epoch)
            order = torch.randperm(len(images), device=self.device)
            for chosen in order.split(self.batch_size)[: len(images) // self.batch_size]:
                logits = network(images[chosen], step < bias_steps)
                F.cross_entropy(logits, self.labels[chosen], label_smoothing=0.2, reduction="sum").backward()
                left = 1 - step / steps
                for group, share in zip(sgd.param_groups, (1 - step / bias_steps, left, left), strict=True):
                    group["lr"] = group["peak"] * share
                sgd.step()
                self._turn(filters, momenta, FILTER_RATE * left)
                network.zero_grad(set_to_none=True)
                step += 1

    @torch.no_grad()
    def _turn(self, filters: list[Tensor], momenta: list[Tensor], rate: float) -> None:
        """Muon with Nesterov momentum 0.6, each filter bank scaled first."""
        for weight, momentum in zip(filters, momenta, strict=True):
            assert weight.grad is not None
            momentum.mul_(0.6).add_(weight.grad)
            direction = weight.grad.add(momentum, alpha=0.6)
            weight.mul_(math.sqrt(len(weight)) / weight.norm())
            turned = self.orthogonalize(direction.flatten(1))
            weight.add_(turned.view(weight.shape), alpha=-rate)

    def _prepared(self) -> tuple[Tensor, Tensor]:
        """Images (N, 36, 36, 3) with a mirrored border, and which of them (N,) are mirrored first."""
        padded = F.pad(self.train, (2, 2, 2, 2), "reflect").permute(0, 2, 3, 1).contiguous()
        return padded, torch.rand(len(padded), device=self.device) < 0.5

    def _augmented(self, padded: Tensor, flipped: Tensor, epoch: int) -> Tensor:
        """All images of an epoch, shifted by up to 2 pixels, and mirrored in every other epoch."""
        count, places = len(padded), torch.arange(32, device=self.device)
        shifts = torch.randint(0, 5, (2, count, 1), device=self.device)
        mirrored = flipped if epoch % 2 == 0 else ~flipped
        columns = places + shifts[1]
        columns = torch.where(mirrored[:, None], 35 - columns, columns)
        rows = places + shifts[0]
        images = torch.arange(count, device=self.device)[:, None, None]
        return padded[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    @torch.no_grad()
    def _right(self, *, views: bool) -> float:
        network = self.network.eval()
        logits = []
        for images in self.test.split(self.batch_size):
            if not views:
                logits.append(network(images).clone())  # CUDA graphs write to the same place again
                continue
            padded = F.pad(images, (1, 1, 1, 1), "reflect")
            moved = [images, padded[:, :, :32, :32], padded[:, :, 2:, 2:]]
            weights = (0.25, 0.125, 0.125)
            sums = [
                weight * (network(view) + 0) + weight * network(view.flip(3))
                for view, weight in zip(moved, weights, strict=True)
            ]
            logits.append(torch.stack(sums).sum(0))
        return float((torch.cat(logits).argmax(1) == self.test_labels).float().mean())
