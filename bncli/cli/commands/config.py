"""`bncli config`: the built-in configurations, one of them with every key's meaning, or a key's meaning."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bncli.builtin_configs import builtin_configs, describe_builtin_config, header_of, nearest
from bncli.cli.help_page import OUTPUT, SHOWN
from bncli.cli.messages import print_note
from bncli.cli.options import JsonOption, complete_config
from bncli.errors import ConfigError

if TYPE_CHECKING:
    from bncli.explained_config import ExplainedKey


def show_config(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A built-in configuration (cifar10), a YAML file, a key (train.momentum) or a section"
            " (train).",
            autocompletion=complete_config,
        ),
    ] = None,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema",
            help="Print the JSON schema of a configuration file, by which an editor completes and checks"
            " keys. Save it as bncli.schema.json, and begin your file with the line"
            " # yaml-language-server: $schema=bncli.schema.json",
            rich_help_panel=SHOWN,
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Write to a new file, not to stdout.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """List built-in configurations, write one, or explain a key.

    A configuration is written with the meaning of every key: change the file, and give it to `bncli train`.

    Examples:
    bncli config
    bncli config cifar10 -o my.yaml
    bncli config train.learning_rate
    """
    from bncli.cli.tables.config import builtin_configs_text, explained_keys_text

    if schema:
        if name is not None:
            raise ConfigError("--schema", ["describes all configurations; leave NAME out"])
        _write(_schema(), output)
    elif name is None:
        known = [
            {"name": key, **describe_builtin_config(path), "path": str(path)}
            for key, path in builtin_configs().items()
        ]
        _write(_json({"configurations": known}) if as_json else builtin_configs_text(known), output)
    elif Path(name).is_file() or name in builtin_configs():
        _write(_resolved(name, as_json=as_json), output)
    else:
        keys = _keys(name)
        _write(_json({"keys": keys}) if as_json else explained_keys_text(keys), output)
    return 0


def _schema() -> str:
    from bncli.explained_config import config_schema

    return _json(config_schema())


def _resolved(name: str, *, as_json: bool) -> str:
    """A configuration file or a built-in one, with every key."""
    from bncli.builtin_configs import find_config_file
    from bncli.config_file import comments_in, load_config
    from bncli.explained_config import explain_config

    config = load_config(name)
    if as_json:
        return _json(config.model_dump(mode="json"))
    text = find_config_file(name).read_text(encoding="utf-8")
    return explain_config(config, header=header_of(text), comments=comments_in(text))


def _keys(name: str) -> "list[ExplainedKey]":
    """The keys that a name stands for. Raises ConfigError where there are none, with the nearest."""
    from bncli.explained_config import explained_keys

    keys = explained_keys(name)
    if not keys:
        known = [*builtin_configs(), *(each.key for each in explained_keys())]
        raise ConfigError(
            name, [f"no such file, built-in configuration, section or key; {nearest(name, known)}"]
        )
    return keys


def _json(content: object) -> str:
    from bncli.serialization import to_json

    return to_json(content, in_lines=True) + "\n"


def _write(text: str, output: Path | None) -> None:
    """To stdout, or to a file that does not exist yet."""
    if output is None:
        print(text, end="")
        return
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(str(output), ["exists already; give another name, or remove it first"]) from None
    except OSError as error:
        raise ConfigError(str(output), [f"cannot be written: {error.strerror or error}"]) from None
    print_note(f"wrote {output}")
