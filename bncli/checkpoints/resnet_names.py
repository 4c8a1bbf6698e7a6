"""The layers of ResNet-50, -101 and -152 in torchvision and in Keras applications, name by name.

Neither their order nor their shapes tell them apart: the first block of a stage has two convolutions of one
shape, and Keras lists the shortcut before the last convolution of the block, torchvision behind it.
"""

import re
from collections.abc import Collection, Sequence

from torch import nn

_OUTSIDE = {"conv1": "conv1_conv", "bn1": "conv1_bn", "fc": "predictions"}
_INSIDE = re.compile(r"layer(\d)\.(\d+)\.(?:(conv|bn)([123])|downsample\.([01]))")
_PART = {"conv": "conv", "bn": "bn", "0": "conv", "1": "bn"}


def keras_names(modules: Collection[str]) -> dict[str, str] | None:
    """Keras' names by torchvision's; None for a network with other names, or with blocks of two."""
    if "layer1.0.conv3" not in modules:
        return None
    found = {name: _keras_name(name) for name in modules}
    known = {name: other for name, other in found.items() if other is not None}
    return known if len(known) == len(found) else None


def _keras_name(name: str) -> str | None:
    match = _INSIDE.fullmatch(name)
    if match is None:
        return _OUTSIDE.get(name)
    stage, block, part, number, of_shortcut = match.groups()
    return f"conv{int(stage) + 1}_block{int(block) + 1}_{number or 0}_{_PART[part or of_shortcut]}"


def note_strides(network: nn.Module, modules: Sequence[str], *, for_keras: bool = False) -> str | None:
    """What makes the outputs equal: Keras halves the image in another convolution. None where it does not.

    `same` padding of Keras is on the right and below alone where a convolution of stride 2 needs one row.
    """
    blocks = [name.removesuffix(".conv1") for name in modules if re.fullmatch(r"layer[2-9]\.0\.conv1", name)]
    halving = [
        name
        for name in blocks
        if network.get_submodule(f"{name}.conv1").stride == (1, 1)
        and network.get_submodule(f"{name}.conv2").stride == (2, 2)
    ]
    if not halving:
        return None
    if for_keras:
        return (
            "Keras' ResNet halves images in the first convolution of a block, this network in the second:"
            " outputs differ until, in conv3_block1, conv4_block1 and conv5_block1, 1_conv has strides 1 and"
            " 2_conv strides 2 with padding 'valid' behind ZeroPadding2D(1)."
        )
    return (
        "Keras' ResNet halves images in the first convolution of a block, this network in the second: outputs"
        f" differ until {', '.join(halving)} have conv1.stride (2, 2) and conv2.stride (1, 1)."
    )
