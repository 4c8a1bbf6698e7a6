"""A fault of OpenVINO's CPU plugin, and a graph in which it does not occur.

The plugin moves an activation behind max pooling ahead of it, into the convolution before. Of GELU, SiLU,
Hardswish, Mish and the absolute value that is another function, since they fall somewhere: the largest input
of a window does not give the largest output. It looks for a pooling with one reader. So here the pooling gets
a second one: its output is the maximum of itself and itself, which is the same number. Shown in
`findings/openvino-moves-gelu-ahead-of-max-pooling.sh`.
"""

import importlib
from typing import Any

# that are never moved, or keep their order where they are; more are mended, at the price of a copy
_HARMLESS = {
    *("Relu", "Convolution", "GroupConvolution", "MatMul", "MaxPool", "AvgPool", "Concat", "Reshape"),
    *("Result", "Maximum", "ReduceMax", "ReduceMean"),
}


def mend_pooling(model: Any) -> None:
    """Change an `openvino.Model` in place, so that what follows max pooling is computed behind it."""
    maximum = importlib.import_module("openvino.opset13").maximum
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MaxPool":
            continue
        output = node.output(0)
        readers = list(output.get_target_inputs())
        if all(reader.get_node().get_type_name() in _HARMLESS for reader in readers):
            continue
        same = maximum(output, output).output(0)
        for reader in readers:
            reader.replace_source_output(same)
