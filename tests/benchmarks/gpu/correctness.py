"""What bncli promises, on another device than the CPU: each promise is tried alone and written down.

    python -m tests.benchmarks.gpu.correctness OUT [--device cpu --small]

`ok` says whether it is as designed; bits that are promised on a CPU alone are found out here, not judged.
It needs no data set. The seconds of each stand beside it.
"""

import argparse
import copy
import functools
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bncli import (
    FixedShape,
    audit,
    certify,
    fold_batch_norm,
    load_config,
    measure_population,
    optimize_for_inference,
    recalibrate,
    train,
)
from bncli.batchnorm import Moments, batch_norm_layers, eval_mode, verify_fixed_point
from bncli.config import AugmentConfig, Config
from bncli.data.augment import augment
from bncli.errors import DivergedError, StoppedError
from bncli.runtime import synchronize
from bncli.torchvision_compat import import_torchvision
from bncli.training import prepare
from bncli.training.last_good_step import LastGoodStep
from bncli.training.loop import _take_unchecked, take_step
from bncli.training.run import Run
from tests.benchmarks.gpu.results import Results
from tests.faults.conftest import content_of

RECIPE = """
data: {name: synthetic, num_train: 1000, num_test: 200}
augment: {crop_padding: 2, flip: alternating, cutout: 8, small_epochs: 1, small_size: 24}
model: {widths: WIDTHS, blocks_per_stage: 2, whitening: true, pool_before_norm: true, activation: gelu}
train: {epochs: 3, batch_size: 100, optimizer: muon, learning_rate: 0.05, ema_epochs: 0.5}
"""


class Checked:
    """The device and the sizes."""

    def __init__(self, name: str, *, small: bool) -> None:
        self.name, self.device, self.small = name, torch.device(name), small
        self.widths = "[4, 8]" if small else "[64, 256, 256]"
        self.side = 32 if small else 64
        self.num_images = 8 if small else 64
        self.batch_sizes = (2, 3, 7) if small else (2, 3, 7, 16, 64)

    def config(self, *overrides: str) -> Config:
        """Of a run of a few seconds."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_text(RECIPE.replace("WIDTHS", self.widths))
            return load_config(path, [f"runtime.device={self.name}", *overrides])

    @functools.cached_property
    def setup(self) -> Any:
        """The recipe's, in float32."""
        return prepare(self.config("runtime.precision=float32"))

    def images(self, count: int) -> Tensor:
        """Test images (count, 3, H, W) uint8 on the device."""
        images: Tensor = self.setup.dataset.test.images[:count]
        return images.to(self.device)

    def networks(self) -> Iterator[tuple[str, nn.Module, Tensor]]:
        """With statistics of the data that they are measured on, and images for them."""
        images = self.images(self.num_images)
        ours = copy.deepcopy(self.setup.model)
        recalibrate(ours, [images], method="precise")
        yield "convnet", ours, images
        for name in ("resnet18",) if self.small else ("resnet18", "resnet50", "mobilenet_v2"):
            torch.manual_seed(0)
            model = import_torchvision().models.get_model(name, weights=None, num_classes=10)
            model = model.to(self.device).to(memory_format=torch.channels_last)
            batch = torch.rand(self.num_images, 3, self.side, self.side).to(self.device)
            recalibrate(model, [batch], method="precise")
            yield name, model, batch


def main() -> int:
    """Check everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks and few images, for a CPU")
    parser.add_argument("--seconds", type=float, default=240, help="after which nothing new is begun")
    arguments = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA begins: for equal bits
    results = Results(arguments.out, "correctness", arguments.seconds)
    checked = Checked(arguments.device, small=arguments.small)
    for check in (
        check_augmentation,
        check_moments,
        check_no_wait,
        check_repeated_runs,
        check_resumed_run,
        check_last_good_step,
        check_bad_numbers,
        check_beside_the_cpu,
    ):
        name = check.__name__.removeprefix("check_").replace("_", " ")
        results.check(name, functools.partial(check, checked))
    for network, model, images in checked.networks():
        for check_network in (check_fixed_point, check_folding, check_inference, check_audit):
            name = check_network.__name__.removeprefix("check_").replace("_", " ")
            results.check(f"{name}: {network}", functools.partial(check_network, model, images))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rows in (None, 8 if arguments.small else 64):
                kind = f"{str(dtype).removeprefix('torch.')}{'' if rows is None else ', batch-invariant'}"
                results.check(
                    f"certificate: {network}, {kind}",
                    functools.partial(check_certificate, checked, model, images, dtype, rows),
                    needs=5,
                )
    for name, words, code in commands(checked):
        results.check(f"command: {name}", functools.partial(check_command, words, code), needs=20)
    return 1 if results.num_failed else 0


def check_augmentation(checked: Checked) -> dict[str, Any]:
    """The same pixels as on the CPU; those of a smaller image within one level."""
    images = checked.images(100)
    places = torch.arange(100).numpy()
    where: dict[str, Any] = {"seed": 3, "epoch": 0, "step": 5, "fill": (0.5, 0.4, 0.3)}

    def largest_difference(config: AugmentConfig) -> int:
        here = augment(images, places, config, **where).cpu().int()
        return int((here - augment(images.cpu(), places, config, **where).int()).abs().max())

    found = {
        "moved": largest_difference(AugmentConfig(crop_padding=4, flip="alternating", cutout=8)),
        "small": largest_difference(
            AugmentConfig(crop_padding=2, flip="random", small_epochs=1, small_size=24)
        ),
    }
    return {"ok": found["moved"] == 0 and found["small"] <= 1, **found}


def check_moments(checked: Checked) -> dict[str, Any]:
    """Data in which every digit counts, against float64 on the CPU."""
    values = 1e3 + 1e-3 * torch.randn(64, 8, 6, 6)
    rest = values.double().movedim(1, 0).flatten(1) - 1e3
    found = Moments.of(values.to(checked.device))
    mean = float(((found.mean.cpu() - 1e3 - rest.mean(1)) / 1e3).abs().max())
    var = float((found.variance().cpu() / rest.var(1, unbiased=False) - 1).abs().max())
    same = Moments.of(values.to(checked.device))
    repeats = torch.equal(found.mean, same.mean) and torch.equal(found.m2, same.m2)
    return {"ok": mean < 1e-12 and var < 1e-9, "mean_error": mean, "var_error": var, "repeats": repeats}


def check_no_wait(checked: Checked) -> dict[str, Any]:
    """No step waits for the device: on CUDA PyTorch itself raises an error where one does."""
    setup = prepare(checked.config())
    run = Run.start(setup)
    run.model.train()
    last_good, batches = LastGoodStep(run), run.batches()
    take_step(run, last_good, *next(batches))  # what is done once
    synchronize(checked.device)
    is_cuda = checked.device.type == "cuda"
    if is_cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            take_step(run, last_good, *next(batches))
    finally:
        if is_cuda:
            torch.cuda.set_sync_debug_mode("default")
    return {"ok": True, "steps": 5, "was_looked_at": is_cuda}


def _deterministic(work: Callable[[], object]) -> list[str]:
    """Do it with deterministic algorithms; the kernels that have none, by PyTorch's own warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            work()
        finally:
            torch.use_deterministic_algorithms(False)
    told = {str(one.message) for one in caught if "deterministic" in str(one.message)}
    return sorted(one.split(" does not have")[0][:120] for one in told)


def _same(first: Path, second: Path) -> bool:
    return all(content_of(first / name) == content_of(second / name) for name in ("last.pt", "best.pt"))


def check_repeated_runs(checked: Checked) -> dict[str, Any]:
    """Whether a run that is repeated ends with the same bits, by precision."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("float32", "bfloat16"):
            config = checked.config(f"runtime.precision={precision}")
            runs = [Path(folder) / f"{precision}-{number}" for number in range(4)]
            for run in runs[:2]:
                train(config, run)
            both = [functools.partial(train, config, run) for run in runs[2:]]
            found["without_deterministic_kernel"] = sorted({n for one in both for n in _deterministic(one)})
            found[f"{precision} same_bits"] = _same(*runs[:2])
            found[f"{precision} same_bits_deterministic"] = _same(*runs[2:])
    return found


def check_resumed_run(checked: Checked) -> dict[str, Any]:
    """A run that is stopped in the midst of an epoch and resumed, against one that was not."""
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"

        def both() -> None:
            train(checked.config(), whole)
            calls = iter(range(10_000))
            try:
                train(checked.config(), parts, stop=lambda: next(calls) == 13)
            except StoppedError:
                train(checked.config(), parts, resume=True)
            else:
                raise AssertionError("it was not stopped")

        unable = _deterministic(both)
        return {"same_bits": _same(whole, parts), "without_deterministic_kernel": unable}


def check_last_good_step(checked: Checked) -> dict[str, Any]:
    """Steps that are undone leave no bit behind."""
    run = Run.start(prepare(checked.config()))
    run.model.train()
    last_good, batches = LastGoodStep(run), run.batches()
    for _ in range(3):
        _take_unchecked(run, last_good, *next(batches))
    held = last_good.holds()
    before = [tensor.clone() for tensor in _state(run)]
    for _ in range(3):
        _take_unchecked(run, last_good, *next(batches))
    moved = not all(map(torch.equal, before, _state(run)))
    with torch.no_grad():
        next(weight for weight in run.model.parameters() if weight.requires_grad).fill_(torch.nan)
    noticed = not last_good.holds()
    last_good.go_back()
    back = all(map(torch.equal, before, _state(run)))
    is_ok = held and moved and noticed and back and run.step == 3
    return {
        "ok": is_ok,
        "held": held,
        "moved": moved,
        "noticed": noticed,
        "step": run.step,
        "same_bits": back,
    }


def _state(run: Run) -> list[Tensor]:
    assert run.average is not None
    tensors = [*run.model.parameters(), *run.model.buffers(), *run.optimizer.momenta()]
    return [*tensors, *run.average.tensors(), *run.running_epoch.tensors()]


def check_bad_numbers(checked: Checked) -> dict[str, Any]:
    """A learning rate that is much too high: one line that names step and layer, and a step that is saved."""
    config = checked.config("train.learning_rate=1e30", "train.optimizer=sgd", "train.ema_epochs=null")
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(config, Path(folder) / "run")
        except DivergedError as error:
            text = str(error)
            saved = (Path(folder) / "run" / "last.pt").exists()
            return {"ok": saved and "in step" in text and "\n" not in text, "message": text, "saved": saved}
    return {"ok": False, "error": "it trained"}


def check_beside_the_cpu(checked: Checked) -> dict[str, Any]:
    """The losses of a run in float32, against the CPU's."""
    losses = []
    for name in (checked.name, "cpu"):
        run = Run.start(prepare(checked.config("runtime.precision=float32", f"runtime.device={name}")))
        run.model.train()
        last_good, batches, seen = LastGoodStep(run), run.batches(), []
        for _ in range(4):
            take_step(run, last_good, *next(batches))
            seen.append(float(run.running_epoch.loss_sum) / run.running_epoch.num_images)
        losses.append(seen)
    apart = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
    return {"ok": apart < 0.02, "largest_relative_difference": apart, "losses": losses[0]}


def check_fixed_point(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Exact recalibration: running statistics are what enters, in eval mode; and what it costs."""
    network, batches = copy.deepcopy(model), list(images.split(16))
    done = recalibrate(network, batches, method="exact")
    error = max(layer.max_relative_error for layer in verify_fixed_point(network, batches))
    first, second = (
        [layer.moments.mean for layer in measure_population(model, batches, method="exact").layers]
        for _ in range(2)
    )
    return {
        "ok": error < 1e-3,
        "max_relative_error": error,
        "forward_passes": done.forward_passes,
        "num_layers": len(done.layers),
        "repeats": all(map(torch.equal, first, second)),
    }


def check_folding(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Logits with BatchNorm folded away, against those with it, TF32 off."""
    folding = fold_batch_norm(model)
    with _no_tf32(), torch.no_grad(), eval_mode(model):
        before = model(images).double()
        after = folding.model(images).double()
    error = float((after - before).norm() / before.norm())
    flips = int((after.argmax(1) != before.argmax(1)).sum())
    is_ok = error < 1e-4 and bool(folding.folded) and not _has_nan(after)
    return {"ok": is_ok, "relative_error": error, "flips": flips, "folded": len(folding.folded)}


def check_inference(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """The same in bfloat16, which is coarser."""
    fast = optimize_for_inference(model, dtype=torch.bfloat16)
    with torch.no_grad(), eval_mode(model):
        before, after = model(images).double(), fast(images).double()
    error = float((after - before).norm() / before.norm())
    return {"ok": error < 0.2 and not _has_nan(after), "relative_error": error, "device": str(after.device)}


def check_audit(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """The same findings as on the CPU."""
    del images
    here, there = ([str(one) for one in audit(each)] for each in (model, copy.deepcopy(model).cpu()))
    return {"ok": here == there, "num_findings": len(here), "num_layers": len(batch_norm_layers(model))}


def check_certificate(
    checked: Checked, model: nn.Module, images: Tensor, dtype: torch.dtype, rows: int | None
) -> dict[str, Any]:
    """Which claims hold to the last bit, and where a first bit differs."""
    subject = model if rows is None else FixedShape(model, rows=rows)
    with torch.autocast(checked.device.type, dtype, enabled=dtype != torch.float32):
        found = certify(subject, images, batch_sizes=checked.batch_sizes)
    claims = {name: claim.bitwise_equal for name, claim in found.claims.by_name().items()}
    layers = {c.first_differing_layer for c in found.claims if c.first_differing_layer is not None}
    return {
        "ok": found.holds or dtype == torch.float16,
        **claims,
        "first_layers": sorted(layers),
        "max_ulp": max((claim.max_ulp or 0) for claim in found.claims),
        "max_abs_diff": found.eval_mode.max_abs_diff,
        "flips": found.eval_mode.prediction_flips,
        "verdict": found.verdict,
    }


def commands(checked: Checked) -> list[tuple[str, list[str], int]]:
    """Commands as a user types them, with the exit code that each should end with."""
    folder = tempfile.mkdtemp()
    run, on = f"{folder}/run", ["--device", checked.name]
    small = ["data.num_train=500", "data.num_test=50", "train.epochs=1"]
    sets = [word for one in small for word in ("--set", one)]
    kind = checked.device.type
    many = f"{kind}:99" if kind != "cpu" else "cuda:99"
    found = [
        ("doctor", ["doctor"], 0),
        ("train", ["train", "quickstart", *sets, *on, "--run-dir", run], 0),
        ("eval", ["eval", f"{run}/last.pt", *on, "--num-images", "8", "--batch-sizes", "2,7"], 0),
        ("eval --batch-invariant", ["eval", f"{run}/last.pt", *on, "--batch-invariant"], 0),
        ("recalibrate", ["recalibrate", f"{run}/last.pt", *on, "--output", f"{folder}/new.pt"], 0),
        ("bench train", ["bench", "train", "quickstart", *sets[:2], *on, "--rounds", "1", "--steps", "1"], 0),
        ("a device that is not there", ["train", "quickstart", *sets, "--device", many], 2),
    ]
    if kind == "cuda":  # 3 TB of activations; a CPU would swap
        huge = ["--set", "data={name: synthetic, num_train: 300000, num_test: 50}"]
        batch = ["--set", "train.batch_size=300000", "--set", "model.widths=[2048, 64]"]
        words = ["train", "quickstart", *huge, *batch, *on, "--run-dir", f"{folder}/huge"]
        found.append(("more memory than there is", words, 2))
    return found


def check_command(words: list[str], code: int) -> dict[str, Any]:
    """Its exit code and its last lines; an error is one line without a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "bncli", *words], capture_output=True, text=True, check=False, timeout=120
    )
    is_told = code == 0 or (done.stderr.count("error:") == 1 and "Traceback" not in done.stderr)
    is_bug = "this is a bug" in done.stderr
    return {
        "ok": done.returncode == code and is_told and not is_bug,
        "code": done.returncode,
        "out": done.stdout.splitlines()[-12:],
        "err": done.stderr.splitlines()[-4:],
    }


def _has_nan(values: Tensor) -> bool:
    return bool(values.isnan().any())


class _no_tf32:  # noqa: N801  # used as a function
    """Convolutions and products of float32 in float32."""

    def __enter__(self) -> None:
        self._kept = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = self._kept


if __name__ == "__main__":
    raise SystemExit(main())
