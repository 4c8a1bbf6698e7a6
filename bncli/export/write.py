"""Writing a prepared network: ONNX, OpenVINO, torch.export and safetensors, each with its record.

A folder beside the output takes the files; whoever asked for them moves them to their place when they are
proved.
"""

import importlib
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bncli.atomic_file import sync_directory
from bncli.errors import BncliError, ConfigError
from bncli.export.engines import in_one_line, require
from bncli.export.openvino_pooling import mend_pooling
from bncli.export.record import KEY, ExportRecord

Format = Literal["onnx", "openvino", "pt2", "safetensors"]
FORMATS: dict[str, Format] = {
    ".onnx": "onnx",
    ".xml": "openvino",
    ".pt2": "pt2",
    ".safetensors": "safetensors",
}
OPSET = 20  # of ONNX; what came later adds nothing that such networks need, and older engines read it
IMAGES, LOGITS, BATCH = "images", "logits", "N"  # names of input, output and the axis of images
MAX_ONNX = 2**31 - 1  # bytes of a protocol buffer
# of a node's metadata: where the code lay on this machine, and the code again
_PRIVATE = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")


def format_of(path: Path) -> Format:
    """What the name asks for. Raises ConfigError for another ending."""
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        raise ConfigError(
            "--output", [f"expected a name that ends in {', '.join(FORMATS)}, found {path.name!r}"]
        )
    return found


def require_writer(kind: Format) -> None:
    """Raise MissingEngineError where a package is missing that writes the format, or computes it."""
    if kind in ("onnx", "openvino"):
        require(kind)
    elif kind == "safetensors" and importlib.util.find_spec("safetensors") is None:
        raise BncliError("safetensors is not installed: pip install safetensors")


@contextmanager
def written(network: nn.Module, example: Tensor, path: Path, record: ExportRecord) -> Iterator[Path]:
    """Write the network, and give the file's path in a folder that is gone after the block.

    `example` are two inputs. Raises BncliError for a network that cannot be exported, OSError where the disk
    says no.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as folder:
        file = Path(folder) / path.name
        kind = format_of(path)
        if kind == "safetensors":
            file.write_bytes(_as_safetensors(network, record))
        else:
            program = _exported(network, example)
            if kind == "pt2":
                file.write_bytes(_as_pt2(program, record))
            elif kind == "onnx":
                file.write_bytes(_as_onnx(program, record))
            else:
                _write_openvino(program, file, record)
        yield file


def move_into_place(file: Path, path: Path) -> tuple[Path, ...]:
    """The files of a folder to where they are to be, the named one last. Returns their paths there."""
    beside = sorted(one for one in file.parent.iterdir() if one != file)
    targets = []
    for one in (*beside, file):
        target = path.parent / one.name
        with one.open("rb") as opened:
            os.fsync(opened.fileno())
        one.replace(target)
        targets.append(target)
    sync_directory(path.parent)
    return tuple(targets)


def _exported(network: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Its operations, for batches of any size."""
    batch = torch.export.Dim(BATCH)
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # whatever its code may raise
        raise BncliError(f"the network cannot be exported: {_reason(error)}") from None
    for module in program.graph_module.modules():  # those below hold what runs without autocast, say
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine
    outputs = program.graph.output_node().args[0]
    if len(outputs) != 1:
        raise BncliError(
            "the network cannot be exported: it returns several outputs; --logits NAME takes one of them"
        )
    return program


def _reason(error: Exception) -> str:
    text = str(error)
    if "your code specialized it to be a constant" in text:
        return "its code works for batches of one size only, that of the example (2)"
    if "data-dependent" in text:
        return "what it computes depends on the numbers in an image (an if, or a size taken from a tensor)"
    return f"{type(error).__name__}: {in_one_line(Exception(text.strip().partition(chr(10))[0]))}"


def _as_pt2(program: torch.export.ExportedProgram, record: ExportRecord) -> bytes:
    memory = io.BytesIO()
    with _quiet():
        torch.export.save(program, memory, extra_files={KEY: record.to_json()})
    return memory.getvalue()


def _as_onnx(program: torch.export.ExportedProgram, record: ExportRecord | None) -> bytes:
    # the exporter's own optimisation folds BatchNorm as well, where it is behind a convolution
    keeps = record is not None and bool(record.kept) and not record.folded
    try:
        with _quiet():
            made: Any = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=[IMAGES], output_names=[LOGITS],
                verbose=False, optimize=not keeps,
            )  # fmt: skip
    except Exception as error:
        raise BncliError(f"the network cannot be written as ONNX: {_unsupported(error, program)}") from None
    model = made.model
    made.rename_axes({str(model.graph.inputs[0].shape[0]): BATCH})  # torch.export has a symbol for it, as s34
    for function in (model.graph, *model.functions.values()):
        for node in function:
            for key in _PRIVATE:
                node.metadata_props.pop(key, None)
    if record is not None:
        model.metadata_props[KEY] = record.to_json()
    proto = made.model_proto
    if proto.ByteSize() > MAX_ONNX:
        raise BncliError(
            "the network is larger than the 2 GB that one ONNX file can hold; write .pt2 or .xml"
        )
    content: bytes = proto.SerializeToString()
    return content


def engine_files(network: nn.Module, example: Tensor, *files: Path) -> None:
    """The network as .onnx, or as OpenVINO's .xml and .bin, without a record: for who computes it at once.

    `example` are two inputs. Raises BncliError where it cannot be exported.
    """
    program = _exported(network, example)
    for file in files:
        if format_of(file) == "onnx":
            file.write_bytes(_as_onnx(program, None))
        else:
            _write_openvino(program, file, None)


def _write_openvino(program: torch.export.ExportedProgram, file: Path, record: ExportRecord | None) -> None:
    openvino: Any = importlib.import_module("openvino")
    try:
        with _quiet():
            model = openvino.convert_model(program)
            mend_pooling(model)
    except Exception as error:
        reason = _unsupported(error, program)
        raise BncliError(f"the network cannot be written for OpenVINO: {reason}") from None
    is_narrow = record is not None and record.precision == "float16"
    model.inputs[0].get_tensor().set_names({IMAGES})
    model.outputs[0].get_tensor().set_names({LOGITS})
    if record is not None:
        model.set_rt_info(record.to_json(), [KEY])
    try:
        with _quiet():
            openvino.save_model(model, str(file), compress_to_fp16=is_narrow)
    except Exception as error:
        _try_disk(file, program)
        raise BncliError(f"{file.name}: OpenVINO cannot write it: {in_one_line(error)}") from None


def _try_disk(file: Path, program: torch.export.ExportedProgram) -> None:
    """Raise the OSError that another program met and does not name, a full disk say."""
    tensors = program.state_dict.values()
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    file.with_suffix(".bin").write_bytes(bytes(num_bytes))


def _as_safetensors(network: nn.Module, record: ExportRecord) -> bytes:
    save: Any = importlib.import_module("safetensors.torch").save
    # tensors that share memory are refused, and views of others
    state = {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
    content: bytes = save(state, {"format": "pt", KEY: record.to_json()})
    return content


def _unsupported(error: BaseException, program: torch.export.ExportedProgram) -> str:
    """What an exporter says, with the operator and the layer that calls it."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(texts)
    found = re.search(r"No ONNX function found for <OpOverload\(op='(\w+)\.(\w+)'", text) or re.search(
        r"No conversion rule found for operations: (\w+)\.(\w+)", text
    )
    if found is None:
        return in_one_line(Exception(texts[-1]))
    name = found[2]
    for node in program.graph.nodes:
        target = str(node.target)
        if node.op == "call_function" and name in target.split(".")[-2:][0]:
            stack = node.meta.get("nn_module_stack") or {}
            layer = next((path for path, _ in reversed(stack.values()) if path), "")
            where = f"in {layer}" if layer else "in the network's own forward"
            return f"no such operator there: {target.removeprefix('torch.ops.')} ({where})"
    return f"no such operator there: {found[1]}.{name}"


_TALKATIVE = (
    "torch.onnx",
    "torch.export",
    "torch._export",
    "torch.fx",
    "torch.fx.experimental.symbolic_shapes",
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep exporters from printing, logging and warning; what is wrong they raise."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    sink = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(sink), redirect_stderr(sink):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
