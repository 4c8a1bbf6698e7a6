"""The ways in which PyTorch itself can evaluate a network."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from bncli.inference import fold_batch_norm, optimize_for_inference
from bncli.runtime import Runtime, short_compile_errors

Classify = Callable[[Tensor], Tensor]  # raw images (N, ...) on the CPU to logits (N, num_classes)
TorchWay = Literal["plain", "eval", "folded", "compiled"]


def torch_way(way: TorchWay, network: nn.Module, runtime: Runtime) -> tuple[Classify, str]:
    """The function, and what it does in words: its precision and layout in memory.

    `network` is in float32 and eval mode on the CPU, and is this way's own.

    plain: the network as it was trained, in float32. eval: as `bncli eval` computes. folded: after
    `optimize_for_inference`. compiled: folded, in float32, by torch.compile for batches of any size. The
    function raises CompileError where PyTorch's compiler cannot.
    """
    device = runtime.device
    described = runtime.describe()
    precision, memory_format = described["precision"], described["memory_format"]
    if way == "eval":
        placed = runtime.place_model(network)

        def classify_as_eval(images: Tensor) -> Tensor:
            with torch.no_grad(), runtime.autocast():
                return placed(runtime.place(images)).cpu()  # type: ignore[no-any-return]

        autocast = " autocast" if precision != "float32" else ""
        return classify_as_eval, f"{precision}{autocast}, {memory_format}"
    if way == "folded":
        folded = optimize_for_inference(runtime.place_model(network), dtype=runtime.precision)
        how = f"{precision} weights, channels_last, chunks of {folded.rows}, inference_mode"
        return lambda images: folded(images.to(device)).cpu(), how
    if way == "compiled":
        module = torch.compile(fold_batch_norm(network).model.to(device), dynamic=True)
        how = "float32, BatchNorm folded, batches of any size"
    else:
        module, how = network.to(device), "float32, contiguous, inference_mode"

    def classify(images: Tensor) -> Tensor:
        with torch.inference_mode(), short_compile_errors():
            return module(images.to(device)).cpu()  # type: ignore[no-any-return]

    return classify, how
