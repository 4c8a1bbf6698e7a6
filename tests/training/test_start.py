"""What `bncli train` does not wait for."""

import os
import subprocess
import sys
from pathlib import Path

TRAIN = """
import sys
from bncli import load_config
from bncli.training import train
print("imported:", *sys.modules)
train(load_config(sys.argv[1]), sys.argv[2])
print("trained:", *sys.modules)
"""


def test_training_imports_neither_other_commands_nor_the_compiler_nor_torchvision(
    tiny_config: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tiny_config), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    names = {line.partition(": ")[0]: set(line.split()[1:]) for line in done.stdout.splitlines()}
    expected = {"bncli.training.loop", "bncli.batchnorm.tracking", "bncli.evaluation.evaluate"}
    assert expected <= names["imported"]
    other_commands = {
        "bncli.batchnorm.audit.rules",
        "bncli.batchnorm.population.recalibrate",
        "bncli.determinism.certificate",
        "bncli.checkpoints.any_file",
    }
    assert not other_commands & names["imported"]
    assert not {"torch._dynamo", "sympy", "torchvision"} & names["trained"]
