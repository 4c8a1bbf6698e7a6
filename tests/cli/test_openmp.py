"""How threads wait is told to OpenMP before torch is imported, and only where the user has not said it."""

import subprocess
import sys

import pytest

from bncli.cli.openmp import shorten_waiting


@pytest.mark.parametrize(
    "chosen", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": ""}]
)
def test_what_the_user_chose_stays(chosen: dict[str, str]) -> None:
    environment = dict(chosen)
    shorten_waiting(environment)
    assert environment == chosen


def test_it_is_set_when_a_command_imports_torch_and_by_no_import_of_the_library() -> None:
    code = """
import os, sys
for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
    os.environ.pop(name, None)
import bncli, bncli.cli.app
print(os.environ.get("GOMP_SPINCOUNT"))
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, Watch())
bncli.cli.app.main(["train"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "2000"]
