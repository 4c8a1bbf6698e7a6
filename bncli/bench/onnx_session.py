"""A network in ONNX Runtime: the rival that engineers compare CPU inference with."""

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def missing_packages() -> tuple[str, ...]:
    """Which of the packages that `onnx_classifier` needs are not installed."""
    return tuple(name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None)


def onnx_classifier(model: nn.Module, images: Tensor) -> tuple[Callable[[Tensor], Tensor], str]:
    """The model as a function from images (N, 3, H, W) to logits (N, num_classes), and the runtime's version.

    Float32 on the CPU, with as many threads as PyTorch has, after all optimisations of ONNX Runtime, which
    folds BatchNorm as well. `images` are an example of the inputs, on the CPU like the model.
    """
    # the exporter that needs no other package is deprecated, and says so
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        onnxruntime: Any = importlib.import_module("onnxruntime")
        file = Path(folder) / "network.onnx"
        torch.onnx.export(
            model,
            (images,),
            file,
            dynamo=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "N"}, "logits": {0: "N"}},
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def classify(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(logits)

    return classify, str(onnxruntime.__version__)
