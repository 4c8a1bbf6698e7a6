"""The configuration as YAML: reading a file with overrides, and writing it back.

All problems are reported at once, each with its dotted key, and with the nearest known key where one is
misspelt. This is the only file that knows YAML.
"""

import difflib
import math
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from bncli.builtin_configs import DEFAULT_NAME, find_config_file
from bncli.config import (
    Cifar10Config,
    Config,
    ConvNetConfig,
    ImageFolderConfig,
    NamedDataConfig,
    NamedModelConfig,
    SyntheticConfig,
)
from bncli.errors import ConfigError
from bncli.network_name import is_same_name, with_whole_path
from bncli.wording import expected_value

MAX_CONFIG_BYTES = 1 << 20
MAX_VALUE_LENGTH = 4096  # characters; the longest path of Linux
MAX_DEPTH = 20
_DATA_SETS = "synthetic, cifar10, imagefolder, torchvision:NAME, package.module:NAME, path/to/file.py:NAME"


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Read a configuration file and apply `section.key=value` overrides.

    `path` may also be the name of a built-in configuration, such as `cifar10`; None is all defaults, which
    are the quickstart.

    Raises:
        ConfigError: naming the file and every problem, each with its dotted key.
    """
    if path is None:  # with the name of its data set, which a key of data needs beside it
        return config_from_dict({"data": {"name": Config().data.name}}, overrides, source=DEFAULT_NAME)
    file = find_config_file(path)
    values = _read_yaml(file)
    for section in ("data", "model"):
        values = _with_whole_path(values, section, file.parent)
    return config_from_dict(values, overrides, source=str(path))


def config_from_dict(values: dict[str, Any], overrides: list[str] | None = None, *, source: str) -> Config:
    """Validate plain values, such as those stored in a checkpoint; `source` names them in errors."""
    former = values
    for override in overrides or []:
        values = _apply_override(values, override)
    for section in ("data", "model"):
        if not _is_same_kind(values, former, section):
            values = _start_section_afresh(values, section, overrides or [])
        if keys_of(overrides or []) & {section, f"{section}.name"}:
            values = _with_whole_path(values, section, Path())
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        if overrides:
            source += " with --set"
        # where an element of a list is wrong, pydantic also calls the list too short
        problems = [one for one in error.errors() if not any(_holds(one, other) for other in error.errors())]
        raise ConfigError(source, [_describe(problem) for problem in problems]) from None


def keys_of(overrides: list[str]) -> frozenset[str]:
    """The dotted keys that `section.key=value` overrides give."""
    return frozenset(override.partition("=")[0].strip() for override in overrides)


def override_values(overrides: list[str]) -> dict[str, Any]:
    """The values that `section.key=value` overrides give, as sections within sections.

    Raises:
        ConfigError: one of them is no KEY=VALUE, or its value is no YAML.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        values = _apply_override(values, override)
    return values


def override_of(key: str, text: str) -> str:
    """The override that gives a dotted key this very text, whatever YAML would make of it."""
    escaped = (char if char.isprintable() and char not in '"\\' else f"\\U{ord(char):08x}" for char in text)
    return f'{key}="{"".join(escaped)}"'


def dump_config(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one, 80 columns wide."""
    values = config.model_dump(mode="json")
    # PyYAML breaks a line after the key that made it too long
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=52)


def dump_value(value: Any) -> str:
    """A single value as YAML that stands behind `key: `, on one line unless it is text with line breaks."""
    as_it_is = str(value).isprintable()  # PyYAML would write U+0085 as a line break, which is read as a blank
    listed = yaml.dump(
        [value], Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=as_it_is
    )
    return str(listed).strip()[1:-1]


def comments_in(text: str) -> dict[str, str]:
    """The comment at the end of a key's line in a configuration that can be loaded, by dotted key."""
    lines, found = text.splitlines(), {}

    def visit(node: yaml.Node, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                visit(value, f"{prefix}.{key.value}" if prefix else key.value)
        elif node.end_mark.line < len(lines):
            rest = lines[node.end_mark.line][node.end_mark.column :].strip()
            if rest.startswith("#"):
                found[prefix] = rest

    if (root := yaml.compose(text, Loader=_Loader)) is not None:  # None: an empty text
        visit(root, "")
    return found


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, with two traps removed: `1e-5` is a number, and a key that
    stands twice is an error.

    What no configuration needs is refused while the text is read, before anything is built: tags, aliases
    (ten lines can stand for a billion values), and nesting or values beyond any use.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self.depth += 1
        if isinstance(event, yaml.AliasEvent):
            problem = f"the alias *{event.anchor}; write the value out"
        elif getattr(event, "tag", None) is not None:
            problem = f"the tag {event.tag}; remove it"
        elif isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_VALUE_LENGTH:
            problem = f"a value of {len(event.value):,} characters; at most {MAX_VALUE_LENGTH:,}"
        elif self.depth > MAX_DEPTH:
            problem = f"nested deeper than {MAX_DEPTH} levels"
        else:
            node: yaml.Node | None = super().compose_node(parent, index)
            self.depth -= 1
            return node
        raise yaml.composer.ComposerError(problem=problem, problem_mark=event.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} stands twice (lines {seen[key]} and {line})"
                )
            if isinstance(key, str):
                seen[key] = line
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Writes floats so that any YAML reader takes them for numbers, and puts text like `1e5` in quotes."""


for _ours in (_Loader, _Dumper):
    _ours.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "e" in text and "." not in text:  # YAML 1.1 takes 1e-05 for a string, 1.0e-05 for a number
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _represent_float)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if path.is_dir():
            raise ConfigError(str(path), [_in_place_of_folder(path)])
        if path.suffix == ".py" and path.is_file():
            fix = "a network in it is trained with --set model.name"
            raise ConfigError(str(path), [f"Python code, no configuration; {fix}={path}:FACTORY"])
        if not path.is_file() and path.exists():
            raise ConfigError(str(path), ["a pipe or a device; write the configuration into a file"])
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise ConfigError(str(path), [f"larger than {MAX_CONFIG_BYTES:,} bytes: no configuration"])
        values = yaml.load(content.decode("utf-8"), Loader=_Loader)  # a SafeLoader
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror or error}"]) from None
    except UnicodeDecodeError:
        raise ConfigError(str(path), ["no YAML text"]) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(str(path), [f"no valid YAML: {_one_line(error)}"]) from None
    if values is None:
        raise ConfigError(str(path), ["empty; write at least `data: {name: synthetic}`"])
    if not isinstance(values, dict):
        found = type(values).__name__
        raise ConfigError(str(path), [f"expected sections such as `data:` and `train:`, found a {found}"])
    return values


def _in_place_of_folder(path: Path) -> str:
    if (path / "config.yaml").is_file():
        return f"the folder of a run; its configuration is {path / 'config.yaml'}, and --resume continues it"
    return "a folder, no configuration; --data-root FOLDER names the one that holds the images"


def _one_line(error: Exception) -> str:
    """What PyYAML says over several lines, on one."""
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or str(error)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return " ".join(str(text).split()) + where


def _apply_override(values: dict[str, Any], override: str) -> dict[str, Any]:
    """`train.epochs=3` set in a copy; the value is read as YAML, as in a file."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError("--set", [f"{override!r}: expected KEY=VALUE, such as train.epochs=3"])
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError("--set", [f"{dotted}: no valid YAML: {_one_line(error)}"]) from None
    if isinstance(value, dict) and text.endswith(":"):
        value = text  # `model.name=torchvision:` is a name that was not finished, no section
    if isinstance(value, str) and text.strip() == value:
        value = text  # `data.root= x` keeps what the shell passed
    return _with_value(values, keys, value, dotted)


def _with_value(values: Any, keys: list[str], value: Any, dotted: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError("--set", [f"{dotted}: there is no section {dotted.rpartition('.')[0]!r}"])
    head, *rest = keys
    return {
        **values,
        head: _with_value(values.get(head) or {}, rest, value, dotted) if rest else value,
    }


def _start_section_afresh(values: dict[str, Any], section: str, overrides: list[str]) -> dict[str, Any]:
    """When an override changes `data.name` or `model.name`, the keys of the former kind fall away.

    Otherwise `--set data.name=synthetic` would trip over the `url` of cifar10, which the user never
    wrote: a checkpoint stores every key.
    """
    keys = keys_of(overrides)
    former = values.get(section)
    if f"{section}.name" not in keys or not isinstance(former, dict):
        return values
    kept = {key.split(".")[1] for key in keys if key.startswith(f"{section}.")}
    return {**values, section: {key: value for key, value in former.items() if key in kept}}


def _is_same_kind(values: dict[str, Any], former: dict[str, Any], section: str) -> bool:
    """Whether the name of a section is what it was, or that of code whose file lies elsewhere now."""
    found = [one.get(section) for one in (values, former)]
    names = [one.get("name") if isinstance(one, dict) else None for one in found]
    return isinstance(names[0], str) and isinstance(names[1], str) and is_same_name(names[0], names[1])


def _with_whole_path(values: dict[str, Any], section: str, folder: Path) -> dict[str, Any]:
    """The path in a section's name, where it is one, made absolute: what is relative begins at `folder`."""
    found = values.get(section)
    name = found.get("name") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(name, str):
        return values
    return {**values, section: {**found, "name": with_whole_path(name, folder)}}


def _holds(problem: Any, other: Any) -> bool:
    """Whether the other is about an element of what the first is about."""
    location = problem["loc"]
    return len(other["loc"]) > len(location) and other["loc"][: len(location)] == location


def _describe(problem: Any) -> str:
    """One pydantic problem as `dotted.key: what is wrong`."""
    # the chosen member of a union stands in the location: data.cifar10.root
    location = [str(part) for part in problem["loc"]]
    members = _members(location[0]) if location else {}
    chosen = location[1] if len(location) > 1 and location[1] in members else None
    if chosen is not None:
        del location[1]
        section = _section_at(members[chosen], location[1:-1])
    else:
        section = _section_at(Config, location[:-1])
    if location[:2] in (["model", "arguments"], ["data", "arguments"]):
        del location[3:]  # inside a value, where pydantic also names types
    key = ".".join(location) or "the configuration"
    kind, context = problem["type"], problem.get("ctx", {})
    found = _shown(problem.get("input"))
    if kind == "extra_forbidden":
        others = [name for name, model in members.items() if location[-1] in model.model_fields]
        if others and location[0] == "model":
            if chosen == "named":
                return f"{key}: only convnet has this key; what other networks take goes into model.arguments"
            return f"{key}: for networks that model.name names; the keys of convnet stand in model itself"
        if others:
            others = [name for name in others if name != "named"] or [
                "torchvision:NAME and data sets of your own"
            ]
            having = " and ".join(others) + (" has" if len(others) == 1 and " " not in others[0] else " have")
            return (
                f"{key}: the data set {chosen or 'chosen'} has no such key; {having} it (data.name chooses)"
            )
        known = list(section.model_fields) if section else []
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if kind == "union_tag_invalid":
        return f"data.name: unknown data set {context.get('tag')!r}; known: {_DATA_SETS}"
    if kind == "union_tag_not_found":
        return f"data.name: missing; one of {_DATA_SETS}"
    if kind in {"model_type", "model_attributes_type", "dict_type"}:
        return f"{key}: expected a section with keys, found {found}"
    return f"{key}: must be {expected_value(problem)}, not {found}"


def _shown(value: Any) -> str:
    """A value as the user may have written it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no whole number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _members(section: str) -> dict[str, type[BaseModel]]:
    """The models of a section that has several kinds, as pydantic's locations name them."""
    if section == "model":
        return {"convnet": ConvNetConfig, "named": NamedModelConfig}
    if section != "data":
        return {}
    return {
        "synthetic": SyntheticConfig,
        "cifar10": Cifar10Config,
        "imagefolder": ImageFolderConfig,
        "named": NamedDataConfig,
    }


def _section_at(section: Any, location: list[str]) -> type[BaseModel] | None:
    for key in location:
        field = section.model_fields.get(key)
        section = field.annotation if field else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return None
    return section  # type: ignore[no-any-return]
