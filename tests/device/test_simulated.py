"""No GPU is needed to see that tensors of two devices never meet, and that no step waits for the device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_on_a_device_of_its_own_everything_comes_out_as_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.device.program", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("mixing is refused")
    assert found.pop("weights have the same bits")
    assert found.pop("types in a checkpoint") == ["Tensor"]
    # random numbers of the next batch; on CUDA from pinned memory, which is not waited for
    assert set(found.pop("waits of a step")) <= {"copy from the CPU"}
    for name, (here, there) in found.items():
        assert here == there, name
