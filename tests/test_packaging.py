"""What is installed is the whole program, and what is passed on is the whole project.

Wheel and source distribution are built once, and compared file by file with the checkout.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import bncli

ROOT = Path(__file__).parent.parent
ALLOWED = {"pyproject.toml", "bncli", "configs", "findings", "tests", "README.md", "Makefile", "LICENSE"}


def test_the_top_level_holds_what_was_agreed_and_nothing_else() -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    tops = {line.split("/")[0] for line in done.stdout.splitlines()}
    assert {name for name in tops if not name.startswith(".")} <= ALLOWED


def test_the_tested_versions_lie_within_the_declared_ranges() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {(r := Requirement(text)).name: r.specifier for text in project["dependencies"]}
    for text in project["optional-dependencies"]["tested"]:
        pin = Requirement(text)
        (version,) = pin.specifier
        assert version.operator == "=="
        assert ranges[pin.name].contains(version.version)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution of this checkout, packed and unpacked."""
    return build(ROOT, tmp_path_factory.mktemp("built"))


def build(source: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(command, cwd=source, capture_output=True, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        # Python has filters from 3.11.4 on, and warns from 3.12 on where none is given
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, by its path, but for what running Python leaves behind."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.slow
def test_the_wheel_holds_the_package_the_built_in_configurations_and_nothing_else(built: Path) -> None:
    about = f"bncli-{bncli.__version__}.dist-info"
    found = {name: text for name, text in contents(built / "site").items() if not name.startswith(about)}
    package = {f"bncli/{name}": text for name, text in contents(ROOT / "bncli").items()}
    configs = {f"bncli/builtin_configs/{name}": text for name, text in contents(ROOT / "configs").items()}
    assert found == package | configs
    assert "bncli = bncli.__main__:main" in (built / "site" / about / "entry_points.txt").read_text()


@pytest.mark.slow
def test_the_source_distribution_holds_what_building_testing_and_reading_need(built: Path) -> None:
    source = built / f"bncli-{bncli.__version__}"
    found = contents(source)
    for folder in ("bncli", "configs", "findings", ".readme"):
        wanted = contents(ROOT / folder)
        assert wanted
        assert {name: found.get(f"{folder}/{name}") for name in wanted} == wanted
    for name in ("Makefile", "README.md", "LICENSE", "pyproject.toml"):
        assert found[name] == (ROOT / name).read_bytes()
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert tests <= set(found)


@pytest.mark.slow
def test_every_picture_and_file_that_the_readme_links_to_travels_with_it(built: Path) -> None:
    source = built / f"bncli-{bncli.__version__}"
    linked = re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", (source / "README.md").read_text())
    assert any(name.endswith(".png") for name in linked)
    assert [name for name in linked if not (source / name).exists()] == []


@pytest.mark.slow
def test_a_wheel_built_from_the_source_distribution_is_the_same(built: Path, tmp_path: Path) -> None:
    again = build(built / f"bncli-{bncli.__version__}", tmp_path)
    assert contents(again / "site") == contents(built / "site")


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_folder_without_the_checkout(built: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "bncli", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(built / "site")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = json.loads(run("config", "--json"))["configurations"]
    assert {each["name"] for each in listed} == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert {Path(each["path"]).parent for each in listed} == {built / "site" / "bncli" / "builtin_configs"}
    few = (
        "data.num_train=100",
        "data.num_test=20",
        "train.batch_size=50",
        "train.epochs=1",
        "model.widths=[4]",
    )
    overrides = [word for key in (*few, "runtime.threads=1") for word in ("--set", key)]
    trained = json.loads(run("train", *overrides, "--json"))
    checkpoint = str(Path(trained["run_dir"]) / "last.pt")
    evaluated = json.loads(run("eval", checkpoint, "--num-images", "10", "--batch-sizes", "1,2", "--json"))
    assert evaluated["accuracy"] == trained["test_accuracy"]
    data = ("--set", "data={name: synthetic, num_train: 500, num_test: 20}", "--set", "runtime.threads=1")
    resnet = json.loads(run("train", "resnet18", "--dry-run", *data, "--json"))
    assert resnet["config"]["model"]["name"].startswith(str(built / "site"))
    assert resnet["num_parameters"] == 11_173_962  # of ResNet-18 with a 3x3 stem and 10 classes
    (tmp_path / "my.yaml").write_text(run("config", "quickstart"))
    assert json.loads(run("train", "my.yaml", "--dry-run", *overrides, "--json"))["num_parameters"] > 0
