"""An ONNX model that is written by hand, so that reading one is tested without what writes ours."""

from pathlib import Path
from typing import Any

import numpy as np

from bncli.export import ExportRecord


def a_record(**values: Any) -> ExportRecord:
    """Of a network of three classes on images of 4 pixels a side."""
    usual: dict[str, Any] = {
        "bncli": "0.0",
        "source": {"file": "last.pt", "sha256": "ab" * 32, "epoch": 3},
        "network": "by hand",
        "pixels": "uint8",
        "image_shape": (3, 4, 4),
        "normalization": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        "resize": None,
        "interpolation": "bilinear",
        "class_names": ("cat", "dog", "ship"),
        "precision": "float32",
        "folded": (("norm", "conv"),),
        "kept": (),
        "statistics": {"method": "as in the source"},
        "config": {"data": {"name": "synthetic"}},
    }
    return ExportRecord(**usual | values)


WEIGHT = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32) / 50


def write_onnx(path: Path, text: str | None) -> Path:
    """The mean of each channel times WEIGHT, of uint8 images (N, 3, 4, 4)."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weight"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "by_hand",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])],
        [
            numpy_helper.from_array(np.array([2, 3], np.int64), "axes"),
            numpy_helper.from_array(WEIGHT, "weight"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    if text is not None:
        helper.set_model_props(model, {"other": "x", "bncli": text})
    path.write_bytes(model.SerializeToString())
    return path


def logits_of(images: np.ndarray) -> np.ndarray:
    """The oracle, in float64."""
    means: np.ndarray = images.astype(np.float64).mean((2, 3)) @ WEIGHT.astype(np.float64)
    return means
