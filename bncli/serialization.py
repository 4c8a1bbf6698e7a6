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


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON of anything `to_plain` takes."""
    return json.dumps(to_plain(value), indent=indent, allow_nan=False)
