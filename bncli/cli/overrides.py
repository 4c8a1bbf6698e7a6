"""What `--set`, `--device` and `--data-root` ask for; a key that cannot change a command's result is refused.

Which keys those are was read from the code of each command; tests try every key on every command.
"""

from collections.abc import Iterator
from typing import Any

from bncli.errors import ConfigError

_COMPUTING = ("runtime.device", "runtime.precision", "runtime.memory_format", "runtime.threads")
# where images lie, and what of them is drawn or read
_IMAGES = (
    *("data.name", "data.root", "data.url", "data.archive", "data.cache"),
    *("data.image_size", "data.resize", "data.interpolation", "data.seed"),
    *("data.stream", "data.workers", "data.normalization", "data.classes", "data.arguments"),
)
_EVALUATING = ("data", *_COMPUTING, "runtime.eval_batch_size")
_ENGINE = "runtime.engine"
_SHARED = (*_EVALUATING, "runtime.timeout")  # among the processes of torchrun
_AUGMENTING = ("augment.crop_padding", "augment.flip", "augment.cutout")
# the steps that `demo` goes on for, at the highest learning rate
_STEPS = (
    "train.batch_size",
    "train.optimizer",
    "train.learning_rate",
    "train.bias_learning_rate",
    "train.head_learning_rate",
    "train.momentum",
    "train.nesterov",
    "train.weight_decay",
    "train.label_smoothing",
)
_ALL = ("data", "augment", "model", "train", "runtime")

# whole sections, and single keys
EFFECTIVE = {
    "train": _ALL,
    "eval": (*_SHARED, _ENGINE),
    "report": _EVALUATING,
    "eval of an exported file": ("data", "runtime.threads", "runtime.eval_batch_size"),
    "predict": (*_COMPUTING, _ENGINE),
    "predict with an exported file": ("runtime.threads",),
    "predict --model": ("data", *_COMPUTING, _ENGINE),  # whose classes and size are those of the data
    "export": ("data", "runtime.threads"),  # plain float32 on the CPU
    "recalibrate": (*_SHARED, "runtime.reuse_memory"),
    "average": _EVALUATING,
    "doctor": ("data.name", "data.root"),
    "demo": _ALL,  # it trains its own network
    "demo CHECKPOINT": (*_EVALUATING, *_AUGMENTING, *_STEPS),
    # how fast steps are taken; where the learning rate is does not matter
    "bench train": (
        *_IMAGES,
        "data.num_train",
        *_AUGMENTING,
        "model",
        "train.batch_size",
        "train.micro_batch_size",
        "train.last_batch",
        "train.optimizer",
        "train.momentum",
        "train.nesterov",
        "train.weight_decay",
        "train.label_smoothing",
        "train.ema_epochs",
        *_COMPUTING,
        "runtime.compile",
        "runtime.weight_gradient",
        "runtime.reuse_memory",
    ),
    "bench eval": (*_IMAGES, "data.num_test", *_COMPUTING),
    "bench eval of an exported file": (*_IMAGES, "data.num_test", "runtime.threads"),
}


def effective_overrides(
    command: str,
    sets: list[str] | None,
    *,
    device: str | None = None,
    data_root: str | None = None,
    engine: str | None = None,
) -> list[str]:
    """The overrides of one command: `--set`, and the options that stand for a key each.

    `command` is a key of `EFFECTIVE`.

    Raises ConfigError for a key without effect, and for two values of one key.
    """
    from bncli.config_file import override_of, override_values

    overrides = list(sets or [])
    values = override_values(overrides)
    useless = [key for key in _leaves(values) if not has_effect(key, command)]
    if useless:
        raise ConfigError(f"bncli {command}", [_refusal(useless, EFFECTIVE[command])])
    for option, key, value in (
        ("--device", "runtime.device", device),
        ("--data-root", "data.root", data_root),
        ("--engine", _ENGINE, engine),
    ):
        if value is None:
            continue
        section, name = key.split(".")
        inside = values.get(section)
        if isinstance(inside, dict) and inside.get(name, value) != value:
            found = f"it says {value!r}, but --set {key} says {inside[name]!r}; give one of them"
            raise ConfigError(option, [found])
        overrides.append(override_of(key, value))
    return overrides


def has_effect(key: str, command: str) -> bool:
    """Whether a dotted key, or a key of the section that it names, can change the command's result."""
    return any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in EFFECTIVE[command])


def _refusal(useless: list[str], effective: tuple[str, ...]) -> str:
    keys = ", ".join(key if "." in key else f"{key}.*" for key in effective)
    verb = "changes" if len(useless) == 1 else "change"
    return f"--set {', '.join(useless)}: {verb} nothing that this command computes; these keys do: {keys}"


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys; of a section without keys, which would set all its defaults, the section."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
