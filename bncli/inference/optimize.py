"""A network made ready for fast inference: BatchNorm folded, weights ready to use, chunks that fit the cache.

Autocast casts every weight anew in every call, which is most of what a single image costs. Here weights are
held in the precision and the memory format in which they are used. Only public PyTorch is called; what packs
the weights into a processor's own layout is private, and would be faster still for single images.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bncli.errors import BncliError
from bncli.inference.fold import Folding, fold_batch_norm

# Measured on CPU (1 MiB of L2 cache a core): chunks of 64, 128 and 256 are within 5 % of each other,
# 32 are slower, and memory grows with them.
INFERENCE_ROWS = 128


class InferenceNetwork(nn.Module):
    """What `optimize_for_inference` returns; the network itself is `model`."""

    def __init__(self, folding: Folding, rows: int, output_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.folding = folding  # which BatchNorm layers are gone, and why others are not
        self.model = folding.model
        self.rows = rows
        self.output_dtype = output_dtype
        self.training = False

    def extra_repr(self) -> str:
        """What `print` shows beside the network."""
        return f"rows={self.rows}"

    def train(self, mode: bool = True) -> "InferenceNetwork":
        """Nothing but eval mode. Raises BncliError for train mode: there is no BatchNorm left to train."""
        if mode:
            raise BncliError("a network optimised for inference stays in eval mode; train the original")
        return super().train(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (N, ...) to what the network makes of them, computed in `torch.inference_mode`.

        The inputs are those of the original network and on its device. Images (N, C, H, W) are brought into
        channels_last memory. Raises BncliError where the network does not return one row per input.
        """
        with torch.inference_mode():
            if inputs.dim() == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            outputs = [self._outputs_of(chunk) for chunk in inputs.split(self.rows)]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _outputs_of(self, chunk: Tensor) -> Tensor:
        outputs = self.model(chunk)
        if not isinstance(outputs, Tensor) or outputs.dim() == 0 or len(outputs) != len(chunk):
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise BncliError(f"expected a tensor of {len(chunk)} rows from the model, got {found}")
        return outputs if self.output_dtype is None else outputs.to(self.output_dtype)


def optimize_for_inference(
    model: nn.Module, *, dtype: torch.dtype | None = None, rows: int = INFERENCE_ROWS
) -> InferenceNetwork:
    """Return a fast copy of `model` for eval mode; `model` is left alone.

    Inputs (N, ...) and outputs (N, ...) are those of the model in eval mode, outputs in its own floating
    point type. BatchNorm is folded where `fold_batch_norm` can (`folding` of the result says where), the
    weights of convolutions of two dimensions lie in channels_last memory, and batches are cut into chunks of
    at most `rows` inputs. The result stays in eval mode and cannot be trained, and its outputs cannot take
    part in autograd.

    Without `dtype` everything is computed in the types that the model has, and outputs differ from its own in
    the last bits. With torch.bfloat16 convolutions hold their weights in it, and what lies between them
    computes in it as well; the weights of linear layers, and of BatchNorm layers that could not be folded,
    keep their type. That is faster where `bncli.hardware.has_fast_bfloat16` says so (CPUs with AVX-512-bf16
    or AMX, GPUs from compute capability 8.0), and elsewhere, where bfloat16 is emulated, many times slower.

    How right bfloat16 is: every activation has 8 significant bits, as under autocast, so logits move by about
    a hundredth of their size, and an image that was nearly a tie may change its class. Measured on 10,000
    test images of CIFAR-10 and a network of 93 % accuracy: 0.12 % of the predictions changed, as many as
    under autocast; 0.5 % after one epoch of training. Check on your own data. The last bits depend on the
    size of the chunk, as in any eval mode; put a `FixedShape` around the result where that matters. With a
    `dtype` layers must be called as modules: code that hands the weight of a convolution to
    `torch.nn.functional` itself may meet two types, and PyTorch raises RuntimeError.

    Raises ValueError for fewer than one row, or a `dtype` that is not a floating point type; BncliError for a
    model that cannot be copied.
    """
    if rows < 1:
        raise ValueError(f"rows must be 1 or more, got {rows}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating point type such as torch.bfloat16, got {dtype}")
    folding = fold_batch_norm(model)
    network = folding.model.requires_grad_(False)
    output_dtype = None
    if dtype is not None:
        output_dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            # PyTorch's annotations lack `memory_format` alone
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if dtype is not None and isinstance(layer, _ConvNd):
            layer.to(dtype)
        if dtype is not None and isinstance(layer, _ConvNd | nn.Linear):
            layer.register_forward_pre_hook(_cast_to_weight)
    return InferenceNetwork(folding, rows, output_dtype)


def _cast_to_weight(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs of a layer in the type of its weight; the same tensor where it has it already."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return (inputs[0].to(weight.dtype), *inputs[1:])
