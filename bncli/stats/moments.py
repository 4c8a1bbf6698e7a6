"""Count, mean and sum of squared deviations per channel: exact in float64, and mergeable.

Two passes over pieces that stay in the processor's cache, so that nothing cancels: a mean of 1e3 beside a
deviation of 1e-3 costs no digit that float64 has. (`E[x**2] - E[x]**2` loses all of them in float32, and
`torch.var_mean` adds up in float64 but rounds its answer to the input's precision.) Where the mean is no
more than ten deviations, as it mostly is in a network, `E[x**2] - E[x]**2` in float64 loses two digits of
sixteen and needs only one pass: a piece is given the second one only when it needs it. Merging is that of
Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
"""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

# Measured on two cores with 1 MiB of L2 cache each: pieces of 2**18 elements (2 MiB in float64) take 0.26 to
# 0.37 ns an element, pieces of 2**16, which leave the second core little to do, 0.45 to 0.66; whole tensors
# 4 ns. A GPU wants few large kernels instead; 2**24 float64 are 128 MiB.
_PIECE_CPU = 1 << 18
_PIECE_GPU = 1 << 24
_scratch = threading.local()  # one piece per thread

# Planes smaller than this are turned into rows: a reduction over so few values is all overhead. An element
# of 2x2 planes takes 2.8 ns as planes and 0.5 to 0.8 ns as rows, one of 4x4 planes 0.5 ns as planes.
_MIN_PLANE = 16
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

    @classmethod
    def of(cls, values: Tensor) -> "Moments":
        """The moments of values (N, C, *) of any floating-point type, on their device.

        Memory beside the input: one piece in float64. Raises ValueError without a channel dimension or
        without values.
        """
        if values.dim() < 2:
            raise ValueError(f"expected values of shape (N, C, *), got {tuple(values.shape)}")
        if values.numel() == 0:
            raise ValueError(f"no values in a tensor of shape {tuple(values.shape)}")
        values = values.detach()
        if values.device.type == "mps":  # has no float64
            values = values.cpu()
        piece_size = _PIECE_CPU if values.device.type == "cpu" else _PIECE_GPU
        channels_last = values.movedim(1, -1)
        if values.dim() == 2 or (channels_last.is_contiguous() and not values.is_contiguous()):
            return _of_rows(channels_last.reshape(-1, values.shape[1]), piece_size)
        planes = values.reshape(values.shape[0], values.shape[1], -1)  # (N, C, M)
        width = max(1, piece_size // planes.shape[2])  # channels that fit into a piece
        parts = [_of_planes(block, piece_size) for block in planes.split(width, dim=1)]
        means, m2s = ([getattr(part, field) for part in parts] for field in ("mean", "m2"))
        return cls(parts[0].count, torch.cat(means), torch.cat(m2s))

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


def _of_rows(rows: Tensor, piece_size: int) -> Moments:
    """Of rows (M, C)."""
    pieces = rows.split(max(1, piece_size // rows.shape[1]))
    return pooled([_of_piece(_widened(piece, piece_size)) for piece in pieces])


def _of_planes(planes: Tensor, piece_size: int) -> Moments:
    """Of planes (N, C, M)."""
    pieces = planes.split(max(1, piece_size // (planes.shape[1] * planes.shape[2])))
    return pooled([_of_plane_piece(piece, piece_size) for piece in pieces])


def _of_plane_piece(piece: Tensor, piece_size: int) -> Moments:
    """Of one piece (n, C, M), in the way that is fastest for its shape and right for its values."""
    if piece.device.type != "cpu":
        return _of_piece(_widened(piece, piece_size))
    if piece.shape[2] < _MIN_PLANE:
        return _of_piece(_widened(piece.movedim(1, -1), piece_size).flatten(0, 1))
    wide = _widened(piece, piece_size)
    return _in_one_pass(wide) or _of_piece(wide)


def _widened(piece: Tensor, piece_size: int) -> Tensor:
    """A float64 copy, which the next call overwrites.

    The memory is kept: asked for anew for every piece, it costs the network around it page faults that
    take longer than all the arithmetic here.
    """
    if piece.numel() > piece_size or piece.device.type != "cpu":
        return piece.to(torch.float64, copy=True)
    if not hasattr(_scratch, "memory"):
        _scratch.memory = torch.empty(piece_size, dtype=torch.float64)
    copy: Tensor = _scratch.memory[: piece.numel()].view(piece.shape)
    return copy.copy_(piece)


def _in_one_pass(wide: Tensor) -> Moments | None:
    """Of one piece (n, C, M) in float64, which stays as it is; None where too many digits would cancel."""
    n, num_channels, _ = wide.shape
    count = wide.numel() // num_channels
    rows = wide.flatten(0, 1)  # (n * C, M)
    mean = rows.sum(1).view(n, num_channels).sum(0) / count
    # the norm reads each value once and keeps nothing; x.square() would write as much as it reads
    squares = torch.linalg.vector_norm(rows, dim=1).square_().view(n, num_channels).sum(0)
    variance = squares / count - mean.square()
    # false for NaN, and for an infinite sum of squares of finite values
    is_sound = (mean.square() <= _MAX_MEAN_SQUARE * variance) & variance.isfinite()
    return Moments(count, mean, variance * count) if bool(is_sound.all()) else None


def _of_piece(wide: Tensor) -> Moments:
    """Of one piece (n, C) or (n, C, M) in float64, which is spoilt: the mean first, then the deviations."""
    if wide.dim() == 2 and wide.device.type == "cpu":
        # the same two passes in one call, a third faster than the three operations below
        mean, variance = torch.batch_norm_update_stats(wide, None, None, 0.0)  # biased
        return Moments(len(wide), mean, variance * len(wide))
    dims = (0,) if wide.dim() == 2 else (0, 2)
    count = wide.numel() // wide.shape[1]
    mean = wide.sum(dims) / count
    deviations = wide.sub_(mean if wide.dim() == 2 else mean[:, None])
    return Moments(count, mean, deviations.square_().sum(dims))
