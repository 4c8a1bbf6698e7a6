"""What is installed is the whole program: the built wheel, in an empty folder, answers."""

import os
import subprocess
import sys
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


@pytest.mark.slow
def test_the_built_wheel_gives_a_working_program(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "bncli").rglob("*.py")}
    assert sources | {"bncli/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {"bncli", f"bncli-{bncli.__version__}.dist-info"}
    (entry_points,) = (tmp_path / "site").glob("*.dist-info/entry_points.txt")
    assert "bncli = bncli.__main__:main" in entry_points.read_text()
    done = subprocess.run(
        [sys.executable, "-m", "bncli", "train", "--help"],
        cwd=tmp_path / "site",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--dry-run" in done.stdout
