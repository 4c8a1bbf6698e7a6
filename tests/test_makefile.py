"""What `make` does before anything is installed: which Python it takes, and what it would install with it.

Every Python on PATH is a stand-in of a known version. It answers `-c` as a real one of that version would,
makes a `.venv` of stand-ins, and writes down how it was called.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parent.parent / "Makefile"
TOOLS = ("make", "sh", "date", "touch", "rm", "mkdir", "cp")  # what the commands of the Makefile need
CHOICE = ("python3", "python3.14", "python3.13", "python3.12", "python3.11")


@dataclass(frozen=True)
class Machine:
    """A clone of the project, and a PATH."""

    clone: Path
    path: Path

    def add_python(self, name: str, version: tuple[int, int], *, missing: str = "") -> Path:
        """A Python of a version; `missing` is a module that it lacks."""
        code = f"import sys; sys.version_info = (*{version}, 0, 'final', 0); sys.modules[{missing!r}] = None"
        inside = self.path / "inside"
        python = self.path / name
        python.write_text(
            "#!/bin/sh\n"
            f'if [ "$1" = -c ]; then exec {sys.executable} -S -c "{code}; exec(sys.argv[1])" "$2"; fi\n'
            f'echo "{name} $*" >> {self.clone}/calls\n'
            # python -m venv DIR
            f'mkdir -p "$3/bin" && cp {inside} "$3/bin/python" && cp {inside} "$3/bin/bncli"\n'
        )
        python.chmod(0o755)
        return python

    def make(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = {"PATH": str(self.path)}  # nothing of a make that runs this test either
        return subprocess.run(
            ["make", *arguments], cwd=self.clone, env=environment, capture_output=True, text=True, check=False
        )

    def calls(self) -> list[str]:
        """How stand-ins were called since the last look, apart from questions of their version."""
        file = self.clone / "calls"
        found = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return found


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    clone, path = tmp_path / "clone", tmp_path / "path"
    clone.mkdir()
    path.mkdir()
    shutil.copy(MAKEFILE, clone / "Makefile")
    (clone / "pyproject.toml").touch()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, f"{tool} is needed"
        (path / tool).symlink_to(found)
    inside = path / "inside"
    inside.write_text(f'#!/bin/sh\necho "$0 $*" >> {clone}/calls\n')
    inside.chmod(0o755)
    return Machine(clone, path)


def pip(extras: str) -> str:
    return f".venv/bin/python -m pip install --quiet --disable-pip-version-check --editable .[{extras}]"


def venv(python: str) -> str:
    return f"{python} -m venv .venv"


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        ({"python3": (3, 11)}, "python3"),
        ({"python3": (3, 15)}, "python3"),
        ({"python3": (4, 0)}, "python3"),
        ({"python3": (3, 12), "python3.14": (3, 14), "python3.11": (3, 11)}, "python3"),
        ({"python3": (3, 10), "python3.11": (3, 11)}, "python3.11"),
        ({"python3": (3, 9), "python3.11": (3, 11), "python3.13": (3, 13)}, "python3.13"),
        ({"python3.12": (3, 12)}, "python3.12"),
        ({"python3.14": (3, 14), "python3.12": (3, 12)}, "python3.14"),
    ],
)
def test_python3_is_taken_if_new_enough_and_else_the_newest_there_is(
    machine: Machine, there: dict[str, tuple[int, int]], taken: str
) -> None:
    for name, version in there.items():
        machine.add_python(name, version)
    done = machine.make("run")
    assert done.returncode == 0, done.stderr
    assert machine.calls()[0] == venv(taken)


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_a_python_that_cannot_make_environments_is_passed_over(machine: Machine, missing: str) -> None:
    machine.add_python("python3", (3, 13), missing=missing)
    machine.add_python("python3.12", (3, 12))
    assert machine.make("run").returncode == 0
    assert machine.calls()[0] == venv("python3.12")


@pytest.mark.parametrize("there", [{}, {"python3": (3, 10)}, {"python3": (2, 7), "python3.9": (3, 9)}])
def test_without_any_one_line_says_what_is_needed(
    machine: Machine, there: dict[str, tuple[int, int]]
) -> None:
    for name, version in there.items():
        machine.add_python(name, version)
    done = machine.make("run")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"Python 3.11 or newer with venv is needed; not found as {' '.join(CHOICE)}." in line
    assert "make PYTHON=/path/to/python3" in line
    assert (done.stdout, machine.calls()) == ("", [])
    assert not (machine.clone / ".venv").exists()


def test_python_names_another_also_by_a_path_with_a_blank(machine: Machine) -> None:
    machine.add_python("python3", (3, 13))
    elsewhere = machine.path / "my own"
    elsewhere.mkdir()
    machine.add_python("my own/python", (3, 12))
    assert machine.make("run", f"PYTHON={elsewhere}/python").returncode == 0
    assert machine.calls()[0] == venv("my own/python")


def test_a_named_python_that_is_too_old_or_missing_is_refused_by_its_name(machine: Machine) -> None:
    machine.add_python("python3", (3, 13))
    machine.add_python("python3.10", (3, 10))
    for name in ("python3.10", "/no/python"):
        done = machine.make("run", f"PYTHON={name}")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert f"not found as {name}." in line
    assert machine.calls() == []


def test_make_run_installs_what_running_needs_and_make_test_the_rest(machine: Machine) -> None:
    machine.add_python("python3", (3, 11))
    assert machine.make("run").returncode == 0
    made, installed, train, evaluate, inspect, report = machine.calls()
    assert (made, installed) == (venv("python3"), pip("tested,report"))
    words = train.split()
    assert words[:4] == [".venv/bin/bncli", "train", "quickstart", "--run-dir"]
    assert evaluate == f".venv/bin/bncli eval {words[4]}/last.pt"
    assert inspect == f".venv/bin/bncli inspect-stats {words[4]}/last.pt"
    assert report == f".venv/bin/bncli report {words[4]} --measure"
    assert machine.make("test").returncode == 0
    assert machine.calls() == [
        pip("tested,dev"),
        ".venv/bin/python -m pytest -n logical --maxprocesses 4 --dist worksteal",
    ]


def test_nothing_is_installed_twice(machine: Machine) -> None:
    machine.add_python("python3", (3, 11))
    assert machine.make("test").returncode == 0
    assert machine.calls()[:2] == [venv("python3"), pip("tested,dev")]
    for target in ("run", "test", "install", "run"):
        assert machine.make(target).returncode == 0
    assert not [call for call in machine.calls() if "pip" in call or "venv .venv" in call]


def test_new_dependencies_are_installed(machine: Machine) -> None:
    machine.add_python("python3", (3, 11))
    machine.make("test")
    machine.calls()
    later = (machine.clone / ".venv" / ".installed-tested").stat().st_mtime + 10
    os.utime(machine.clone / "pyproject.toml", (later, later))
    machine.make("run")
    assert machine.calls()[0] == pip("tested,report")
    machine.make("test")
    assert machine.calls()[0] == pip("tested,dev")


def test_an_environment_whose_python_is_gone_is_made_anew(machine: Machine) -> None:
    machine.add_python("python3", (3, 11))
    machine.make("run")
    machine.calls()
    inside = machine.clone / ".venv" / "bin" / "python"
    inside.unlink()
    inside.symlink_to("/no/python3.10")
    assert machine.make("run").returncode == 0
    assert machine.calls()[:2] == [venv("python3"), pip("tested,report")]


def test_an_installation_that_failed_is_tried_again(machine: Machine) -> None:
    machine.add_python("python3", (3, 11))
    inside = (machine.path / "inside").read_text()
    (machine.path / "inside").write_text(inside + "exit 1\n")
    assert machine.make("run").returncode == 2
    assert machine.calls() == [venv("python3"), pip("tested,report")]
    (machine.clone / ".venv" / "bin" / "python").write_text(inside)
    (machine.clone / ".venv" / "bin" / "bncli").write_text(inside)
    assert machine.make("run").returncode == 0
    assert machine.calls()[0] == pip("tested,report")
