"""`runtime.engine`: what computes a checkpoint's network in `eval` and `predict`.

ONNX Runtime and OpenVINO compute on the CPU and in eval mode alone; so the network is handed to them as
`bncli export` would write it, and all claims about it are then checked on the engine.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from bncli.cli.messages import print_note
from bncli.errors import BncliError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from bncli.cli.opened_checkpoint import Subject
    from bncli.export.engines import EngineName
    from bncli.export.record import Precision
    from bncli.runtime import Runtime

_KEY = "runtime.engine"
_NUM_COMPARED = 32  # images whose outputs an engine must compute as PyTorch does
TORCH: Final = "torch"


def check_engine(subject: "Subject", *, processes: bool = False, **needs_train_mode: object) -> None:
    """Refuse at the start what another engine than PyTorch cannot do.

    Options of `needs_train_mode` that are given are among that. Raises ConfigError or MissingEngineError.
    """
    from bncli.export.engines import TITLES, require_engine

    engine = subject.config.runtime.engine
    if engine == TORCH:
        return
    for option, value in needs_train_mode.items():
        if value:
            raise ConfigError(f"--{option}", [f"{_KEY}={engine} computes eval mode alone; leave one out"])
    if engine == "auto":
        if processes:
            raise ConfigError(_KEY, ["several processes could choose differently; name the engine"])
        return
    device, named = subject.config.runtime.device, subject.followed.is_named
    if device not in ("auto", "cpu") and named("runtime.device"):
        raise ConfigError(_KEY, [f"{TITLES[engine]} computes on the CPU, not on {device}"])
    if named("runtime.memory_format"):
        raise ConfigError("runtime.memory_format", [f"{TITLES[engine]} chooses it; leave it out"])
    if engine == "onnxruntime" and named("runtime.precision") and _asked_precision(subject) == "bfloat16":
        raise ConfigError(
            "runtime.precision", ["ONNX Runtime computes in float32; leave it out, or take openvino"]
        )
    require_engine(engine)


def with_engine(subject: "Subject", some_images: "Callable[[], Tensor]") -> "Subject":
    """The same, computed by the engine of `runtime.engine`; checked by `check_engine` before.

    `some_images` gives inputs (N, ...) of the size of batch that matters: `auto` is measured on them. It is
    asked where another engine may compute.

    Raises BncliError where the network cannot be handed to the engine that is named.
    """
    engine = subject.config.runtime.engine
    if engine == TORCH:
        return subject
    images = some_images()
    if engine == "auto":
        return _fastest(subject, images)
    other = _computed_by(subject, engine, images)
    difference = _difference(subject, other, images)
    if difference is not None:
        print_note(f"{_KEY}={engine}: {difference}")
    return other


def _computed_by(subject: "Subject", engine: "EngineName", images: "Tensor") -> "Subject":
    import torch

    from bncli.determinism import FixedShape
    from bncli.export import on_engine

    plain = replace(
        subject.runtime,
        device=torch.device("cpu"),
        precision=torch.float32,
        memory_format=torch.contiguous_format,
    )
    network = on_engine(
        _network(subject, plain),
        images,
        engine,
        precision=_precision(subject, engine),
        threads=plain.threads,
    )
    fixed = subject.model if isinstance(subject.model, FixedShape) else None
    model = network if fixed is None else FixedShape(network, fixed.rows)
    return replace(subject, runtime=plain, model=model)


def _network(subject: "Subject", plain: "Runtime") -> "Module":
    """Ours, where the engine computes."""
    import copy

    from bncli.determinism.fixed_shape import without_fixed_shape

    network = without_fixed_shape(subject.model)
    return network if subject.runtime.device.type == "cpu" else copy.deepcopy(network).to(plain.device)


def _asked_precision(subject: "Subject") -> str:
    return subject.config.runtime.precision


def _precision(subject: "Subject", engine: "EngineName") -> "Precision":
    """ONNX Runtime has no convolution in bfloat16; OpenVINO computes as PyTorch would."""
    import torch

    from bncli.hardware import has_fast_bfloat16

    asked = _asked_precision(subject)
    if engine == "onnxruntime" or asked == "float32":
        return "float32"
    wants = asked == "bfloat16" or has_fast_bfloat16(torch.device("cpu"))
    return "bfloat16" if wants else "float32"


def _difference(subject: "Subject", other: "Subject", images: "Tensor") -> str | None:
    """How far outputs of the engine are from those of PyTorch in float32, if by more than rounding."""
    from bncli.determinism.fixed_shape import without_fixed_shape
    from bncli.export.engine_network import EngineNetwork
    from bncli.export.proof import TOLERANCES, prove

    network = without_fixed_shape(other.model)
    assert isinstance(network, EngineNetwork)
    ours = _network(subject, other.runtime)
    proof = prove(
        ours,
        network,
        images[:_NUM_COMPARED],
        engine=network.extra_repr(),
        what="",
        tolerance=TOLERANCES[network.precision_name],
    )
    if proof.holds:
        return None
    return (
        f"{proof.engine} in {network.precision_name} differs from PyTorch in float32 by"
        f" {proof.max_rel_diff:.2g} of the largest output"
    )


def _fastest(subject: "Subject", images: "Tensor") -> "Subject":
    """PyTorch as it would compute without the key, or the engine that was faster, in a short measurement."""
    import torch

    from bncli.export.engines import TITLES, MissingEngineError, require_engine
    from bncli.export.fastest import times_in_turns

    if subject.runtime.device.type != "cpu":
        print_note(f"{_KEY}=auto: PyTorch on {subject.runtime.device}; other engines compute on the CPU")
        return subject
    subjects: dict[str, Subject] = {TORCH: subject}
    left_out = []
    for engine, title in TITLES.items():
        if engine == "onnxruntime" and _asked_precision(subject) == "bfloat16":
            left_out.append(f"{title}: no bfloat16")
            continue
        try:
            require_engine(engine)
        except MissingEngineError:
            left_out.append(f"{title}: not installed")
            continue
        try:
            other = _computed_by(subject, engine, images)
            difference = _difference(subject, other, images)
        except BncliError as error:
            left_out.append(f"{title}: {error}")
            continue
        if difference is None:
            subjects[engine] = other
        else:
            left_out.append(difference)

    def call(one: "Subject") -> None:
        with torch.no_grad(), one.runtime.autocast():
            one.model(one.runtime.place(images))

    times = times_in_turns({name: partial(call, one) for name, one in subjects.items()})
    best = min(times, key=times.__getitem__)
    print_note(_measured(subjects, times, best, len(images), left_out))
    return subjects[best]


def _measured(
    subjects: Mapping[str, "Subject"],
    times: Mapping[str, float],
    best: str,
    num_images: int,
    left_out: list[str],
) -> str:
    """One line: which, and why."""
    from bncli.export.engines import TITLES
    from bncli.wording import plural

    titles = {TORCH: "PyTorch"} | {str(name): title for name, title in TITLES.items()}
    shown = [
        f"{titles[name]} in {subjects[name].describe_runtime()['precision']} {1e3 * times[name]:.3g} ms"
        for name in sorted(times, key=times.__getitem__)
    ]
    reason = ", ".join([*shown, *left_out])
    return f"{_KEY}=auto takes {titles[best]}; for {plural(num_images, 'image')}: {reason}"
