"""A network made ready for export: checked, folded, in one precision, with pixels normalised inside."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from bncli.batchnorm import Finding, audit_layers, read_running_stats
from bncli.batchnorm.layers import batch_norm_layers
from bncli.errors import BncliError
from bncli.inference.fold import Folding, KeptLayer, fold_batch_norm
from bncli.wording import list_names

AS_ASKED = "as asked for"
BY_DEFAULT = "the default of .safetensors"


def problems_of(model: nn.Module, findings: "tuple[Finding, ...] | None" = None) -> tuple[str, ...]:
    """Why eval mode, which an export freezes, does not compute what the network was trained to compute.

    `findings` are those of the file, where it tells more than the network.
    """
    layers = batch_norm_layers(model)
    training = [name or "the network" for name, layer in model.named_modules() if layer.training]
    without = [name for name, layer in layers if layer.running_mean is None or layer.running_var is None]
    problems = []
    if training:
        problems.append(f"in train mode even after eval(): {list_names(training)}")
    if without:
        problems.append(
            f"no running statistics (track_running_stats=False), so that eval mode takes those of the batch:"
            f" {list_names(without)}"
        )
    if findings is None:
        findings = audit_layers(read_running_stats(model))
    never = [one for one in findings if one.name == "never_updated" and one.severity != "info"]
    grave = [one for one in findings if one.severity == "error" and one not in never]
    if never:
        problems.append(f"running statistics that were never updated (BN001): {_layers(never)}")
    for name in dict.fromkeys(one.name for one in grave):
        those = [one for one in grave if one.name == name]
        problems.append(f"{name} ({those[0].code}): {_layers(those)}")
    return tuple(problems)


def _layers(findings: list[Finding]) -> str:
    return list_names(list(dict.fromkeys(finding.layer for finding in findings)))


def prepare(
    model: nn.Module, *, fold: bool, precision: torch.dtype, casts: bool = True, kept_for: str = AS_ASKED
) -> Folding:
    """A copy of the network for export; `model` is left alone.

    With `casts` convolutions and linear layers hold their weights in `precision`, and take inputs in it.
    BatchNorm that is left, and what the network adds by itself, keeps its type. Outputs are float32.
    `kept_for` is the reason that is told where nothing is to be folded.

    Raises BncliError for a model that cannot be copied.
    """
    if fold:
        folding = fold_batch_norm(model)
    else:
        kept = tuple(KeptLayer(name, kept_for) for name, _ in batch_norm_layers(model))
        folding = Folding(_copied(model), (), kept)
    network = folding.model
    network.requires_grad_(False)
    if precision != torch.float32 and casts:
        in_precision(network, precision)
        network.register_forward_hook(_float32)  # no module around it: names stay
    return folding


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:  # whatever a part of it says
        raise BncliError(f"the model cannot be copied: {error}") from error


def in_precision(network: nn.Module, precision: torch.dtype) -> None:
    """Give convolutions and linear layers weights of this type, and let them take inputs of it."""
    for layer in network.modules():
        if isinstance(layer, _ConvNd | nn.Linear) and layer.weight.dtype == torch.float32:
            layer.to(precision)
            layer.register_forward_pre_hook(_cast_to_weight)
        elif isinstance(layer, _BatchNorm):
            layer.register_forward_pre_hook(_cast_to_statistics)


def _cast_to_weight(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return (inputs[0].to(weight.dtype), *inputs[1:])


def _cast_to_statistics(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    mean = layer.running_mean
    return inputs if not isinstance(mean, Tensor) else (inputs[0].to(mean.dtype), *inputs[1:])


def _float32(_: nn.Module, __: tuple[Any, ...], outputs: Tensor) -> Tensor:
    return outputs.float()
