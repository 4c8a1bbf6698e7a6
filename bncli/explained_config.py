"""The configuration explained: as YAML with every key's meaning above it, and single keys by name.

Meanings, ranges and defaults come from the models in `bncli.config`, by way of their JSON schema.
"""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from bncli.config import Config
from bncli.config_file import dump_value

WIDTH = 80  # columns of a comment
OTHER_NETWORKS = "other networks"  # than convnet
OTHER_DATA_SETS = "other data sets"  # than those with a name of bncli's


@dataclass(frozen=True)
class ExplainedKey:
    """What one key of a configuration means."""

    key: str  # dotted, such as train.momentum
    data_set: str | None  # for keys of `data`: the data.name that has the key
    network: str | None  # for keys of `model`: the networks that have it
    meaning: str
    allowed: str  # type and range
    default: Any


def config_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a configuration file: editors complete and check keys by it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Config.model_json_schema()


def explain_config(config: Config, *, header: list[str], comments: Mapping[str, str]) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one: every key, with its meaning.

    Args:
        config: what to write.
        header: lines of comment to begin with.
        comments: what follows a value on its line, by dotted key.
    """
    return "\n".join([*header, *_lines_of(config, "", comments)]).lstrip("\n") + "\n"


def _lines_of(section: BaseModel, prefix: str, comments: Mapping[str, str]) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for name, field in type(section).model_fields.items():
        value, meaning = getattr(section, name), field.description or ""
        if isinstance(value, BaseModel):
            yield from ["", *_comment(meaning, indent), f"{indent}{name}:"]
            yield from _lines_of(value, f"{prefix}{name}.", comments)
            continue
        if value != field.default and not field.is_required():
            meaning += f" Default: {_as_yaml(field.default)}."
        yield from _comment(meaning, indent)
        # lines after the first of a text are indented too, which YAML ignores
        written = _as_yaml(value).replace("\n", f"\n{indent}")
        own = comments.get(f"{prefix}{name}")
        yield f"{indent}{name}: {written}" + (f"  {own}" if own else "")


def _comment(text: str, indent: str) -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(text, WIDTH, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False)


def _as_yaml(value: Any) -> str:
    return dump_value(list(value) if isinstance(value, tuple) else value)


def explained_keys(name: str | None = None) -> list[ExplainedKey]:
    """The keys of a name: `train.momentum`, all of a section (`train`), or all that end in it (`momentum`).

    None is every key. Empty where there is none of that name.
    """
    schema = config_schema()
    keys = _keys_of(schema, schema["$defs"], "", None)
    return [key for key in keys if name is None or f".{name}." in f".{key.key}."]


def _keys_of(
    section: dict[str, Any], definitions: dict[str, Any], prefix: str, kind: str | None
) -> Iterator[ExplainedKey]:
    """Every key below a section of the JSON schema; `kind` is the one of several that the section is."""
    for name, schema in section["properties"].items():
        kinds = [part["$ref"].rpartition("/")[2] for part in schema.get("oneOf", [schema]) if "$ref" in part]
        for each in kinds:
            below = definitions[each]
            others = OTHER_DATA_SETS if name == "data" else OTHER_NETWORKS
            own = below["properties"]["name"].get("const", others) if len(kinds) > 1 else kind
            yield from _keys_of(below, definitions, f"{prefix}{name}.", own)
        if not kinds:
            key, default = prefix + name, schema.get("default")
            data_set, network = (kind, None) if key.startswith("data.") else (None, kind)
            yield ExplainedKey(key, data_set, network, schema["description"], _allowed(schema), default)


_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
_NOUNS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}


def _allowed(schema: dict[str, Any]) -> str:
    """Type and range that a JSON schema of one value says, in words."""
    if "anyOf" in schema:
        return ", or ".join(_allowed(part) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(schema["enum"][:-1]) + f" or {schema['enum'][-1]}"
    if "const" in schema:
        return str(schema["const"])
    if schema["type"] == "object":
        return "keys with values"
    if schema["type"] == "array":
        each = _allowed(schema["items"])
        if "maxItems" not in schema:
            return f"list, which may be empty, each {each}"
        return f"list of {schema['minItems']} to {schema['maxItems']}, each a {each}"
    # some versions of pydantic write the bound of a number as 0, others as 0.0
    bounds = [
        f"{word} {int(schema[key]) if schema[key] == int(schema[key]) else schema[key]:,}"
        for key, word in _BOUNDS.items()
        if key in schema
    ]
    return ", ".join([_NOUNS.get(schema["type"], schema["type"]), *bounds])
