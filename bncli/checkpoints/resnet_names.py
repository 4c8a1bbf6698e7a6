"""The layers of ResNets in torchvision, and in Keras applications, Flax's ImageNet example and Haiku.

Neither their order nor their shapes tell them apart: the first block of a stage has two convolutions of one
shape, and Keras lists the shortcut before the last convolution of the block, torchvision behind it.
"""

import re
from collections.abc import Collection, Sequence

from torch import nn

_OUTSIDE = {"conv1": "conv1_conv", "bn1": "conv1_bn", "fc": "predictions"}
_OUTSIDE_FLAX = {"conv1": "conv_init", "bn1": "bn_init", "fc": "Dense_0"}
_OUTSIDE_HAIKU = {"conv1": "initial_conv", "bn1": "initial_batchnorm", "fc": "logits"}
_INSIDE = re.compile(r"layer(\d)\.(\d+)\.(?:(conv|bn)([123])|downsample\.([01]))")
_PART = {"conv": "conv", "bn": "bn", "0": "conv", "1": "bn"}


def keras_names(modules: Collection[str]) -> dict[str, str] | None:
    """Keras' names by torchvision's; None for a network with other names, or with blocks of two."""
    if "layer1.0.conv3" not in modules:
        return None
    return _whole({name: _keras_name(name) for name in modules})


def flax_names(modules: Collection[str]) -> dict[str, str] | None:
    """Those of Flax's example (linen) by torchvision's, which counts blocks through; None for others."""
    block = "BottleneckResNetBlock" if "layer1.0.conv3" in modules else "ResNetBlock"
    inside = {name: match for name in modules if (match := _INSIDE.fullmatch(name))}
    places = sorted({(int(match[1]), int(match[2])) for match in inside.values()})
    found = {name: _OUTSIDE_FLAX.get(name) for name in modules}
    for name, match in inside.items():
        stage, number, part, index, of_shortcut = match.groups()
        if part:
            own = f"{'Conv' if part == 'conv' else 'BatchNorm'}_{int(index) - 1}"
        else:
            own = "conv_proj" if of_shortcut == "0" else "norm_proj"
        found[name] = f"{block}_{places.index((int(stage), int(number)))}.{own}"
    return _whole(found)


def haiku_names(modules: Collection[str]) -> dict[str, str] | None:
    """Those of hk.nets.ResNet by torchvision's, below the network's own name; None for others."""
    found = {name: _OUTSIDE_HAIKU.get(name) for name in modules}
    for name in modules:
        if match := _INSIDE.fullmatch(name):
            stage, number, part, index, of_shortcut = match.groups()
            kind = {"conv": "conv", "bn": "batchnorm"}[_PART[part or of_shortcut]]
            own = f"{kind}_{int(index) - 1}" if part else f"shortcut_{kind}"
            found[name] = f"block_group_{int(stage) - 1}/~/block_{number}/~/{own}"
    return _whole(found)


def _whole(found: dict[str, str | None]) -> dict[str, str] | None:
    known = {name: other for name, other in found.items() if other is not None}
    return known if known and len(known) == len(found) else None


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
