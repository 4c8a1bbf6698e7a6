"""The rows of `bncli inspect-stats --csv`: layers or channels."""

from collections.abc import Iterator, Sequence

from bncli.batchnorm import Finding, LayerStats, summarize
from bncli.cli.tables.csv_file import Row
from bncli.cli.tables.inspect_stats import flags_of

QUANTITIES = ("running_mean", "running_var", "weight", "bias")
EXTREMES = ("min", "median", "max")


def layer_rows(layers: Sequence[LayerStats], findings: Sequence[Finding], *, channels: bool) -> Iterator[Row]:
    """One row per layer, or per channel."""
    flags = flags_of(findings)
    for layer in layers:
        if channels:
            yield from _channel_rows(layer)
            continue
        summaries = {name: summarize(getattr(layer, name)) for name in QUANTITIES}
        yield {
            "layer": layer.name,
            "num_features": layer.num_features,
            "num_batches_tracked": layer.num_batches_tracked,
            "momentum": layer.momentum,
            "eps": layer.eps,
            **{
                f"{name}_{which}": None if summary is None else getattr(summary, which)
                for name, summary in summaries.items()
                for which in EXTREMES
            },
            "flags": flags[layer.name],
        }


def _channel_rows(layer: LayerStats) -> Iterator[Row]:
    tensors = [getattr(layer, name) for name in QUANTITIES]
    columns = [[None] * layer.num_features if tensor is None else tensor.tolist() for tensor in tensors]
    for channel, values in enumerate(zip(*columns, strict=True)):
        yield {"layer": layer.name, "channel": channel, **dict(zip(QUANTITIES, values, strict=True))}
