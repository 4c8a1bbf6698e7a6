"""One process of a benchmark of training steps: takes some with whatever `bncli` is on its path.

    step_worker.py CONFIG STEPS [OVERRIDE ...]

It prints images/s, the peak of memory, and how the network was computed. It uses no more of bncli than what
commits of November 2026 have.
"""

import json
import resource
import sys
import time
from itertools import islice

from bncli.config_file import load_config
from bncli.training.last_good_step import LastGoodStep
from bncli.training.loop import take_step
from bncli.training.run import Run
from bncli.training.setup import prepare

WARM_UP = 2  # steps


def main() -> None:
    config, steps, *overrides = sys.argv[1:]
    loaded = load_config(config, overrides)
    # smaller images come first; a step is meant that most of a run's are like
    augment = loaded.augment.model_copy(update={"small_epochs": 0, "crop_epochs": 0})
    run = Run.start(prepare(loaded.model_copy(update={"augment": augment})))
    run.model.train()
    last_good = LastGoodStep(run)
    num_images, start = 0, 0.0
    for number, (images, labels) in enumerate(islice(run.batches(), WARM_UP + int(steps))):
        if number == WARM_UP:
            start = time.perf_counter()
        take_step(run, last_good, images, labels)
        num_images += len(labels) if number >= WARM_UP else 0
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    by_patches = list(getattr(run, "by_patches", ()))
    print(
        json.dumps(
            {
                "images_per_second": num_images / seconds,
                "peak_mib": peak / 2**20,
                "threads": run.setup.runtime.threads,
                "precision": str(run.setup.runtime.precision),
                "by_patches": by_patches,
            }
        )
    )


if __name__ == "__main__":
    main()
