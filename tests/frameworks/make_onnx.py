"""ONNX models from PyTorch's two exporters, for tests/checkpoints/formats/test_onnx.py.

    python3.11 -m venv /tmp/v && /tmp/v/bin/pip install torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2
    /tmp/v/bin/python -m tests.frameworks.make_onnx

The truth is PyTorch's own: the modules' buffers and their outputs in eval mode.
"""

import copy
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from tests.frameworks import ten_steps
from tests.frameworks.recorded import FILES, layer, probe, write

PLACE = FILES / "onnx"
warnings.simplefilter("ignore")


class Block(nn.Module):
    """BatchNorm before its convolution, where no exporter can fold it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(torch.relu(self.bn(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3)
        self.folded = nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.plain = nn.BatchNorm2d(4, affine=False, eps=1e-3, momentum=0.01)
        self.shared = nn.BatchNorm2d(4)
        self.cumulative = nn.BatchNorm2d(4, momentum=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(torch.relu(self.folded(self.conv(self.first(x)))))
        x = torch.relu(self.plain(torch.relu(x)))
        return self.cumulative(torch.relu(self.shared(torch.relu(self.shared(x)))))


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        loss = model.train()(2 * torch.randn(4, 3, 8, 8) + 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def said(model: nn.Module, names: list[str]) -> list[dict]:
    found = []
    for name in names:
        module = copy.deepcopy(model.get_submodule(name)).float().eval()
        x = torch.from_numpy(probe(module.num_features))
        ones, zeros = torch.ones(module.num_features), torch.zeros(module.num_features)
        weight, bias = (module.weight, module.bias) if module.affine else (ones, zeros)
        found.append(
            layer(
                name,
                mean=module.running_mean,
                var=module.running_var,
                weight=weight.detach(),
                bias=bias.detach(),
                eps=module.eps,
                momentum=module.momentum,
                momentum_in_file=module.momentum is not None,
                output=module(x[:, :, None, None]).detach(),
            )
        )
    return found


def without_traces(path: Path) -> None:
    """Leave out what PyTorch writes of the machine and the code that exported: paths and stack traces."""
    model = onnx.load(path)
    del model.graph.value_info[:]
    for node in model.graph.node:
        kept = [one for one in node.metadata_props if one.key.endswith((".name_scopes", ".rule_name"))]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    onnx.save(model, path)


ALL = ["first", "blocks.0.bn", "blocks.1.bn", "plain", "shared", "cumulative"]


def record_ten_steps() -> None:
    """Of the operator itself with training_mode, as ONNX's own evaluator computes it."""
    layers = [("images", ten_steps.IMAGES, 0.875, 0.01), ("features", ten_steps.FEATURES, 0.75, 0.02)]

    def model(statistics: dict[str, np.ndarray]) -> onnx.ModelProto:
        nodes, inputs, outputs, values = [], [], [], []
        for name, shape, momentum, eps in layers:
            four = [f"{name}.{leaf}" for leaf in ("weight", "bias", "mean", "var")]
            out = [f"{name}.y", f"{name}.mean_out", f"{name}.var_out"]
            nodes.append(
                helper.make_node(
                    "BatchNormalization", [f"{name}.x", *four], out, name=name,
                    momentum=momentum, epsilon=eps, training_mode=1,
                )
            )  # fmt: skip
            inputs.append(helper.make_tensor_value_info(f"{name}.x", 1, shape))
            outputs += [helper.make_tensor_value_info(one, 1, None) for one in out[1:]]
            values += [numpy_helper.from_array(statistics[one], one) for one in four]
        graph = helper.make_graph(nodes, "two_layers", inputs, outputs, values)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)

    statistics = {
        f"{name}.{leaf}": np.full(shape[1], leaf in ("weight", "var"), "f4")
        for name, shape, _, _ in layers
        for leaf in ("weight", "bias", "mean", "var")
    }

    def train(steps: range) -> None:
        for step in steps:
            given = {f"{name}.x": ten_steps.batch(step, shape) for name, shape, _, _ in layers}
            results = ReferenceEvaluator(model(statistics)).run(None, given)
            names = [f"{name}.{leaf}" for name, _, _, _ in layers for leaf in ("mean", "var")]
            statistics.update(zip(names, (one.astype("f4") for one in results), strict=True))

    train(ten_steps.BEFORE)
    ten_steps.FOLDER.mkdir(parents=True, exist_ok=True)
    onnx.save(model(statistics), ten_steps.FOLDER / "onnx.onnx")
    train(ten_steps.AFTER)
    told = [
        ten_steps.layer(
            name, shape, mean=statistics[f"{name}.mean"], var=statistics[f"{name}.var"],
            momentum=1 - momentum, eps=eps,
        )
        for name, shape, momentum, eps in layers
    ]  # fmt: skip
    ten_steps.write("onnx", "onnx.onnx", told)


def main() -> None:
    PLACE.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    files = {}

    def export(model: nn.Module, name: str, inputs: torch.Tensor = x, **options: object) -> None:
        torch.onnx.export(model, (inputs,), PLACE / name, **{"dynamo": True, "verbose": False, **options})
        without_traces(PLACE / name)

    def note(name: str, model: nn.Module, names: list[str], *notes: str) -> None:
        files[name] = {"framework": "ONNX (of PyTorch)", "layers": said(model, names), "notes": notes}

    model = trained(Net())
    folded = "1 BatchNorm layer more (folded) had been folded"
    once = "called more than once: shared"
    export(model, "dynamo.onnx", external_data=False)
    note("dynamo.onnx", model, ALL, folded, once)
    export(model, "script.onnx", dynamo=False)
    note("script.onnx", model, ALL, once, "the exporter folded some")
    graph = onnx.load(PLACE / "dynamo.onnx")
    onnx.save(
        graph, PLACE / "external.onnx", save_as_external_data=True, location="external.onnx.data",
        size_threshold=0,
    )  # fmt: skip
    note("external.onnx", model, ALL, folded, once)

    fresh = Net().eval()
    export(fresh, "fresh.onnx", external_data=False)
    note("fresh.onnx", fresh, ALL, folded, once)

    half = copy.deepcopy(model).half()
    export(half, "half.onnx", x.half(), external_data=False)
    note("half.onnx", half, ALL, folded, once)

    # such an export runs the model in train mode once, and holds what that leaves
    training = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3, affine=False, momentum=0.3))
    trained(training.append(nn.Conv2d(3, 3, 1)))
    for opset in (11, 17):
        file = f"training_{opset}.onnx"
        mode = torch.onnx.TrainingMode.TRAINING
        export(training.train(), file, dynamo=False, opset_version=opset, training=mode)
        note(file, training, ["0", "2"], "by the batch's own statistics: 0, 2")

    untracked = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3, track_running_stats=False))
    trained(untracked)
    export(untracked, "untracked.onnx", external_data=False)
    export(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), "nothing_left.onnx", external_data=False
    )
    note("untracked.onnx", untracked, ["0"])
    write("onnx", files)
    record_ten_steps()


if __name__ == "__main__":
    main()
