"""What a checkpoint of bncli's tells about its BatchNorm layers beside their tensors, as plain values."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from bncli.batchnorm import Hyperparameters
from bncli.checkpoints.formats.pickled_module import checked_hyperparameters

FORMAT = "bncli.checkpoint"  # stands under `format` in every checkpoint of bncli


def own_hyperparameters(content: object, num_features: Mapping[str, int]) -> dict[str, Hyperparameters]:
    """Momentum, eps and whether it was recalibrated, by layer name; nothing where the file is not bncli's.

    `num_features` has the layers with running statistics. Of a network without any the layers are those
    that the configuration describes.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return {}
    model = _part(_part(content, "config"), "model")
    batch_norm = _part(model, "batch_norm")
    if not num_features and batch_norm.get("track_running_stats") is False:
        num_features = dict(_described_layers(model))
    of_layers = _part(content, "batch_norm_layers")  # of other networks than convnet
    found = {
        name: checked_hyperparameters(size, known.get("eps"), known.get("momentum", "missing"))
        for name, size in num_features.items()
        for known in [_part(of_layers, name) if of_layers else batch_norm]
    }
    recorded = _part(content, "recalibration").get("recalibrated_layers")
    measured = (
        {name for name in recorded if isinstance(name, str)} if isinstance(recorded, list | tuple) else set()
    )
    return {
        name: replace(known, was_measured=name in measured, averaged_by_training=name not in measured)
        for name, known in found.items()
        if known is not None
    }


def _described_layers(model: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """Names and channels of the layers that `bncli.models.convnet.ConvNet` would have."""
    widths, num_blocks = model.get("widths"), model.get("blocks_per_stage")
    if not isinstance(widths, Sequence) or len(widths) > 16:  # the limits of bncli.config.ConvNetConfig
        return
    if type(num_blocks) is not int or not 1 <= num_blocks <= 64:
        return
    for stage, width in enumerate(widths):
        for block in range(num_blocks):
            if type(width) is int and 1 <= width <= 8192:
                yield f"stages.{stage}.{block}.norm", width


def _part(value: Mapping[str, object], key: str) -> Mapping[str, object]:
    part = value.get(key)
    return part if isinstance(part, dict) else {}
