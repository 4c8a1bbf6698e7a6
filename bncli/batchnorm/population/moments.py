"""Count, mean and sum of squared deviations per channel: exact in float64, and mergeable.

Two passes over pieces that stay in the processor's cache, so that nothing cancels: a mean of 1e3 beside a
deviation of 1e-3 costs no digit that float64 has. (`E[x**2] - E[x]**2` loses all of them in float32, and
`torch.var_mean` adds up in float64 but rounds its answer to the input's precision.) Where the mean is no
more than ten deviations, as it mostly is in a network, `E[x**2] - E[x]**2` in float64 loses two digits of
sixteen and needs only one pass: values are given the second one only when they need it. Merging is that of
Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
"""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

# Measured on two cores with 1 MiB of L2 cache each, behind a convolution in channels_last, in ns an element:
# pieces of 2**16 elements 0.81 to 0.99, 2**18 0.46 to 0.53, 2**19 (4 MiB in float64) 0.38 to 0.41, 2**20
# 0.36, 2**21 0.42 to 0.46; whole tensors 4. In small pieces the two wait for each other at every operation,
# large ones leave the shared cache, which is smaller elsewhere. A GPU wants few large kernels instead; 2**24
# float64 are 128 MiB.
_PIECE_CPU = 1 << 19
_PIECE_GPU = 1 << 24
_scratch = threading.local()  # one piece per thread

# Planes smaller than this are measured as places: a reduction over so few values is all overhead. On two
# threads 32 x 256 planes of 4x4 take 121 us as planes and 75 as places, 32 x 512 of 2x2 142 and 53; 32 x 128
# planes of 8x8 take 127 and 130, on one thread 159 and 224.
_MIN_PLANE = 32
# Largest mean**2 / variance for one pass. The sum of squares is then at most 101 times m2, so its rounding,
# n / 8 * 1e-16 at the very worst in a row of n values (a vector register adds up 8), grows to 1e-10 at
# n = 2**16; where roundings go either way, as they do, it stays below 1e-13.
_MAX_MEAN_SQUARE = 100.0


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of `count` values in each of C channels. Infinity or NaN among the values shows as NaN."""

    count: int  # values per channel
    mean: Tensor  # (C,) float64
    m2: Tensor  # (C,) float64, sum of squared deviations from the mean

    def __repr__(self) -> str:
        """How many values of how many channels, and between what mean and variance lie."""
        if not len(self.mean) or not self.count:
            return f"Moments({self.count} values in {len(self.mean)} channels)"
        variance = self.variance()
        return (
            f"Moments({self.count} values in {len(self.mean)} channels,"
            f" mean {float(self.mean.min()):.3g} to {float(self.mean.max()):.3g},"
            f" variance {float(variance.min()):.3g} to {float(variance.max()):.3g})"
        )

    @classmethod
    def of(cls, values: Tensor) -> "Moments":
        """The moments of values (N, C, *) of any floating-point type, on their device.

        Memory beside the input: one piece in float64 and, on the CPU, two numbers a plane; on a GPU a
        whole image where that is larger. Raises ValueError without a channel dimension or without values.
        """
        if values.dim() < 2:
            raise ValueError(f"expected values of shape (N, C, *), got {tuple(values.shape)}")
        if values.numel() == 0:
            raise ValueError(f"no values in a tensor of shape {tuple(values.shape)}")
        values = values.detach()
        if values.device.type == "mps":  # has no float64
            values = values.cpu()
        num_channels = values.shape[1]
        channels_last = values.movedim(1, -1)
        is_cpu = values.device.type == "cpu"
        if is_cpu and channels_last.is_contiguous() and (values.dim() == 2 or not values.is_contiguous()):
            return _of_places(channels_last.view(-1, 1, num_channels))
        images = values.reshape(len(values), num_channels, -1)
        if not is_cpu:
            return _of_images(images)
        if images.shape[2] < _MIN_PLANE:
            return _of_places(images.movedim(1, -1))
        return _of_planes(images.view(-1, images.shape[2]), num_channels)

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets of values together.

        Not associative in the last bits: `BatchTree` fixes an order where bits matter.
        """
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / count)
        return Moments(count, mean, m2)

    def variance(self, *, unbiased: bool = False) -> Tensor:
        """(C,) float64: m2 / count, or m2 / (count - 1), which is NaN for a single value."""
        if unbiased:
            return self.m2 / (self.count - 1) if self.count > 1 else torch.full_like(self.m2, torch.nan)
        return self.m2 / self.count

    def to(self, device: torch.device | str) -> "Moments":
        """The same on another device."""
        return Moments(self.count, self.mean.to(device), self.m2.to(device))


def pooled(parts: list[Moments]) -> Moments:
    """The moments of all parts' values together, in one step. Raises ValueError without parts."""
    if not parts:
        raise ValueError("no moments to pool")
    if len(parts) == 1:
        return parts[0]
    count = sum(part.count for part in parts)
    means = torch.stack([part.mean for part in parts])  # (K, C)
    counts = torch.tensor([part.count for part in parts], dtype=torch.float64, device=means.device)
    # around the first mean, so that the sum keeps the digits in which the means differ
    mean = means[0] + counts @ (means - means[0]) / count
    m2 = torch.stack([part.m2 for part in parts]).sum(0) + counts @ (means - mean).square()
    return Moments(count, mean, m2)


def _of_places(places: Tensor) -> Moments:
    """Of places (N, M, C) on the CPU, in two passes."""
    parts = []
    for piece in _pieces(places):
        wide = _widened(piece).flatten(0, 1)  # (n * M, C)
        # the mean first, then the deviations from it, both in one call
        mean, variance = torch.batch_norm_update_stats(wide, None, None, 0.0)  # biased
        parts.append(Moments(len(wide), mean, variance * len(wide)))
    return pooled(parts)


def _of_planes(planes: Tensor, num_channels: int) -> Moments:
    """Of planes (N * C, M) on the CPU, number i of channel i modulo C: in one pass if that is enough.

    The pieces leave a sum and a norm for every plane, and all that is decided or computed per channel
    waits for the last of them. Small operations are not free: after a convolution their code has left the
    processor's caches, and the first product of 512 numbers takes 20 us and not 1.
    """
    pieces = _pieces(planes)
    sums, norms = [], []
    for piece in pieces:
        wide = _widened(piece)
        sums.append(wide.sum(1))
        norms.append(_norms(wide))
    both = torch.cat(sums + norms).view(2, -1, num_channels)
    both[1].square_()
    total, squares = both.sum(1)
    count = planes.numel() // num_channels
    mean = total / count
    m2 = squares - total * mean
    # squares <= 101 * m2, and neither NaN nor, though all values are finite, infinite
    if float(torch.sub(squares, m2, alpha=1 + _MAX_MEAN_SQUARE).max()) <= 0:
        return Moments(count, mean, m2)
    means = mean.repeat(len(planes) // num_channels)[:, None].split(len(pieces[0]))
    norms = [_norms(_widened(piece).sub_(its_means)) for piece, its_means in zip(pieces, means, strict=True)]
    return Moments(count, mean, torch.cat(norms).square_().view(-1, num_channels).sum(0))


def _norms(planes: Tensor) -> Tensor:
    # reads each value once and keeps nothing; planes.square() would write as much as it reads
    norms: Tensor = torch.linalg.vector_norm(planes, dim=1)
    return norms


def _pieces(values: Tensor) -> tuple[Tensor, ...]:
    """The values cut along their first dimension."""
    if values.numel() <= _PIECE_CPU:  # mostly: `split` alone takes 30 us in the middle of a network
        return (values,)
    pieces: tuple[Tensor, ...] = values.split(max(1, _PIECE_CPU // values[0].numel()))
    return pieces


def _widened(piece: Tensor) -> Tensor:
    """A float64 copy on the CPU, which the next call overwrites.

    The memory is kept: asked for anew for every piece, it costs the network around it page faults that
    take longer than all the arithmetic here.
    """
    if piece.numel() > _PIECE_CPU:
        return piece.to(torch.float64, copy=True)
    if not hasattr(_scratch, "memory"):
        with torch.inference_mode(False):  # else nobody could write to it outside inference mode
            _scratch.memory = torch.empty(_PIECE_CPU, dtype=torch.float64)
    copy: Tensor = _scratch.memory[: piece.numel()].view(piece.shape)
    return copy.copy_(piece)


def _of_images(images: Tensor) -> Moments:
    """Of images (N, C, M) on a GPU, in few large kernels and without waiting for any: two passes always."""
    parts = []
    for piece in images.split(max(1, _PIECE_GPU // images[0].numel())):
        wide = piece.to(torch.float64, copy=True)
        count = wide.numel() // wide.shape[1]
        mean = wide.sum((0, 2)) / count
        deviations = wide.sub_(mean[:, None])
        parts.append(Moments(count, mean, deviations.square_().sum((0, 2))))
    return pooled(parts)
