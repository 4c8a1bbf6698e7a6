import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def run(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run in a fresh interpreter, with `paths` searched before installed packages."""
    setup = f"import sys; sys.path[:0] = {[str(path) for path in (*paths, REPOSITORY)]}\n"
    command = [sys.executable, "-W", "error", "-c", setup + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def write_fake_torchvision(folder: Path, init: str) -> Path:
    package = folder / "torchvision"
    (package / "transforms" / "v2").mkdir(parents=True)
    (package / "__init__.py").write_text(init)
    (package / "transforms" / "__init__.py").write_text("")
    (package / "transforms" / "v2" / "__init__.py").write_text("")
    return folder


@pytest.mark.slow
def test_datasets_transforms_and_models_work_after_the_import():
    result = run("""
import torch
from bncli.torchvision_compat import import_torchvision
torchvision = import_torchvision()
assert torchvision.datasets.CIFAR10.tgz_md5 == "c58f30108f718f92721af3b95e74349a"
flipped = torchvision.transforms.v2.functional.horizontal_flip(torch.arange(3).view(1, 1, 3))
assert flipped.tolist() == [[[2, 1, 0]]]
model = torchvision.models.resnet18(num_classes=4).eval()
assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
assert import_torchvision() is torchvision
import torchvision as again
assert again is torchvision
""")
    assert result.returncode == 0, result.stderr


def test_missing_operators_are_declared_and_the_import_runs_again(tmp_path):
    # what torchvision's own _meta_registrations does; the first run leaves a submodule behind
    needs_operators = """
import torch
import torchvision.left_behind
for name in ("nms", "qnms"):
    torch.library.register_fake("torchvision::" + name)(lambda dets, scores, iou_threshold: dets)
"""
    fake = write_fake_torchvision(tmp_path, needs_operators)
    count = "import builtins; builtins.runs = getattr(builtins, 'runs', 0) + 1"
    (fake / "torchvision" / "left_behind.py").write_text(count)
    result = run(
        """
import builtins, torch
from bncli.torchvision_compat import import_torchvision
module = import_torchvision()
assert import_torchvision() is module
assert builtins.runs == 2, builtins.runs
assert torch.ops.torchvision.nms and torch.ops.torchvision.qnms
""",
        fake,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_torchvision_that_imports_by_itself_is_left_alone(tmp_path):
    warns = """
import warnings
warnings.warn("Failed to load image Python extension: 'libjpeg.so: cannot open'")
"""
    result = run(
        """
import torch, sys
from bncli import torchvision_compat
assert torchvision_compat.import_torchvision() is sys.modules["torchvision"]
assert not torchvision_compat._declarations
assert not hasattr(torch.ops.torchvision, "nms")
""",
        write_fake_torchvision(tmp_path, warns),
    )
    assert result.returncode == 0, result.stderr


def test_another_failure_is_an_import_error_on_one_line(tmp_path):
    result = run(
        """
from bncli.torchvision_compat import import_torchvision
try:
    import_torchvision()
except ImportError as error:
    print(error)
""",
        write_fake_torchvision(tmp_path, "raise RuntimeError('compiled for CUDA 99\\nmore lines')"),
    )
    assert result.stdout == "torchvision cannot be imported: compiled for CUDA 99\n", result.stderr


@pytest.mark.slow
def test_another_warning_at_import_is_not_hidden(tmp_path):
    fake = write_fake_torchvision(tmp_path, "import warnings; warnings.warn('something else')")
    result = run("from bncli.torchvision_compat import import_torchvision; import_torchvision()", fake)
    assert "UserWarning: something else" in result.stderr
