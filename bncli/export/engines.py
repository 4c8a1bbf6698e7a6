"""ONNX Runtime and OpenVINO as functions of numpy arrays: images to outputs. PyTorch is not imported."""

import importlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from bncli.errors import BncliError, CheckpointError
from bncli.export.openvino_pooling import mend_pooling
from bncli.export.record import Precision

Array = npt.NDArray[Any]
Extra = Literal["onnx", "openvino"]
EngineName = Literal["onnxruntime", "openvino"]
_PACKAGES: dict[Extra, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
}


class MissingEngineError(BncliError):
    """An engine, or what writes for it, is not installed."""


_EXTRAS: dict[EngineName, Extra] = {"onnxruntime": "onnx", "openvino": "openvino"}
TITLES: dict[EngineName, str] = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def require_engine(name: EngineName) -> None:
    """Raise MissingEngineError unless the engine can be handed a network here."""
    require(_EXTRAS[name])


def require(extra: Extra, *packages: str) -> None:
    """Raise MissingEngineError unless the packages of an extra (default: all of them) are installed."""
    missing = [name for name in packages or _PACKAGES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingEngineError(
            f"{' and '.join(missing)} {verb} not installed: pip install 'bncli[{extra}]'"
        )


class Engine(Protocol):
    """What computes an exported file."""

    @property
    def description(self) -> str:
        """Its name and version."""

    def __call__(self, images: Array) -> Array:
        """Images (N, ...) in the file's own type to outputs (N, ...). Raises BncliError where it cannot."""


@dataclass(frozen=True)
class OnnxRuntime:
    """An open session, on the CPU."""

    description: str
    path: Path
    session: Any

    @classmethod
    def open(cls, path: Path, threads: int | None = None) -> "OnnxRuntime":
        """With as many threads as the engine likes where none are given.

        Raises MissingEngineError, and CheckpointError for a model that it cannot compute.
        """
        require("onnx", "onnxruntime")
        engine: Any = importlib.import_module("onnxruntime")
        engine.set_default_logger_severity(3)  # errors alone: they are raised as well
        options = engine.SessionOptions()
        options.intra_op_num_threads = threads or 0
        try:
            session = engine.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its classes have no common base
            raise CheckpointError(f"{path}: ONNX Runtime cannot open it: {in_one_line(error)}") from None
        return cls(f"ONNX Runtime {engine.__version__}", path, session)

    def __call__(self, images: Array) -> Array:
        """See `Engine`."""
        try:
            outputs = self.session.run(None, {self.session.get_inputs()[0].name: images})
        except Exception as error:
            raise BncliError(f"{self.path}: ONNX Runtime cannot compute it: {in_one_line(error)}") from None
        return np.asarray(outputs[0])


@dataclass(frozen=True)
class OpenVino:
    """A compiled model, on the CPU."""

    description: str
    path: Path
    request: Any  # one for all calls: to make another takes longer than a small network
    engine: Any

    @classmethod
    def open(cls, path: Path, threads: int | None = None, precision: Precision = "float32") -> "OpenVino":
        """The same, also of an .onnx file, in float32 unless `precision` is bfloat16.

        Left alone OpenVINO would take what is fast.
        """
        require("openvino")
        engine: Any = importlib.import_module("openvino")
        settings = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        try:
            core = engine.Core()
            model = core.read_model(path)
            mend_pooling(model)
            request = core.compile_model(model, "CPU", settings).create_infer_request()
        except Exception as error:
            raise CheckpointError(f"{path}: OpenVINO cannot open it: {in_one_line(error)}") from None
        return cls(f"OpenVINO {engine.__version__.partition('-')[0]}", path, request, engine)

    def __call__(self, images: Array) -> Array:
        """See `Engine`."""
        try:
            self.request.set_input_tensor(self.engine.Tensor(images, shared_memory=True))
            self.request.infer()
            # its own memory is used again by the next call
            return np.array(self.request.get_output_tensor().data)
        except Exception as error:
            raise BncliError(f"{self.path}: OpenVINO cannot compute it: {in_one_line(error)}") from None


def in_one_line(error: Exception, longest: int = 300) -> str:
    """What an engine says, short, and without the places in its own code."""
    text = " ".join(str(error).split())
    text = re.sub(r"(Exception from|Check '[^']*' failed at) \S+:\d+: ", "", text) or type(error).__name__
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
