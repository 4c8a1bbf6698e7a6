"""Results as plain values and as strict JSON, which has neither NaN nor infinity."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel


def to_plain(value: Any) -> Any:
    """Dataclasses and mappings as dicts, sequences and tensors as lists, non-finite numbers as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, BaseModel):
        return to_plain(value.model_dump(mode="json"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a tensor or an array, without importing either
        return to_plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"no plain form of {type(value).__name__}")


def to_json(value: Any, *, in_lines: bool = False) -> str:
    """Strict JSON of anything `to_plain` takes; `in_lines` with a line for each entry of its parts."""
    plain = to_plain(value)
    return _in_lines(plain, depth=2) if in_lines else json.dumps(plain, allow_nan=False)


def _in_lines(value: Any, *, depth: int, margin: str = "") -> str:
    # the standard library's indent is written in Python, and slow where there are 10,000 layers
    if depth == 0 or not value or not isinstance(value, dict | list):
        return json.dumps(value, allow_nan=False)
    inner = f"{margin}  "
    if isinstance(value, dict):
        parts = [
            f"{json.dumps(key)}: {_in_lines(item, depth=depth - 1, margin=inner)}"
            for key, item in value.items()
        ]
    else:
        parts = [_in_lines(item, depth=depth - 1, margin=inner) for item in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return f"{start}\n{inner}" + f",\n{inner}".join(parts) + f"\n{margin}{end}"
