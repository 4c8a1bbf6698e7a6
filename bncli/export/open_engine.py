"""The engine of an exported file. PyTorch is imported for its own files alone."""

from bncli.export.engines import Engine, OnnxRuntime, OpenVino
from bncli.export.exported_file import ExportedFile


def open_engine(exported: ExportedFile, threads: int | None = None) -> Engine:
    """What computes a file of this kind, on the CPU; PyTorch with the threads that it has.

    Raises MissingEngineError where it is not installed, CheckpointError where it cannot compute the file.
    """
    if exported.kind == "onnx":
        return OnnxRuntime.open(exported.path, threads)
    if exported.kind == "openvino":
        return OpenVino.open(exported.path, threads, exported.known.precision)
    from bncli.export.torch_engine import TorchExport

    return TorchExport(exported.path)
