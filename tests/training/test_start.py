"""What `bncli train` does not wait for."""

import os
import subprocess
import sys
from pathlib import Path

TRAIN = """
import sys
from bncli import load_config, train
train(load_config(sys.argv[1]), sys.argv[2])
print([name for name in ("torch._dynamo", "sympy", "torchvision") if name in sys.modules])
"""


def test_training_imports_neither_the_compiler_nor_torchvision(tiny_config: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tiny_config), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
