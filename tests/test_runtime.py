import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bncli.config import RuntimeConfig
from bncli.errors import DeviceError
from bncli.hardware import has_fast_bfloat16
from bncli.runtime import keep_freed_memory, release_freed_memory, resolve_device, resolve_runtime
from bncli.usable_cpus import UsableCpus


def test_auto_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "avx2": True}, torch.float32),
        ({}, torch.float32),
    ):
        monkeypatch.setattr("bncli.hardware._cpu_capabilities", lambda found=capabilities: found)
        assert resolve_runtime(RuntimeConfig(device="cpu")).precision == expected
        assert has_fast_bfloat16(torch.device("cpu")) == (expected == torch.bfloat16)


def test_a_precision_asked_for_is_taken_whatever_the_hardware() -> None:
    for name in ("float32", "bfloat16"):
        runtime = resolve_runtime(RuntimeConfig(device="cpu", precision=name))
        with runtime.autocast():
            product = torch.ones(4, 4) @ torch.ones(4, 4)
        assert product.dtype == getattr(torch, name) == runtime.precision


def test_threads_are_set_and_reported() -> None:
    for threads in (1, 2):
        assert resolve_runtime(RuntimeConfig(device="cpu", threads=threads)).threads == threads
        assert torch.get_num_threads() == threads


def test_without_a_word_there_are_as_many_threads_as_may_run_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def threads(usable: int, torchs: int, *, configured: int | None = None, former: int | None = None) -> int:
        monkeypatch.setattr("bncli.runtime.usable_cpus", lambda: UsableCpus(16, 16, usable - 0.5))
        torch.set_num_threads(torchs)
        config = RuntimeConfig(device="cpu", threads=configured)
        found = resolve_runtime(config, default_threads=former).threads
        assert torch.get_num_threads() == found
        return found

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads(2, 4) == 2
    assert threads(8, 4) == 4  # never more than PyTorch has
    assert threads(2, 4, configured=3) == 3
    assert threads(2, 4, former=3) == 3  # of a run that goes on: other threads round otherwise
    assert threads(2, 4, configured=1, former=3) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads(2, 4) == 4


def test_images_and_models_are_placed_in_the_memory_format() -> None:
    runtime = resolve_runtime(RuntimeConfig(device="cpu", memory_format="channels_last"))
    images = runtime.place(torch.zeros(2, 3, 8, 8))
    model = runtime.place_model(torch.nn.Conv2d(3, 4, 3))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["abacus", "xpu", "cpu:x", "meta", ""])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(DeviceError, match="unknown device"):
        resolve_runtime(RuntimeConfig(device=name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(DeviceError, match="finds 0 CUDA devices"):
        resolve_runtime(RuntimeConfig(device="cuda"))


def test_a_gpu_beyond_those_that_are_visible_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(DeviceError) as caught:
        resolve_device("cuda:1")
    found = f"PyTorch {torch.__version__} finds 1 CUDA device (CUDA_VISIBLE_DEVICES is '3')"
    expected = f"runtime.device: 'cuda:1' asked for, but {found}; use runtime.device=cuda:0, auto or cpu"
    assert str(caught.value) == expected
    assert resolve_device("cuda:0") == torch.device("cuda:0")


def test_a_gpu_that_is_chosen_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert resolve_runtime(RuntimeConfig(device="cuda:1")).precision == torch.bfloat16
    assert chosen == [torch.device("cuda:1")]


_PAGE_FAULTS = """
import resource, torch
from bncli.config import Config, RuntimeConfig, SyntheticConfig
from bncli.training import prepare
from bncli.training.run import Run
data = SyntheticConfig(num_train=1000, num_test=100)
setup = prepare(Config(data=data, runtime=RuntimeConfig(device="cpu", reuse_memory={reuse})))
if {start}:
    Run.start(setup).settle_memory()  # as at the end of the first step
def count():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16 * 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
count()
print(count())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt's settings are those of glibc")
@pytest.mark.slow
def test_memory_that_was_freed_is_used_again_and_not_faulted_in_anew() -> None:
    def page_faults(reuse: bool, *, start: bool = True) -> int:
        code = _PAGE_FAULTS.format(reuse=reuse, start=start)
        return int(subprocess.check_output([sys.executable, "-c", code]))

    assert page_faults(reuse=True) < 5
    assert page_faults(reuse=False) >= 5 * 32  # 32 huge pages of 2 MiB in each, or 16,384 small ones
    # what preparing the data takes for a moment is given back
    assert page_faults(reuse=True, start=False) >= 5 * 32


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_memory_that_was_kept_can_be_given_back() -> None:
    def resident() -> int:  # MiB
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20

    keep_freed_memory()
    torch.ones(64 * 2**20)  # 256 MiB
    kept = resident()
    release_freed_memory()
    assert kept - resident() > 200


def test_without_glibc_memory_is_left_to_the_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not keep_freed_memory()
    release_freed_memory()
