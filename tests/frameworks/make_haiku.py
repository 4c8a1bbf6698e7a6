"""Files of Haiku as people save them, with the statistics and the eval-mode outputs of Haiku itself.

    python3 -m venv haiku && haiku/bin/pip install jax==0.10.2 dm-haiku==0.0.17
    PYTHONPATH=. haiku/bin/python tests/frameworks/make_haiku.py

writes tests/frameworks/files/haiku. Python 3.11, CPU.
"""

import pickle
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from tests.frameworks import ten_steps
from tests.frameworks.jax_answers import Answers

FOLDER = Path(__file__).parent / "files" / "haiku"
DECAY = 0.9
FEW = ("inner", "plain", "one", "last")  # modules in files that would be large with all


class Inner(hk.Module):
    """Modules that are made in __init__ have `/~/` in their names."""

    def __init__(self) -> None:
        super().__init__(name="inner")
        self.norm = hk.BatchNorm(True, True, DECAY, eps=1e-3)

    def __call__(self, x, train):
        return self.norm(x, train)


def network(x, train):  # (N, 2, 2, 3)
    for _ in range(11):
        x = hk.BatchNorm(True, True, DECAY)(x, train)
    x = Inner()(x, train)
    x = hk.BatchNorm(False, False, DECAY, name="plain")(x, train)
    first = hk.BatchNorm(True, False, DECAY, data_format="N...C", name="one_of_two")
    x = first(first(x, train) + 1, train)  # twice a step
    channels_first = hk.BatchNorm(False, True, DECAY, data_format="NC...", name="channels_first")
    x = jnp.moveaxis(channels_first(jnp.moveaxis(x, -1, 1), train), 1, -1)
    x = hk.Linear(4)(hk.Flatten()(x))
    ema = hk.ExponentialMovingAverage(0.5)  # looks alike
    ema(x.mean())
    return hk.BatchNorm(True, True, DECAY, name="last")(x, train)


class Both(NamedTuple):
    params: Any
    state: Any
    step: int


def data(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) * 2 + jnp.linspace(-1, 1, shape[-1])


def trained(dtype: Any = jnp.float32, steps: int = 4) -> tuple[Any, Any]:
    model = hk.transform_with_state(network)
    params, state = model.init(jax.random.key(0), data(0, 4, 2, 2, 3).astype(dtype), True)
    for step in range(steps):
        _, state = model.apply(params, state, None, data(step, 4, 2, 2, 3).astype(dtype) * (1 + step), True)
    params = {
        module: {
            name: leaf + (0.1 * data(len(module), *leaf.shape)).astype(leaf.dtype)
            for name, leaf in parts.items()
        }
        for module, parts in params.items()
    }
    return params, state


def answer(answers: Answers, file: str, params: Any, state: Any, dtype: Any = jnp.float32) -> None:
    """In the order of calls, what went into each layer and came out."""
    seen: dict[str, tuple[hk.BatchNorm, Any, Any]] = {}

    def spy(function, arguments, keywords, context):
        out = function(*arguments, **keywords)
        if isinstance(context.module, hk.BatchNorm) and context.method_name == "__call__":
            seen.setdefault(context.module.module_name, (context.module, arguments[0], out))
        return out

    def run(x):
        with hk.intercept_methods(spy):
            return network(x, False)

    hk.transform_with_state(run).apply(params, state, None, data(9, 4, 2, 2, 3).astype(dtype))
    for name, (layer, *arrays) in seen.items():
        last = [jnp.moveaxis(array, 1, -1) if name == "channels_first" else array for array in arrays]
        mean, var = (state[f"{name}/~/{which}_ema"] for which in ("mean", "var"))
        own = params.get(name, {})
        answers.add(
            file, name, eps=layer.eps, momentum=DECAY, running_mean=mean["average"],
            running_var=var["average"], weight=own.get("scale"), bias=own.get("offset"), input=last[0],
            output=last[1], count=mean["counter"],
        )  # fmt: skip


def two_layers(images, features, train):
    hk.BatchNorm(True, True, 0.875, eps=0.01, name="images")(images, train)
    return hk.BatchNorm(True, True, 0.75, eps=0.02, name="features")(features, train)


def record_ten_steps(name: str, before: range) -> None:
    """After few steps and after many: its averages are divided by 1 - decay^t."""
    model = hk.transform_with_state(two_layers)

    def inputs(step: int) -> tuple[Any, Any]:
        images = ten_steps.channels_last(ten_steps.batch(step, ten_steps.IMAGES))
        return images, ten_steps.batch(step, ten_steps.FEATURES)

    params, state = model.init(jax.random.key(0), *inputs(0), True)
    for step in before:
        _, state = model.apply(params, state, None, *inputs(step), True)
    ten_steps.FOLDER.mkdir(parents=True, exist_ok=True)
    (ten_steps.FOLDER / f"{name}.pkl").write_bytes(pickle.dumps(jax.device_get((params, state))))
    for step in ten_steps.AFTER:
        _, state = model.apply(params, state, None, *inputs(step), True)
    told = [
        ten_steps.layer(
            layer, shape, mean=state[f"{layer}/~/mean_ema"]["average"],
            var=state[f"{layer}/~/var_ema"]["average"], momentum=momentum, eps=eps,
        )
        for layer, shape, momentum, eps in (
            ("images", ten_steps.IMAGES, 0.125, 0.01), ("features", ten_steps.FEATURES, 0.25, 0.02),
        )
    ]  # fmt: skip
    ten_steps.write(name, f"{name}.pkl", told)


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    answers = Answers(FOLDER)
    params, state = trained()
    host = jax.device_get((params, state))
    for protocol in (2, 3, 4, 5):
        for kind, content in (("numpy", host), ("jax", (params, state))):
            if kind == "numpy" or protocol == 4:
                file = f"{kind}-{protocol}.pkl"
                (FOLDER / file).write_bytes(pickle.dumps(content, protocol=protocol))
                if answers.layers:
                    answers.same(file, "numpy-2.pkl")
                else:
                    answer(answers, file, params, state)
    (FOLDER / "dict.pkl").write_bytes(pickle.dumps({"params": host[0], "state": host[1], "step": 3}))
    (FOLDER / "named-tuple.pkl").write_bytes(pickle.dumps(Both(*host, 3)))
    np.savez(FOLDER / "objects.npz", params=host[0], state=host[1])
    np.save(FOLDER / "objects.npy", {"params": host[0], "state": host[1]}, allow_pickle=True)
    flat = {
        (collection, module, name): leaf
        for collection, tree in zip(("params", "state"), host, strict=True)
        for module, parts in tree.items()
        for name, leaf in parts.items()
        if module.startswith(FEW)
    }
    for file, sign in (("slash.npz", "/"), ("bar.npz", "|"), ("lines.npz", "__")):
        np.savez_compressed(FOLDER / file, **{sign.join(key): leaf for key, leaf in flat.items()})
        if sign == "/":
            answer(answers, file, params, state)
            answers.layers[file] = [layer for layer in answers.layers[file] if layer["name"].startswith(FEW)]
        else:
            answers.same(file, "slash.npz")
    for file in ("dict.pkl", "named-tuple.pkl", "objects.npz", "objects.npy"):
        answers.same(file, "numpy-2.pkl")
    params, state = trained(jnp.bfloat16)
    (FOLDER / "bfloat16.pkl").write_bytes(pickle.dumps(jax.device_get((params, state))))
    answer(answers, "bfloat16.pkl", params, state, jnp.bfloat16)
    params, state = trained(steps=0)  # the average holds the statistics of the example batch
    (FOLDER / "untrained.pkl").write_bytes(pickle.dumps(jax.device_get((params, state))))
    answer(answers, "untrained.pkl", params, state)
    (FOLDER / "state-only.pkl").write_bytes(pickle.dumps(jax.device_get(state)))
    answers.write()
    record_ten_steps("haiku_young", ten_steps.BEFORE)
    record_ten_steps("haiku", range(100, 300))


if __name__ == "__main__":
    main()
