"""Exported files, recognised by their first bytes, and the record in them; nothing in them is computed.

ONNX holds it in `metadata_props`, OpenVINO in the `rt_info` of its .xml, torch.export's .pt2 among its extra
files. No PyTorch and no engine is imported.
"""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.parsers import expat

from bncli.checkpoints.byte_source import UnreadableFileError, open_source
from bncli.checkpoints.formats.protobuf import BYTES, VARINT, Wire
from bncli.errors import CheckpointError
from bncli.export.record import KEY, MAX_BYTES, ExportRecord

Kind = Literal["onnx", "openvino", "pt2"]
NAMES: dict[Kind, str] = {
    "onnx": "an ONNX model",
    "openvino": "an OpenVINO model",
    "pt2": "a torch.export file",
}
MAX_HEADER = 100_000_000  # bytes of safetensors' own limit
_PROPERTIES = 14  # the field of an ONNX model that holds its metadata


@dataclass(frozen=True)
class ExportedFile:
    """A file that an engine computes."""

    path: Path
    kind: Kind
    record: ExportRecord | None  # None: another program wrote it

    @property
    def known(self) -> ExportRecord:
        """The record. Raises CheckpointError where there is none."""
        if self.record is None:
            raise CheckpointError(
                f"{self.path}: {NAMES[self.kind]} that `bncli export` did not write, so nothing says which"
                " images it takes and what its outputs mean; export the checkpoint that it was made from"
            )
        return self.record


def exported_file(path: Path) -> ExportedFile | None:
    """What a file is; None for one of another kind, and for one that cannot be read.

    Raises CheckpointError for a damaged record.
    """
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        with path.open("rb") as opened:
            start = opened.read(300)
    except OSError:
        return None
    kind: Kind
    read: Callable[[Path], str | None]
    if start[:1] == b"\x08":
        kind, read = "onnx", _text_of_onnx
    elif start.lstrip()[:5] == b"<?xml" or start.lstrip()[:4] == b"<net":
        kind, read = "openvino", _text_of_xml
    elif start[:4] == b"PK\x03\x04":
        kind, read = "pt2", _text_of_pt2
    else:
        return None
    found = read(path)
    if found is None:
        return None
    return ExportedFile(path, kind, ExportRecord.from_json(found, str(path)) if found else None)


def exported_record(path: Path) -> ExportRecord | None:
    """The record in a file of `bncli export`, .safetensors included; None in all others.

    Raises CheckpointError for a damaged one.
    """
    text = _text_of_safetensors(path) if path.is_file() else None
    if text is not None:
        return ExportRecord.from_json(text, str(path))
    found = exported_file(path)
    return None if found is None else found.record


def _text_of_safetensors(path: Path) -> str | None:
    """A header of JSON behind its length; its metadata are texts."""
    try:
        with path.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = opened.read(size) if size <= MAX_HEADER else b""
        content = json.loads(header) if header[:1] == b"{" else {}
        text = content.get("__metadata__", {}).get(KEY)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return text if isinstance(text, str) else None


def _text_of_onnx(path: Path) -> str | None:
    """The record; '' for a model without one, None for another file."""
    text, has_graph = "", False
    try:
        with open_source(str(path)) as source:
            wire = Wire(source)
            for number, one in enumerate(wire.fields()):
                if number == 0 and not (one.number == 1 and one.kind == VARINT and 1 <= one.value <= 100):
                    return None
                has_graph |= one.number == 7 and one.kind == BYTES
                if one.number == _PROPERTIES and one.kind == BYTES and one.size <= MAX_BYTES:
                    entry = {
                        part.number: wire.bytes_of(part, MAX_BYTES).decode("utf-8", "replace")
                        for part in wire.inside(one)
                    }
                    text = entry.get(2, "") if entry.get(1) == KEY else text
    except (UnreadableFileError, CheckpointError):
        return None
    return text if has_graph else None


def _text_of_xml(path: Path) -> str | None:
    """The same of OpenVINO's: <net> with <rt_info><bncli value="..."/></rt_info> directly below."""
    found: list[str] = []
    way: list[str] = []
    is_net: list[bool] = []

    def begin(name: str, attributes: dict[str, str]) -> None:
        way.append(name)
        is_net[:] = is_net or [name == "net"]
        if way == ["net", "rt_info", KEY]:
            found.append(attributes.get("value", "")[:MAX_BYTES])

    parser = expat.ParserCreate()
    parser.StartElementHandler = begin
    parser.EndElementHandler = lambda _: way.pop()
    parser.EntityDeclHandler = _no_entities  # of a few bytes they can make gigabytes
    try:
        with path.open("rb") as opened:
            parser.ParseFile(opened)
    except (expat.ExpatError, OSError, ValueError):
        return None
    if is_net != [True]:
        return None
    return found[0] if found else ""


def _no_entities(*_: object) -> None:
    raise ValueError("entities")


def _text_of_pt2(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            formats = [name for name in names if name.count("/") == 1 and name.endswith("/archive_format")]
            if len(formats) != 1:
                return None
            text = f"{formats[0].partition('/')[0]}/extra/{KEY}"
            if text not in names:
                return ""
            with archive.open(text) as opened:
                return opened.read(MAX_BYTES).decode("utf-8", "replace")
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError, NotImplementedError):
        return None
