"""`bncli doctor`: what is installed, what this machine can do, and what would keep a run from starting.

It must answer when everything else is broken: nothing beyond the standard library and typer (with what that
needs itself) is imported at the top, and each check tells its own failure.

With a CHECKPOINT: is it whole, and what is in a foreign one.
"""

import contextlib
import importlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import bncli
from bncli.cli.messages import one_line, wrapped
from bncli.cli.options import DataRootOption, JsonOption, set_option
from bncli.cli.overrides import effective_overrides
from bncli.errors import (
    BncliError,
    CheckpointError,
    ConfigError,
    DataError,
    NoBatchNormError,
    OtherFormatError,
)
from bncli.wording import gigabytes, plural


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Literal["ok", "warning", "problem"]
    found: str
    fix: str | None = None  # what to do about a warning or a problem


def checks_of_checkpoint(path: Path) -> list[Check]:
    """Whether every part of a checkpoint of bncli is what was saved."""
    from bncli.checkpoints import check_integrity, load_model, recorded_network
    from bncli.network_name import runs_foreign_code

    try:
        found = check_integrity(path)
    except OtherFormatError:
        return [_of_foreign_checkpoint(path)]
    except CheckpointError as error:
        return [Check("file", "problem", str(error), "restore it from a copy, or train again")]
    progress = f"format {found.format_version}, epoch {found.epoch}, step {found.step}"
    checks = [Check("file", "ok", f"{path}: {progress}")]
    compared = f"{plural(found.num_tensors, 'tensor')} and all other values"
    if not found.digest_stored:
        checks.append(Check("SHA-256", "warning", "none stored", "made by an old bncli; cannot be verified"))
    elif found.damaged:
        damaged = f"differs from what was saved in {', '.join(found.damaged[:5])}"
        checks.append(Check("SHA-256", "problem", damaged, "restore it from a copy, or train again"))
    else:
        checks.append(Check("SHA-256", "ok", f"{compared} are what was saved"))
    if found.non_finite:
        what = f"NaN or infinity in {', '.join(found.non_finite[:5])}"
        checks.append(Check("numbers", "problem", what, "the run diverged: train with a lower learning rate"))
    else:
        checks.append(
            Check("numbers", "ok", f"all numbers of {plural(found.num_tensors, 'tensor')} are finite")
        )
    name = recorded_network(path)
    if name is not None and runs_foreign_code(name):
        how = "eval with --model and this name does it"
        return [*checks, Check("network", "warning", f"not made: it would run the code of {name}", how)]
    try:
        load_model(path)
        checks.append(Check("network", "ok", "the tensors are those of the stored configuration"))
    except BncliError as error:
        checks.append(Check("network", "problem", str(error), "restore it from a copy, or train again"))
    return checks


def _of_foreign_checkpoint(path: Path) -> Check:
    """What lies in a file that bncli did not write; one that is damaged remains a problem."""
    from bncli.checkpoints import open_checkpoint

    fix = "inspect-stats reads its running statistics; eval and predict need a file of bncli train"
    try:
        with open_checkpoint(path) as found:
            place = f" under {found.key}" if found.key else ""
            tensors, layers = (
                plural(len(found.tensors), "tensor"),
                plural(len(found.layer_names), "BatchNorm layer"),
            )
            count = f"{tensors}{place}, {layers}"
            what = f"{path}: foreign ({found.kind}): {count}; no digest to compare with"
        return Check("file", "warning", what, fix)
    except NoBatchNormError as error:
        fix = "the file can be read, but bncli finds nothing to look at in a network without BatchNorm"
        return Check("file", "warning", str(error), fix)
    except OtherFormatError as error:  # which says what to do
        return Check("file", "problem", str(error))
    except CheckpointError as error:
        return Check("file", "problem", str(error), "restore it from a copy")


LIBRARIES = (
    "numpy",
    "pydantic",
    "yaml",
    "PIL",
    "rich",
    "typer",
    "matplotlib",
    "safetensors",
    "fsspec",
    "lazy_loader",
)
_NVIDIA = Path("/dev/nvidia0")  # where Linux has the first GPU of theirs
_DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow"}  # where the module has another name
_LITTLE_SPACE = 1 << 30  # bytes; a checkpoint of a large network with its optimiser is half of it


def diagnose(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CHECKPOINT", help="Check this file instead of the machine.")
    ] = None,
    overrides: Annotated[list[str] | None, set_option("data.name=imagefolder")] = None,
    data_root: DataRootOption = None,
    as_json: JsonOption = False,
) -> int:
    """Check the installation and this machine, or a checkpoint.

    Can training start here? Or, with CHECKPOINT: is the file what was saved? Exit code 1 if something is
    wrong. The output names no user, so that it can be pasted into a bug report.

    Examples:
    bncli doctor
    bncli doctor --data-root data
    bncli doctor runs/first/last.pt
    """
    if checkpoint is not None and (overrides or data_root is not None):
        problem = "--set and --data-root say where data lie, and no data are read to check a CHECKPOINT"
        raise ConfigError("bncli doctor", [f"{problem}; leave them out"])
    # a library that this needs may be broken: the check of the data set, which needs it too, says so
    with contextlib.suppress(ImportError):
        overrides = effective_overrides("doctor", overrides, data_root=data_root)
    checks = _of_machine(overrides) if checkpoint is None else checks_of_checkpoint(checkpoint)
    checks = [Check(c.name, c.verdict, _anonymous(c.found), c.fix and _anonymous(c.fix)) for c in checks]
    is_well = all(check.verdict != "problem" for check in checks)
    (_print_json if as_json else _print_lines)(checks, is_well=is_well)
    return 0 if is_well else 1


def _of_machine(overrides: list[str] | None) -> list[Check]:
    checks = [
        Check("bncli", "ok", bncli.__version__),
        Check("Python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
    ]
    questions: list[tuple[str, Callable[[], Check]]] = [
        ("torch", _torch),
        ("torchvision", _torchvision),
        *((name, lambda name=name: _library(name)) for name in LIBRARIES),
        ("devices", _devices),
        ("CPU", _cpu),
        ("bfloat16", _bfloat16),
        ("threads", _threads),
        ("memory", _memory),
        ("disk", _disk),
        ("this folder", lambda: _writable("this folder", Path())),
        ("runs", lambda: _writable("runs", Path("runs"))),
        ("cache", _cache),
        ("data", lambda: _data(overrides or [])),
    ]
    return checks + [_answered(name, ask) for name, ask in questions]


def _answered(name: str, ask: Callable[[], Check]) -> Check:
    try:
        return ask()
    except (Exception, SystemExit) as error:  # a broken library may do anything while it is imported
        return Check(name, "problem", f"cannot be found out: {_reason(error)}", "see the problems above")


def _torch() -> Check:
    try:
        torch = importlib.import_module("torch")
        version = str(torch.__version__)
        cuda = torch.version.cuda
    except Exception as error:
        fix = "install it: pip install 'torch>=2.10'"
        return Check("torch", "problem", f"cannot be imported: {_reason(error)}", fix)
    found = f"{version}, built for {'CUDA ' + cuda if cuda else 'the CPU'}"
    if tuple(int(part) for part in version.split(".", 2)[:2]) < (2, 10):
        return Check(
            "torch", "problem", found, "upgrade it: before 2.10 a checkpoint could run code when it was read"
        )
    return Check("torch", "ok", found)


def _torchvision() -> Check:
    try:
        importlib.import_module("torch")
    except Exception:
        return Check("torchvision", "problem", "not tried: it needs torch", "install torch first")
    try:
        compat = importlib.import_module("bncli.torchvision_compat")
        version = str(compat.import_torchvision().__version__)
        declared = bool(compat._declarations)
    except Exception as error:
        fix = "install the version that belongs to your torch; without it there is no cifar10"
        return Check("torchvision", "problem", f"cannot be imported: {_reason(error)}", fix)
    if not declared:
        return Check("torchvision", "ok", version)
    fix = "bncli does not need them; for other programs install the torchvision that belongs to your torch"
    found = f"{version}, its compiled operators are for another torch"
    return Check("torchvision", "warning", found, fix)


def _library(name: str) -> Check:
    from importlib.metadata import version  # 10 ms, and every command imports this file

    distribution = _DISTRIBUTIONS.get(name, name)
    try:
        importlib.import_module(name)
        return Check(distribution, "ok", version(distribution))
    except Exception as error:
        fix = f"install it: pip install {distribution}"
        return Check(distribution, "problem", f"cannot be imported: {_reason(error)}", fix)


def _devices() -> Check:
    torch = importlib.import_module("torch")
    found = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} {properties.name}, {gigabytes(properties.total_memory, 0)}")
    if torch.backends.mps.is_available():
        found.append("mps")
    if len(found) == 1 and _NVIDIA.exists():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {one_line(visible)!r}"
        fix = "install a torch that is built for the CUDA version of its driver, or unset what hides it"
        return Check(
            "devices", "warning", f"cpu; there is an NVIDIA GPU that PyTorch does not see{hidden}", fix
        )
    return Check("devices", "ok", "; ".join(found))


def _cpu() -> Check:
    machine = importlib.import_module("bncli.hardware").describe_machine()
    found = f"{machine['cpu']}, {machine['num_cpus']} CPUs, PyTorch uses {machine['cpu_capability']}"
    return Check("CPU", "ok", found)


def _bfloat16() -> Check:
    torch = importlib.import_module("torch")
    runtime = importlib.import_module("bncli.runtime")
    device = runtime.resolve_runtime(importlib.import_module("bncli.config").RuntimeConfig()).device
    fast = importlib.import_module("bncli.hardware").has_fast_bfloat16(device)
    source = "its compute capability" if device.type == "cuda" else "the processor's features"
    ratio = _bfloat16_ratio(torch) if device.type == "cpu" else ""
    kind = "fast" if fast else "emulated or unknown: float32 is used"
    return Check("bfloat16", "ok", f"{kind} on {device} (read from {source}){ratio}")


def _bfloat16_ratio(torch: Any) -> str:
    """Measured: how much faster one product of two 512x512 matrices is, the best of up to five each."""
    import time

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(512, 512, dtype=dtype)
        matrix @ matrix
        times: list[float] = []
        while len(times) < 5 and sum(times) < 0.1:  # where bfloat16 is emulated, one product takes 0.2 s
            start = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return f"; measured {seconds[torch.float32] / seconds[torch.bfloat16]:.2g} times as fast as float32"


def _threads() -> Check:
    config = importlib.import_module("bncli.config").RuntimeConfig()
    num_threads = importlib.import_module("bncli.runtime").resolve_runtime(config).threads
    usable = importlib.import_module("bncli.usable_cpus").usable_cpus()
    asked = os.environ.get("OMP_NUM_THREADS")
    why = f"OMP_NUM_THREADS={one_line(asked)}, {usable}" if asked else str(usable)
    found = f"{plural(num_threads, 'thread')} ({why})"
    if num_threads > usable.count:
        fix = f"more threads than can run at once wait for each other: unset it, or set it to {usable.count}"
        return Check("threads", "warning", found, fix)
    return Check("threads", "ok", found)


def _memory() -> Check:
    available = importlib.import_module("bncli.data.memory").available_memory()
    if available is None:
        return Check("memory", "ok", "this system does not tell")
    found = f"{gigabytes(available)} available"
    if available < _LITTLE_SPACE:
        return Check("memory", "warning", found, "end other programs, or use small batches")
    return Check("memory", "ok", found)


def _disk() -> Check:
    free = shutil.disk_usage(Path()).free
    found = f"{gigabytes(free)} free in this folder"
    if free < _LITTLE_SPACE:
        return Check("disk", "warning", found, "checkpoints may not fit; give train --run-dir elsewhere")
    return Check("disk", "ok", found)


def _writable(
    name: str, folder: Path, fix: str = "give train --run-dir a folder that you may write"
) -> Check:
    """Try it, for permissions do not tell of read-only file systems; nothing is left behind."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".bncli-doctor-"):
            pass
    except OSError as error:
        return Check(name, "problem", f"{folder.absolute()} cannot be written: {_reason(error)}", fix)
    made = "" if folder.exists() else " (not there yet, can be made)"
    return Check(name, "ok", f"{folder.absolute()} can be written{made}")


def _cache() -> Check:
    folder = importlib.import_module("bncli.data.imagecache").default_cache()
    found = _writable("cache", folder, "set data.cache to a folder that you may write")
    # only image folders need it
    return Check(found.name, "warning" if found.fix else "ok", found.found, found.fix)


def _data(overrides: list[str]) -> Check:
    """CIFAR-10, or the image folder that --set names; found means that the files are there."""
    named = any(text.partition("=")[0].strip() == "data.name" for text in overrides)
    chosen = overrides if named else ["data.name=cifar10", *overrides]
    config = importlib.import_module("bncli.config_file").load_config(None, chosen).data
    if config.name == "synthetic":
        return Check("data", "ok", "synthetic: drawn in code, needs no files")
    asked = bool(overrides)  # without a word from the user missing data are no problem
    user_path = importlib.import_module("bncli.data.user_path").user_path
    try:
        root = user_path(config.root, "data.root")
        found = _image_folder(root) if config.name == "imagefolder" else _cifar10(root)
    except DataError as error:
        verdict: Literal["warning", "problem"] = "problem" if asked else "warning"
        return Check("data", verdict, f"not found: {error}", "--data-root FOLDER says where data lie")
    return Check("data", "ok", f"{found}: all files found (train checks their content)")


def _image_folder(root: Path) -> str:
    """Where the splits lie, as `train` finds them. Raises DataError."""
    above, test_name = importlib.import_module("bncli.data.imagefolder").find_splits(root)
    return f"imagefolder in {above.absolute()} (train and {test_name})"


def _cifar10(root: Path) -> str:
    """Where the batches lie, as `train` finds them. Raises DataError."""
    files = importlib.import_module("bncli.data.cifar10_files")
    folder = next(files.batch_folders(root), None)
    if folder is None:
        missing = ", ".join(files.missing_files(root / files.FOLDER))
        raise DataError(f"CIFAR-10 in {root.absolute()} (no {missing}); bncli train cifar10 downloads it")
    return f"CIFAR-10 in {folder.absolute()}"


def _reason(error: BaseException) -> str:
    """The first line of what was raised: loaders of libraries print pages."""
    first = (str(error).strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return one_line(text if len(text) <= 200 else text[:197] + "...")


def _anonymous(text: str) -> str:
    """The text without control characters, and without the home directory, which names its owner."""
    home = os.environ.get("HOME") or os.environ.get("USERPROFILE") or ""
    return one_line(text.replace(home, "~") if len(home) > 1 else text)


def _print_json(checks: list[Check], *, is_well: bool) -> None:
    import json
    from dataclasses import asdict

    # not render.print_json: it needs pydantic, which may be what is broken
    print(json.dumps({"well": is_well, "checks": [asdict(check) for check in checks]}, indent=2))


def _print_lines(checks: list[Check], *, is_well: bool) -> None:
    width = shutil.get_terminal_size().columns
    names = max(len(check.name) for check in checks)
    for check in checks:
        lines = [check.found] + ([f"-> {check.fix}"] if check.fix else [])
        start = f"{check.verdict:<7}  {check.name:<{names}}  "
        for line in lines:
            print("\n".join(wrapped(line, width, first=start, break_words=False)))
            start = " " * len(start)
    if not is_well:
        print("Something is wrong: see the problems above.")
    elif warnings := sum(check.verdict == "warning" for check in checks):
        print(f"No problem, but {plural(warnings, 'warning')}: see above.")
    else:
        print("All well.")
