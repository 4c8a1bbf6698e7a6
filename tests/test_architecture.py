"""The layers of the house: an import may only point down, and heavy packages stay in their rooms."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bncli"

# from the top down; rooms on one line may not import each other
LAYERS = [
    {"cli"},
    {"bench", "demo", "report"},
    {"training", "lightning"},
    {"evaluation", "audit", "before_validation", "export"},
    {"determinism", "inference", "checkpoints", "data"},
    {"models"},
    {"batchnorm", "foreign_code", "recorded_config", "explained_config"},
    {"config_file", "runtime", "torchvision_compat", "distributed"},
    {"network_name"},
    {"builtin_configs", "config", "serialization", "batches", "forward", "usable_cpus", "busy_cpus"},
    {"errors", "atomic_file", "hardware", "indexed", "sample", "wording"},
]
# a package, and the only places that may import it
ONLY_IN = {
    "yaml": {"config_file"},
    "typer": {"cli"},
    "rich": {"cli"},
    "matplotlib": {"cli"},
    "torchvision": {"torchvision_compat", "data", "bench"},
    "PIL": {"data", "bench"},
    "pytorch_lightning": {"lightning"},
    "jinja2": {"report"},
    "vl_convert": {"report"},
    "pydantic": {"config", "config_file", "explained_config", "serialization"},
}


def rank(room: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if room in layer)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.name[0] != "_"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "bncli" and len(parts) > 1:
            target = parts[1]
            allowed = target == room or rank(target) > rank(room)
            assert allowed, f"{path} imports {name}"
        if parts[0] in ONLY_IN:
            assert room in ONLY_IN[parts[0]], f"{path} imports {name}"


MODULES = {
    path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")
}
MODULES = {path: name.removesuffix(".__init__") for path, name in MODULES.items()}


def home_of(package: str, name: str) -> str:
    """The module where a name that is imported from a module or package comes from, by the package's stub."""
    if f"{package}.{name}" in MODULES.values():
        return f"{package}.{name}"
    stub = PACKAGE.parent.joinpath(*package.split("."), "__init__.pyi")
    for line in stub.read_text().splitlines() if stub.is_file() else ():
        words = line.split()  # from .modes import eval_mode as eval_mode
        if line.startswith("from ") and words[3] == name:
            return home_of(f"{package}{words[1]}", name) if words[1] != "." else home_of(package, name)
    return package


def modules_imported_by(path: Path) -> set[str]:
    """Modules of bncli, whether imported at the top, in a function, or for the type checker alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {home_of(node.module, alias.name) for alias in node.names}
    return found & set(MODULES.values()) - {MODULES[path]}


def circles(imports: dict[str, set[str]]) -> list[str]:
    """Each circle once, as the names on the way round."""
    found: list[str] = []
    done: set[str] = set()

    def follow(module: str, way: list[str]) -> None:
        if module in way:
            found.append(" -> ".join([*way[way.index(module) :], module]))
        elif module not in done:
            for target in sorted(imports[module]):
                follow(target, [*way, module])
            done.add(module)

    for module in sorted(imports):
        follow(module, [])
    return found


def test_no_imports_in_a_circle() -> None:
    assert circles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set()}) == ["a -> b -> c -> a"]
    imports = {MODULES[path]: modules_imported_by(path) for path in MODULES}
    # the walk sees through the stubs, and into functions
    assert "bncli.checkpoints.any_file" in imports["bncli.cli.commands.inspect_stats"]
    assert circles(imports) == []


@pytest.mark.parametrize("room", ["batchnorm", "determinism", "inference", "evaluation"])
def test_the_numeric_core_knows_nothing_of_our_config_network_or_data(room: str) -> None:
    own = {"config", "config_file", "models", "data", "checkpoints", "runtime"}
    for path in (PACKAGE / room).rglob("*.py"):
        for name in imports_of(path):
            assert not (name.startswith("bncli.") and name.split(".")[1] in own), f"{path} imports {name}"


@pytest.mark.parametrize("module", ["bncli", "bncli.cli.app", "bncli.__main__"])
def test_the_command_line_starts_without_torch(module: str) -> None:
    heavy = "{'torch', 'torchvision', 'matplotlib', 'numpy'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("stub", sorted(PACKAGE.rglob("__init__.pyi")), ids=lambda path: path.parent.name)
def test_every_name_of_a_package_is_there_whatever_was_imported_before(stub: Path) -> None:
    package = importlib.import_module(".".join(["bncli", *stub.relative_to(PACKAGE).parts[:-1]]))
    lines = [line.split() for line in stub.read_text().splitlines() if line.startswith("from ")]
    assert package.__all__ == sorted(name for *_, name in lines)
    for _, module, _, name, _, public_name in lines:
        home = importlib.import_module(module, package.__name__)
        assert public_name == name
        # recalibrate is a function of the package and a module of it: the function is meant
        assert getattr(package, name) is getattr(home, name)


def test_the_package_is_typed_and_names_its_public_interface() -> None:
    import bncli

    assert (PACKAGE / "py.typed").is_file()
    for name in bncli.__all__:
        assert getattr(bncli, name).__doc__
    with pytest.raises(AttributeError, match="No bncli attribute nothing"):
        _ = bncli.nothing
