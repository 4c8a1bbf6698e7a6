"""`bncli eval`: accuracy in eval mode, and whether a prediction depends on its batch."""

from typing import TYPE_CHECKING, Annotated

import typer

from bncli.cli.options import CheckpointArgument, JsonOption, SetOption
from bncli.errors import DataError

if TYPE_CHECKING:
    from bncli.checkpoint import Checkpoint
    from bncli.data import Dataset

BATCH_SIZES = (2, 7, 64, 256)


def evaluate_checkpoint(
    checkpoint: CheckpointArgument,
    overrides: SetOption = None,
    num_images: Annotated[int, typer.Option(min=1, help="Test images for the determinism check.")] = 256,
    as_json: JsonOption = False,
) -> int:
    """Evaluate in eval mode, and prove that batch size 1 gives the same predictions.

    Exit code 1 if a prediction depends on the batch in eval mode.
    """
    from bncli.checkpoint import load_checkpoint, load_model
    from bncli.cli.progress import DataReporter
    from bncli.cli.render import print_json
    from bncli.cli.render_eval import EvalReport, show_eval
    from bncli.config_file import config_from_dict
    from bncli.data import load_dataset, sequential_batches
    from bncli.evaluation import check_determinism, evaluate
    from bncli.runtime import describe_machine, resolve_runtime

    loaded = load_checkpoint(checkpoint)
    config = config_from_dict(loaded.config.model_dump(mode="json"), overrides, source=str(checkpoint))
    runtime = resolve_runtime(config.runtime)
    model = runtime.place_model(load_model(loaded))
    dataset = load_dataset(config.data, progress=DataReporter())
    _check_dataset(loaded, dataset)

    batches = sequential_batches(dataset.test, config.runtime.eval_batch_size)
    with runtime.autocast():
        evaluation = evaluate(model, ((runtime.place(images), labels) for images, labels in batches))
        determinism = check_determinism(
            model, runtime.place(dataset.test.images[:num_images]), batch_sizes=BATCH_SIZES
        )
    report = EvalReport(
        checkpoint=str(checkpoint),
        epoch=loaded.epoch,
        dataset=dataset.name,
        class_names=loaded.class_names,
        evaluation=evaluation,
        determinism=determinism,
        runtime=runtime.describe(),
        machine=describe_machine(),
    )
    print_json(report.to_dict()) if as_json else show_eval(report)
    return 0 if determinism.deterministic else 1


def _check_dataset(checkpoint: "Checkpoint", dataset: "Dataset") -> None:
    """Classes and image size must be those that the network was trained on."""
    height, width = dataset.test.images.shape[2:]
    if height != checkpoint.image_size or width != checkpoint.image_size:
        side = checkpoint.image_size
        raise DataError(
            f"{dataset.name}: its images are {height}x{width} pixels, but the checkpoint was trained on"
            f" {side}x{side}; for image folders set data.image_size={side}"
        )
    if dataset.class_names != checkpoint.class_names:
        raise DataError(
            f"{dataset.name}: its classes are {', '.join(dataset.class_names)}, but the checkpoint was"
            f" trained on {', '.join(checkpoint.class_names)}"
        )
