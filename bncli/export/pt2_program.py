"""What a .pt2 file would have PyTorch run, looked at before PyTorch opens it.

`torch.export.load` unpickles tensors that are marked so, evaluates expressions of sizes, compiles guards, and
calls whatever a node names below `torch`. So a file may do anything. Here one is let through that calls the
operators of `torch.ops.aten` and arithmetic alone, and whose other texts are sizes. That is what
`bncli export` writes.
"""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bncli.errors import CheckpointError

MAX_JSON = 256 * 2**20  # bytes of one description
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims)\.\w+\.\w+|torch\.ops\.higher_order\.wrap_with_(autocast|set_grad_enabled)"
    r"|_operator\.[a-z]+|torch\.sym_(float|int|max|min|not)|math\.[a-z]+"
)
_CALLED = {
    *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "PythonMod", "FloorDiv"),
    *("CleanDiv", "CeilDiv", "Max", "Min", "Eq", "Ne", "Equality", "Unequality", "And", "Or", "Not"),
    *("StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "IntTrueDiv", "ToFloat"),
}
_SIZES = re.compile(r"[\w\s(),'=*/+.<>-]*")
_SYMBOL = re.compile(r"[su]\d+")
_CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict"}


def check_pt2(path: Path) -> None:
    """Raise CheckpointError for a file that does more than to compute, or that cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = entry.filename.partition("/")[2]
                if name.startswith("data/aotinductor") or "custom_obj" in name:
                    raise _refused(path, f"it holds {name[:80]}, which is code or a pickle")
                if name.startswith(("models/", "data/")) and name.endswith(".json"):
                    if entry.file_size > MAX_JSON:
                        raise _refused(path, f"its {name[:80]} has {entry.file_size:,} bytes")
                    problem = next(_problems(json.loads(archive.read(entry))), None)
                    if problem is not None:
                        raise _refused(path, problem)
    except (OSError, zipfile.BadZipFile, ValueError, RecursionError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: a damaged torch.export file: {error}") from None


def _refused(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: not opened, since it may run code: {why}")


def _problems(value: Any) -> Iterator[str]:
    """What is not among what is let through."""
    if isinstance(value, list):
        for one in value:
            yield from _problems(one)
    if not isinstance(value, dict):
        return
    for key, one in value.items():
        shown = repr(one)[:80]
        if key == "use_pickle" and one is not False:
            yield "it holds a pickle"
        elif key == "guards_code" and one:
            yield f"it holds Python code, {shown}"
        elif key == "target" and "inputs" in value and not _OPERATOR.fullmatch(str(one)):
            yield f"it calls {shown}"
        elif key == "expr_str" and not _are_sizes(str(one)):
            yield f"it evaluates {shown}"
        elif key in ("in_spec", "out_spec") and not _is_plain(one):
            yield f"it makes objects of its own, {shown}"
        else:
            yield from _problems(one)


def _are_sizes(text: str) -> bool:
    if not _SIZES.fullmatch(text) or "__" in text or re.search(r"[A-Za-z_)']\s*\.|\.\s*[A-Za-z_]", text):
        return False
    names = set(re.findall(r"[A-Za-z_]\w*", text))
    known = {"positive", "integer", "nonnegative", "real", "True", "False"}
    return all(name in _CALLED | known or _SYMBOL.fullmatch(name) for name in names)


def _is_plain(text: Any) -> bool:
    """Whether a description of nested arguments has tuples, lists and dicts alone."""
    if not text:
        return True

    def kinds(value: Any) -> Iterator[Any]:
        if isinstance(value, list):
            for one in value:
                yield from kinds(one)
        if isinstance(value, dict):
            yield value.get("type")
            yield from kinds(value.get("children_spec"))

    return set(kinds(json.loads(text))) <= _CONTAINERS
