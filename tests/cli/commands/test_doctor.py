"""`bncli doctor`: also where torch or another library is broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bncli.cli.commands import doctor as command
from bncli.usable_cpus import UsableCpus
from bncli.wording import plural
from tests.conftest import Bncli


def doctor(*arguments: str, stub: Path, **environment: str) -> tuple[int, dict[str, dict[str, str]]]:
    """The program in a process of its own, whose imports are found in `stub` first."""
    path = os.pathsep.join([str(stub), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-m", "bncli", "doctor", "--json", *arguments],
        capture_output=True, text=True, check=False, cwd=stub, env=os.environ | {"PYTHONPATH": path, **environment},  # noqa: E501
    )  # fmt: skip
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    assert answer["well"] == (done.returncode == 0)
    return done.returncode, {check["name"]: check for check in answer["checks"]}


def test_a_healthy_machine_is_described_in_one_paste(
    bncli: Bncli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    outcome = bncli("doctor")
    assert outcome.code == 0, outcome.out
    assert torch.__version__ in outcome.out
    warnings = sum(line.startswith("warning") for line in outcome.out.splitlines())
    end = f"No problem, but {plural(warnings, 'warning')}: see above." if warnings else "All well."
    assert outcome.out.splitlines()[-1] == end
    assert str(tmp_path) not in outcome.out
    assert "~/runs can be written (not there yet, can be made)" in outcome.out
    assert {path.name for path in tmp_path.iterdir()} <= {".config"}  # which importing matplotlib makes


@pytest.mark.parametrize(
    ("omp", "quota", "verdict", "found"),
    [
        (None, None, "ok", "2 threads (16 cores)"),
        (None, 2.0, "ok", "2 threads (CPU quota 2.0 of 16 cores)"),
        (None, 0.5, "ok", "1 thread (CPU quota 0.5 of 16 cores)"),
        ("2", 2.0, "ok", "2 threads (OMP_NUM_THREADS=2, CPU quota 2.0 of 16 cores)"),
        ("2", 1.0, "warning", "2 threads (OMP_NUM_THREADS=2, CPU quota 1.0 of 16 cores)"),
    ],
)
def test_as_many_threads_as_may_run_at_once_and_why(
    bncli: Bncli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    omp: str | None,
    quota: float | None,
    verdict: str,
    found: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    for module in ("bncli.runtime", "bncli.usable_cpus"):
        monkeypatch.setattr(f"{module}.usable_cpus", lambda: UsableCpus(16, 16, quota))
    torch.set_num_threads(2)
    checks = {check["name"]: check for check in bncli("doctor", "--json").json["checks"]}
    assert (checks["threads"]["verdict"], checks["threads"]["found"]) == (verdict, found)
    if verdict == "warning":
        assert "unset it, or set it to 1" in checks["threads"]["fix"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_gpu_that_pytorch_does_not_see_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_NVIDIA", tmp_path / "nvidia0")
    assert command._devices().verdict == "ok"
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    found = command._devices()
    assert found.verdict == "warning"
    assert (
        found.found == "cpu; there is an NVIDIA GPU that PyTorch does not see; CUDA_VISIBLE_DEVICES is '-1'"
    )
    assert found.fix is not None


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("torch", "raise OSError('libtorch_cpu.so: cannot open shared object file')"),
        ("numpy", "raise ImportError('broken')"),
        pytest.param("torchvision", "raise RuntimeError('ABI mismatch')", marks=pytest.mark.slow),
        *(
            pytest.param(module, "raise ImportError('broken')", marks=pytest.mark.slow)
            for module in ("yaml", "matplotlib")
        ),
    ],
)
def test_a_library_that_cannot_be_imported_is_named_with_the_fix(
    tmp_path: Path, module: str, code: str
) -> None:
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text(code)
    exit_code, checks = doctor(stub=tmp_path)
    name = {"yaml": "pyyaml"}.get(module, module)
    assert exit_code == 1
    assert checks[name]["verdict"] == "problem"
    assert "cannot be imported" in checks[name]["found"]
    assert "install" in checks[name]["fix"]
    assert checks["bncli"]["verdict"] == checks["disk"]["verdict"] == "ok"


def test_a_folder_that_cannot_be_written_is_a_problem(bncli: Bncli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/proc")  # where even root cannot write
    outcome = bncli("doctor", "--json")
    verdicts = {check["name"]: check["verdict"] for check in outcome.json["checks"]}
    assert outcome.code == 1
    assert verdicts["this folder"] == verdicts["runs"] == "problem"


@pytest.mark.parametrize("name", ["cifar10", "imagefolder"])
def test_data_are_found_where_set_says(bncli: Bncli, tmp_path: Path, name: str) -> None:
    arguments = ("doctor", "--json", "--set", f"data.name={name}", "--set", f"data.root={tmp_path}")
    data = next(check for check in bncli(*arguments).json["checks"] if check["name"] == "data")
    assert data["verdict"] == "problem"
    assert "not found" in data["found"]
    for folder in ("train", "test", "cifar-10-batches-py"):
        (tmp_path / folder).mkdir()
    for file in ("test_batch", "batches.meta", *(f"data_batch_{number}" for number in range(1, 6))):
        (tmp_path / "cifar-10-batches-py" / file).touch()
    data = next(check for check in bncli(*arguments).json["checks"] if check["name"] == "data")
    assert data["verdict"] == "ok"


def test_a_checkpoint_is_checked_part_by_part(bncli: Bncli, finished_run: Path, tmp_path: Path) -> None:
    whole = bncli("doctor", finished_run / "last.pt", "--json")
    assert whole.code == 0
    assert [check["verdict"] for check in whole.json["checks"]] == ["ok"] * 4
    content = torch.load(finished_run / "last.pt", weights_only=True)
    content["state_dict"]["head.bias"][0] = float("nan")
    torch.save(content, tmp_path / "damaged.pt")
    damaged = bncli("doctor", tmp_path / "damaged.pt")
    assert damaged.code == 1
    assert "differs from what was saved in state_dict.head.bias" in damaged.out
    assert "NaN or infinity in state_dict.head.bias" in damaged.out
    (tmp_path / "cut.pt").write_bytes((finished_run / "last.pt").read_bytes()[:-500])
    assert bncli("doctor", tmp_path / "cut.pt").code == 1


def test_a_foreign_checkpoint_is_described_whatever_its_format(bncli: Bncli, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    torch.save({"epoch": 3, "model": model.state_dict()}, tmp_path / "zip.pt")
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for name, described in (
        ("zip.pt", "foreign (torch zip): 7 tensors under model, 1 BatchNorm layer;"),
        ("old.pt", "foreign (torch legacy): 7 tensors, 1 BatchNorm layer;"),
        ("model.safetensors", "foreign (safetensors): 7 tensors, 1 BatchNorm layer;"),
    ):
        outcome = bncli("doctor", tmp_path / name)
        assert (outcome.code, described in " ".join(outcome.out.split())) == (0, True), outcome.out
    torch.save({"weight": torch.ones(3)}, tmp_path / "none.pt")
    without = bncli("doctor", tmp_path / "none.pt")
    assert without.code == 0
    assert "no BatchNorm layer" in without.out
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert bncli("doctor", tmp_path / "text.pt").code == 1


def test_a_home_directory_at_the_root_leaves_paths_as_they_are(
    bncli: Bncli, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/")
    assert str(finished_run / "last.pt") in bncli("doctor", finished_run / "last.pt").out


def test_damage_where_only_weights_lie_is_a_problem(bncli: Bncli, finished_run: Path, tmp_path: Path) -> None:
    """Which a reader that looks at BatchNorm alone would not notice."""
    content = bytearray((finished_run / "last.pt").read_bytes())
    weight = torch.load(finished_run / "last.pt", weights_only=True)["state_dict"]["head.weight"]
    content[content.index(weight.contiguous().numpy().tobytes())] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    outcome = bncli("doctor", tmp_path / "flipped.pt")
    assert outcome.code == 1
    assert "damaged" in outcome.out


def test_a_network_without_batchnorm_is_no_problem_and_nothing_for_bncli(
    bncli: Bncli, tmp_path: Path
) -> None:
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "linear.pt")
    outcome = bncli("doctor", tmp_path / "linear.pt")
    assert (outcome.code, outcome.err) == (0, "")
    said = " ".join(outcome.out.split())
    assert "no BatchNorm layer with running statistics in it, but 2 tensors" in said
    assert "bncli finds nothing to look at in a network without BatchNorm" in said
    assert said.endswith("No problem, but 1 warning: see above.")
