"""One process of `streamed.py`: one pass over a folder of images by one tool, after one over few of them.

    streamed_worker.py TOOL '{"folder": ..., "network": ..., "image_size": ..., "batch_size": ..., ...}'

`folder` holds few/, images/ and network.pt. It prints the seconds of the pass, and those of CPUs, with
workers. Each tool computes as it does where people use it: the plain loop and the library in a program that
sets nothing, the command as it sets PyTorch's threads and its memory by itself.
"""

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TOOLS = ("plain evaluation", "bncli.recalibrate", "bncli recalibrate")
NUM_CLASSES = 10  # as `network_of` gives


def command_words(
    folder: Path, images: Path, output: str, *, network: str, image_size: int, batch_size: int, workers: int
) -> list[str]:
    """What is typed behind `bncli`."""
    words = ["recalibrate", str(folder / "network.pt"), "-o", str(folder / output), "--method", "precise"]
    words += ["--model", f"torchvision:{network}", "--model-arg", f"num_classes={NUM_CLASSES}"]
    words += ["--normalization", "imagenet", "--no-evaluate", "--data-root", str(images)]
    words += ["--set", f"data.image_size={image_size}", "--set", "data.stream=true"]
    words += ["--set", f"data.workers={workers}", "--set", "runtime.precision=float32"]
    return [*words, "--batch-size", str(batch_size), "--json"]


def _command(folder: Path, how: dict[str, Any]) -> Callable[[Path], object]:
    from bncli.cli.app import main
    from bncli.cli.openmp import shorten_waiting

    shorten_waiting(os.environ)  # as `main` does, but here torch is imported before the clock starts
    import torch  # noqa: F401

    def run(images: Path) -> None:
        output = f"new-{images.name}.pt"
        (folder / output).unlink(missing_ok=True)
        with contextlib.redirect_stdout(sys.stderr):
            code = main(command_words(folder, images, output, **how))
        if code:
            sys.exit(code)

    return run


def _in_python(tool: str, folder: Path, how: dict[str, Any]) -> Callable[[Path], object]:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        os.environ.pop(name, None)  # who measures may have them from bncli's own start
    import torch
    from torch.utils.data import DataLoader

    from bncli.batchnorm import recalibrate
    from bncli.config import RuntimeConfig
    from bncli.models.normalized import IMAGENET, normalize_input
    from bncli.runtime import resolve_runtime
    from bncli.torchvision_compat import import_torchvision

    torchvision = import_torchvision()
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2 import PILToTensor

    runtime = resolve_runtime(RuntimeConfig(precision="float32"))
    model = torchvision.models.get_model(how["network"], weights=None, num_classes=NUM_CLASSES)
    model.load_state_dict(torch.load(folder / "network.pt", weights_only=True))
    model = runtime.place_model(model.eval())
    normalize_input(model, *IMAGENET, runtime.device)

    def loader_of(images: Path) -> "DataLoader[Any]":
        return DataLoader(
            ImageFolder(str(images / "train"), transform=PILToTensor()),
            batch_size=how["batch_size"],
            num_workers=how["workers"],
        )

    def plain_loop(images: Path) -> None:
        correct = 0
        with torch.inference_mode():
            for batch, labels in loader_of(images):
                correct += int((model(runtime.place(batch)).argmax(1).cpu() == labels).sum())

    def library(images: Path) -> None:
        loader = loader_of(images)

        def placed() -> "Iterator[torch.Tensor]":
            return (runtime.place(batch) for batch, _ in loader)

        recalibrate(model, placed, method="precise")

    return plain_loop if tool == TOOLS[0] else library


def measure(tool: str, described: str) -> tuple[float, float]:
    """Seconds of the pass over all images, by the clock and of CPUs."""
    how = json.loads(described)
    folder = Path(how.pop("folder"))
    work = _command(folder, how) if tool == TOOLS[2] else _in_python(tool, folder, how)
    work(folder / "few")
    start, cpu_start = time.perf_counter(), _cpu_seconds()
    work(folder / "images")
    return time.perf_counter() - start, _cpu_seconds() - cpu_start


def _cpu_seconds() -> float:
    """Of this process and of workers that have ended."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(one.ru_utime + one.ru_stime for one in map(resource.getrusage, whose))


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
