"""Formats that bncli does not read, recognised so that the refusal names them and says what to do instead.

Asked only when no reader knew the file, so that nothing readable is turned away. What a file is shows in its
bytes: a signature, or the shape of its structure. Where a format has neither, its name decides, and the
sentence says so. Layouts come from the published descriptions, and from files that each library wrote.

A reader for one of these formats is a file beside this one; its row here then goes.
"""

import json
from collections.abc import Collection
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from bncli.checkpoints.byte_source import ByteSource, UnreadableFileError
from bncli.checkpoints.formats.inert_pickle import Global, walk
from bncli.checkpoints.formats.protobuf import BYTES, VARINT, Field, Wire
from bncli.checkpoints.formats.tensorflow_bundle import is_table

READ = "bncli does not read it"
# what to do instead: `ARRAYS` for formats that hold running statistics, `ORIGIN` for those that are exported
# for inference, whose BatchNorm is often folded into other layers
ARRAYS = (
    f"{READ}: write its arrays with safetensors.numpy.save_file, named LAYER.running_mean and"
    " LAYER.running_var"
)
ORIGIN = f"{READ}: give the checkpoint that it was exported from"
# what is left of BatchNorm in networks that were converted for inference
_LITE = (
    "BatchNorm was folded into the layers before it, or is one multiplication and one addition, of which mean"
    f" and variance can no longer be told. {ORIGIN}"
)
_CORE_ML = (
    "what is left of BatchNorm has float16 numbers as a rule, or is one subtraction and one multiplication"
    f" where it had no weight. {ORIGIN}"
)
_NCNN = f"BatchNorm that was not folded is in its .bin file, as slope, mean, variance and bias. {ORIGIN}"
_OPENVINO = (
    "BatchNorm was folded into convolutions, or is one multiplication and one addition, of which mean and"
    f" variance can no longer be told. {ORIGIN}"
)
JOIN = 'torch.distributed.checkpoint.format_utils.dcp_to_torch_save("DIRECTORY", "FILE.pt") joins it into one'
GIVE_DIRECTORY = "give its directory, with .metadata and all shards in it"
_OF_SAVED_MODEL = "its numbers lie in variables/ beside it, which is missing"
_OF_OCDBT = "give the directory of the checkpoint that it lies in"
GIVE_INDEX = "give the .index file, with the .data files beside it"
_OF_PADDLE_PROGRAM = f"{READ}; its numbers lie in the .pdiparams file beside it"
_OF_MXNET_SYMBOL = f"{READ}; its numbers lie in the .params file beside it"
UNPACK = "unpack it and give the file inside"
OTHER = f"not a checkpoint; {READ}"

MAX_TEXT = 2**20  # bytes of a text that are looked at
MAX_FIELDS = 16  # of a protocol buffer


class Format(NamedTuple):
    """A kind of file, with its article, and what to do with it."""

    name: str
    advice: str

    @property
    def sentence(self) -> str:
        """What is said instead of reading it."""
        return f"{self.name}; {self.advice}"


# offset, signature
_SIGNATURES = (
    (0, b"GGUF", Format("a GGUF file (llama.cpp)", ARRAYS)),
    (0, b"\x93NUMPY", Format("a NumPy array (.npy)", ARRAYS)),
    (0, b"\xdd\x85\x76\0", Format("a network of ncnn (.param.bin)", _NCNN)),
    (0, b"MATLAB ", Format("a MATLAB file (.mat)", ARRAYS)),
    (0, b"\0\0\0\0\x02\0\0\0\x05\0\0\0", Format("a weight file of Darknet (.weights)", ARRAYS)),
    (4, b"TFL3", Format("a TensorFlow Lite model (.tflite)", _LITE)),
    (4, b"PTMF", Format("a PyTorch Mobile model (flatbuffer, .ptl)", ORIGIN)),
    (4, b"ET12", Format("an ExecuTorch program (.pte)", ORIGIN)),
    (4, b"ORTM", Format("an ONNX Runtime model (.ort)", ORIGIN)),
    (257, b"ustar", Format("a tar archive", f"{UNPACK}; a tar of PyTorch before 0.2 has to be saved again")),
    (0, b"\x1f\x8b", Format("a file compressed by gzip", UNPACK)),
    (0, b"\xfd7zXZ\0", Format("a file compressed by xz", UNPACK)),
    (0, b"BZh", Format("a file compressed by bzip2", UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", Format("a file compressed by zstd", UNPACK)),
    (0, b"\x04\x22\x4d\x18", Format("a file compressed by lz4", UNPACK)),
    (0, b"7z\xbc\xaf\x27\x1c", Format("a 7z archive", UNPACK)),
    (0, b"Rar!\x1a\x07", Format("a RAR archive", UNPACK)),
    (0, b"\x0c\xdb:*", Format("the manifest of an OCDBT database (Orbax, TensorStore)", _OF_OCDBT)),
    (0, b"\x0c\xdb ", Format("a part of an OCDBT database (Orbax, TensorStore)", _OF_OCDBT)),
    (0, b"\x0c\xdb\x124", Format("a part of an OCDBT database (Orbax, TensorStore)", _OF_OCDBT)),
    (0, b"\x89PNG\r\n\x1a\n", Format("a PNG image", OTHER)),
    (0, b"\xff\xd8\xff", Format("a JPEG image", OTHER)),
    (0, b"GIF8", Format("a GIF image", OTHER)),
    (8, b"WEBP", Format("a WebP image", OTHER)),
    (0, b"II*\0", Format("a TIFF image", OTHER)),
    (0, b"MM\0*", Format("a TIFF image", OTHER)),
    (8, b"WAVE", Format("a sound (WAV)", OTHER)),
    (4, b"ftyp", Format("a video or image (MP4, HEIF, AVIF)", OTHER)),
    (0, b"%PDF-", Format("a PDF document", OTHER)),
    (0, b"SQLite format 3\0", Format("an SQLite database", OTHER)),
    (0, b"PAR1", Format("a Parquet file", OTHER)),
    (0, b"ARROW1", Format("an Arrow file", OTHER)),
    (0, b"\x7fELF", Format("a compiled library or program (ELF)", ORIGIN)),
)
# without a signature, or under one that says nothing
UNKNOWN = (
    "bncli reads checkpoints of PyTorch, Keras, TensorFlow, JAX (Flax, Orbax, Haiku, Equinox), ONNX,"
    " PaddlePaddle, MXNet, MindSpore and Chainer, .safetensors and .npz"
)
_HDF5 = b"\x89HDF\r\n\x1a\n"


def recognise_file(source: ByteSource) -> Format | None:
    """What a file is that no reader knows, by its content, or else by its name."""
    return (
        recognise_signature(source)
        or _hdf5(source)
        or _text(source)
        or _protocol_buffer(source)
        or _tensorflow_table(source)
        or recognise_name(source.name)
        or _numbers_beside(source.name)
    )


def recognise_signature(source: ByteSource) -> Format | None:
    """What a file is that begins as no reader's does."""
    start = source.read_at(0, min(source.size, 300))
    return next(
        (found for offset, signature, found in _SIGNATURES if start.startswith(signature, offset)), None
    )


# ---- containers whose entries tell: directories, zip archives, JSON, pickles


def describe_directory(path: str, names: Collection[str]) -> str:
    """What to say of a directory that was given for a checkpoint: its file that was meant, or what it is."""
    meant = next((name for name in _MEANT if name in names), None)
    if meant is not None:
        return f"a directory, not a checkpoint; did you mean {path.rstrip('/')}/{meant}?"
    known = recognise_directory(names)
    return known.sentence if known else "a directory, not a checkpoint"


_MEANT = (
    "last.pt",
    "best.pt",
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


def recognise_directory(names: Collection[str]) -> Format | None:
    """What a directory is, by the names in it and in the directories in it (`0/_METADATA`)."""
    suffixes = {name.rpartition(".")[2] for name in names}
    leaves = {name.rpartition("/")[2] for name in names}
    if ".metadata" in names and "distcp" in suffixes:
        return Format("a directory of torch.distributed.checkpoint, where a file was expected", JOIN)
    if "distcp" in suffixes:
        advice = ".metadata, which says what lies where, is missing; it is written when all ranks are done"
        return Format("shards of torch.distributed.checkpoint", advice)
    if {"saved_model.pb", "saved_model.pbtxt"} & set(names):
        return Format("a SavedModel of TensorFlow without variables", ORIGIN)
    if {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"} & leaves:
        return Format("a checkpoint of Orbax (JAX, Flax)", ARRAYS)
    if "Manifest.json" in names and any(name.startswith("Data") for name in names):
        return Format("a Core ML package (.mlpackage)", _CORE_ML)
    if "coremldata.bin" in names:
        return Format("a compiled Core ML model (.mlmodelc)", _CORE_ML)
    if "zero_to_fp32.py" in names:
        return Format("a checkpoint of DeepSpeed", "its zero_to_fp32.py joins it into files that bncli reads")
    if "data.pkl" in names and {"version", "data"} & set(names):
        return Format(
            "an unpacked file of torch.save", "pack it again, uncompressed: zip -0 -r FILE.pt DIRECTORY"
        )
    if "checkpoint" in names and "index" in suffixes:
        return Format("a directory of TensorFlow checkpoints", GIVE_INDEX)
    return None


def recognise_zip(names: Collection[str], file_name: str) -> Format | None:
    """What a zip archive without a pickle of torch is, by the names of its entries."""
    tops = {name.partition("/")[0] for name in names}
    below = {name.partition("/")[2] for name in names}
    if names and all(name.endswith(".npy") for name in names):
        return Format("NumPy arrays (.npz)", ARRAYS)
    if {".data/extern_modules", ".data/python_version"} & below:
        return Format(
            "a package of torch.package", "load it there and save model.state_dict() with torch.save"
        )
    if {"archive_format", "serialized_exported_program.json"} & {*names, *below}:
        return Format("a program of torch.export (.pt2)", ORIGIN)
    if "MAR-INF" in tops:
        return Format("a model archive of TorchServe (.mar)", UNPACK)
    if "Manifest.json" in below | set(names) and any("com.apple.CoreML" in name for name in names):
        return Format("a packed Core ML package (.mlpackage)", _CORE_ML)
    if any(top.endswith(".dist-info") for top in tops):
        return Format("a Python package (.whl)", f"{UNPACK}, if it has one")
    if "[Content_Types].xml" in names:
        return Format("an office document", OTHER)
    inside = next((name for name in names if PurePosixPath(name).suffix in _CHECKPOINT_SUFFIXES), None)
    if inside is not None:
        return Format(f"a zip archive that holds {inside[:80]}", UNPACK)
    return recognise_name(file_name)


_CHECKPOINT_SUFFIXES = {
    ".pt",
    ".pth",
    ".ckpt",
    ".bin",
    ".safetensors",
    ".tar",
    ".h5",
    ".keras",
    ".onnx",
    ".npz",
    ".tflite",
    ".msgpack",
    ".pdparams",
    ".params",
}


def recognise_json(content: dict[str, object]) -> Format | None:
    """What a JSON object is that is no index of shards."""
    keys = set(content)
    if {"nodes", "arg_nodes"} <= keys:
        return Format("a network of MXNet (-symbol.json), without numbers", _OF_MXNET_SYMBOL)
    if "base_code" in keys:
        return Format("a program of Paddle (.json), without numbers", _OF_PADDLE_PROGRAM)
    if {"weightsManifest", "modelTopology"} & keys:
        return Format("a model of TensorFlow.js", ARRAYS)
    if {"model_type", "architectures", "_class_name"} & keys:
        return Format(
            "the configuration of a Hugging Face model", "give its model.safetensors or *.index.json"
        )
    return None


def recognise_pickle(content: object, file_name: str) -> Format | None:
    """What a pickle is that torch.save did not write; `content` is what `read_pickle` made of it."""
    kinds = {node for node in walk(content) if isinstance(node, Global)}
    if any(kind.module.startswith("torch.distributed.checkpoint") for kind in kinds):
        return Format("the metadata of torch.distributed.checkpoint", GIVE_DIRECTORY)
    if isinstance(content, dict) and "StructuredToParameterName@@" in content:
        return Format("a parameter file of Paddle (.pdparams)", ARRAYS)
    if any(kind.module.startswith("torch") for kind in kinds):
        return Format(
            "a pickle of PyTorch objects, not made by torch.save", "load it, and save it with torch.save"
        )
    named = recognise_name(file_name)
    if named is not None:
        return named
    if any(kind.module.startswith("numpy") for kind in kinds):
        return Format("a pickle with NumPy arrays, not made by torch.save", ARRAYS)
    return None


def recognise_shard(content: object, file_name: str) -> Format | None:
    """A shard of torch.distributed.checkpoint: files of torch.save, one after another, of one value each.

    `content` is the value of the last one, and no dict.
    """
    if isinstance(content, dict) or not file_name.endswith(".distcp"):
        return None
    return recognise_name(file_name)


# ---- files whose structure tells


def _hdf5(source: ByteSource) -> Format | None:
    # Keras leaves no block of the user's before the signature
    starts = (offset for offset in (512, 1024, 2048) if offset + 8 <= source.size)
    is_hdf5 = any(source.read_at(offset, 8) == _HDF5 for offset in starts)
    return Format("an HDF5 file, but not one that Keras wrote", ARRAYS) if is_hdf5 else None


def _text(source: ByteSource) -> Format | None:
    data = source.read_at(0, min(source.size, MAX_TEXT))
    try:
        text = data.decode("utf-8-sig", "strict" if len(data) < MAX_TEXT else "ignore").lstrip()
    except UnicodeDecodeError:
        return None
    if any(character < " " and character not in "\t\n\r\f\x1b" for character in text):
        return None
    head = text[:1000].lower()
    if text.startswith("version https://git-lfs.github.com/spec"):
        return Format("a pointer of Git LFS, not the file itself", "fetch the file: git lfs pull")
    if head.startswith(("<!doctype html", "<html")):
        return Format(
            "a web page (HTML), not the file itself", "download the file again, from its direct link"
        )
    if head.startswith("<?xml") or head.startswith("<net "):
        if "<net " in head:
            return Format("a network of OpenVINO (.xml), without numbers", _OPENVINO)
        return Format("XML, such as a server's error message", "download the file again")
    if head.startswith("model_checkpoint_path:"):
        return Format("the list of a directory of TensorFlow checkpoints", GIVE_INDEX)
    if text.startswith("7767517"):
        return Format("a network of ncnn (.param), without numbers", _NCNN)
    if head.startswith("node {") and "\n  op:" in head:
        return Format("a graph of TensorFlow (.pbtxt)", ORIGIN)
    if text[:1] in ("{", "["):
        return _json(text, whole=source.size <= MAX_TEXT)
    # none of it is shown: it may be a secret, and the log public
    return Format("plain text" if text else "white space", OTHER)


def _json(text: str, *, whole: bool) -> Format | None:
    """JSON that no reader took."""
    try:
        content = json.loads(text) if whole else None
    except (ValueError, RecursionError):
        content = None
    found = recognise_json(content) if isinstance(content, dict) else None
    return found or Format("JSON" if content is not None else "text", OTHER)


def _protocol_buffer(source: ByteSource) -> Format | None:
    """Core ML, TensorFlow, Caffe and Paddle: each by the numbers of its first fields."""
    try:
        fields = _fields(source, 0, source.size)
        if not fields or fields[0].number != 1:
            return None
        numbers, first = {field.number for field in fields}, fields[0]
        if first.kind == VARINT:
            return _of_version(numbers) if 1 <= first.value <= 100 else None
        if first.kind != BYTES:
            return None
        if 100 in numbers and _is_name(source, first):
            return Format("a network of Caffe (.caffemodel)", ARRAYS)
        return _of_first_message(source, _fields(source, first.start, first.end)[:2])
    except UnreadableFileError:
        return None


def _of_version(numbers: set[int]) -> Format | None:
    """A message that begins with a version: which one, by the numbers of its fields."""
    if any(number >= 200 for number in numbers):
        return Format("a Core ML model (.mlmodel)", _CORE_ML)
    return (
        Format("a saved_model.pb of TensorFlow, without numbers", _OF_SAVED_MODEL)
        if numbers == {1, 2}
        else None
    )


def _of_first_message(source: ByteSource, fields: list[Field]) -> Format | None:
    """A message that begins with another one: which, by the first two fields of that."""
    kinds = [(field.number, field.kind) for field in fields]
    if kinds == [(1, VARINT), (2, VARINT)]:
        return Format("a program of Paddle (.pdmodel), without numbers", _OF_PADDLE_PROGRAM)
    if kinds != [(1, BYTES), (2, BYTES)] or not _is_name(source, fields[0]):
        return None
    return Format("a graph of TensorFlow (.pb)", ORIGIN) if _is_name(source, fields[1]) else None


def _fields(source: ByteSource, start: int, end: int) -> list[Field]:
    """The first fields of a message.

    Raises:
        UnreadableFileError: what stands there is no message of a protocol buffer.
    """
    return list(islice(Wire(source).fields(start, end), MAX_FIELDS))


def _is_name(source: ByteSource, field: Field) -> bool:
    """Whether a field is a name: printable, not empty, not long."""
    if not 0 < field.size <= 1000:
        return False
    data = source.read_at(field.start, field.size)
    return data.isascii() and data.decode("ascii").isprintable()


def _tensorflow_table(source: ByteSource) -> Format | None:
    # the first key of a checkpoint's index is empty; this one's is not
    return Format("a table of LevelDB", OTHER) if is_table(source) else None


def _numbers_beside(file_name: str) -> Format | None:
    """The numbers of a network whose description lies beside them, under the same name."""
    if "://" in file_name or not file_name.endswith(".bin"):
        return None
    for suffix, framework, advice in ((".xml", "OpenVINO", _OPENVINO), (".param", "ncnn", _NCNN)):
        if Path(file_name).with_suffix(suffix).is_file():
            return Format(f"by the {suffix} file beside it the numbers of a network of {framework}", advice)
    return None


# suffix of the name: where the bytes do not tell
_NAMES = (
    (".distcp", Format("a shard of torch.distributed.checkpoint", GIVE_DIRECTORY)),
    (".engine", Format("an engine of TensorRT", ORIGIN)),
    (".plan", Format("an engine of TensorRT", ORIGIN)),
    (".trt", Format("an engine of TensorRT", ORIGIN)),
    (".pdparams", Format("a parameter file of Paddle", ARRAYS)),
    (".pdopt", Format("the optimizer's state of Paddle", ARRAYS)),
    (".caffemodel", Format("a network of Caffe", ARRAYS)),
    (".ckpt.meta", Format("the graph of a TensorFlow checkpoint", GIVE_INDEX)),
    (".tflite", Format("a TensorFlow Lite model", _LITE)),
    (".mnn", Format("a network of MNN", ORIGIN)),
    (".rknn", Format("a network of RKNN", ORIGIN)),
)


def recognise_name(file_name: str) -> Format | None:
    """A format that only the file's name tells; the answer says so."""
    name = file_name.rstrip("/").rpartition("/")[2]
    for suffix, found in _NAMES:
        if name.endswith(suffix):
            return Format(f"by its name {found.name}", found.advice)
    if ".data-" in name and "-of-" in name:  # model.ckpt.data-00000-of-00001
        return Format("by its name the numbers of a TensorFlow checkpoint", GIVE_INDEX)
    return None
