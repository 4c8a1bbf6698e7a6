"""Files of Equinox, with the statistics and the eval-mode outputs of Equinox itself.

    python3 -m venv equinox && equinox/bin/pip install jax==0.10.2 equinox==0.13.8
    PYTHONPATH=. equinox/bin/python tests/frameworks/make_equinox.py

writes tests/frameworks/files/equinox. Python 3.11, CPU.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from tests.frameworks import ten_steps
from tests.frameworks.jax_answers import Answers

FOLDER = Path(__file__).parent / "files" / "equinox"


class Network(eqx.Module):
    """Fields in another order than they are called in; LayerNorm and Dropout look alike in the file."""

    late: eqx.nn.BatchNorm
    linear: eqx.nn.Linear
    plain: eqx.nn.BatchNorm
    norm: eqx.nn.LayerNorm
    dropout: eqx.nn.Dropout
    blocks: list[eqx.nn.BatchNorm]

    def __init__(self, key: Any, **options: Any) -> None:
        self.blocks = [eqx.nn.BatchNorm(4, "batch", **options) for _ in range(2)]
        self.linear = eqx.nn.Linear(4, 3, key=key, dtype=options.get("dtype"))
        self.plain = eqx.nn.BatchNorm(3, "batch", channelwise_affine=False, **options)
        self.norm = eqx.nn.LayerNorm(3, dtype=options.get("dtype"))
        self.dropout = eqx.nn.Dropout(0.25)
        self.late = eqx.nn.BatchNorm(3, "batch", **options)

    def __call__(self, x, state, key):
        for block in self.blocks:
            x, state = block(x * 2 + 1, state)
        x, state = self.plain(self.linear(x), state)
        return self.late(self.dropout(self.norm(x), key=key), state)


def layers_of(network: Network) -> list[eqx.nn.BatchNorm]:
    return [network.late, network.plain, *network.blocks]


def data(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) * 2 + jnp.linspace(-1, 1, shape[-1])


def trained(steps: int, **options: Any) -> tuple[Network, eqx.nn.State]:
    network, state = eqx.nn.make_with_state(Network)(jax.random.key(0), **options)
    for step in range(steps):
        keys = jax.random.split(jax.random.key(step), 8)
        run = jax.vmap(network, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
        x = data(step, 8, 4).astype(options.get("dtype", jnp.float32))
        _, state = run(x, state, keys)

    def parts(tree: Network) -> list[jax.Array]:
        affine = [layer for layer in layers_of(tree) if layer.weight is not None]
        return [part for layer in affine for part in (layer.weight, layer.bias)]

    moved = [
        part + 0.1 * data(9 + index % 2, *part.shape).astype(part.dtype)
        for index, part in enumerate(parts(network))
    ]
    network = eqx.tree_at(parts, network, moved)
    return network, state


def save(answers: Answers, file: str, network: Network, state: eqx.nn.State, prefix: bytes = b"") -> None:
    with (FOLDER / file).open("wb") as stream:
        stream.write(prefix)
        eqx.tree_serialise_leaves(stream, (network, state))
    for index, layer in enumerate(layers_of(eqx.nn.inference_mode(network))):
        x = data(20 + index, 6, layer.input_size)
        out, _ = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        extra = {}
        if layer.mode == "batch":
            counter = state.get(layer.batch_counter)
            mean, var = state.get(layer.batch_state_index)
            scale = jnp.where(counter == 0, 1, 1 - layer.momentum**counter)  # as its __call__ does
            mean, var, extra = mean / scale, var / scale, {"count": counter}
        else:
            mean, var = state.get(layer.ema_state_index)
        answers.add(
            file, f"batch_norm_{index}", eps=layer.eps, momentum=layer.momentum, running_mean=mean,
            running_var=var, weight=layer.weight, bias=layer.bias, input=x, output=out, **extra,
        )  # fmt: skip


class TwoLayers(eqx.Module):
    images: eqx.nn.BatchNorm
    features: eqx.nn.BatchNorm

    def __init__(self, mode: str) -> None:
        self.images = eqx.nn.BatchNorm(3, "batch", momentum=0.875, eps=0.01, mode=mode)
        self.features = eqx.nn.BatchNorm(5, "batch", momentum=0.75, eps=0.02, mode=mode)

    def __call__(self, images, features, state):
        _, state = self.images(images, state)
        return self.features(features, state)


def record_ten_steps(name: str, mode: str, before: range) -> None:
    """In mode `batch` after few steps and after many: its averages are divided by 1 - momentum^t."""
    network, state = eqx.nn.make_with_state(TwoLayers)(mode)
    run = jax.vmap(network, axis_name="batch", in_axes=(0, 0, None), out_axes=(0, None))

    def train(state: Any, steps: range) -> Any:
        for step in steps:
            images, features = (
                ten_steps.batch(step, shape) for shape in (ten_steps.IMAGES, ten_steps.FEATURES)
            )
            _, state = run(images, features, state)
        return state

    state = train(state, before)
    ten_steps.FOLDER.mkdir(parents=True, exist_ok=True)
    eqx.tree_serialise_leaves(ten_steps.FOLDER / f"{name}.eqx", (network, state))
    state = train(state, ten_steps.AFTER)
    told = []
    for index, shape in ((0, ten_steps.IMAGES), (1, ten_steps.FEATURES)):
        layer = (network.images, network.features)[index]
        scale = 1.0
        if mode == "batch":
            scale = 1 - layer.momentum ** int(state.get(layer.batch_counter))  # as its __call__ does
            mean, var = state.get(layer.batch_state_index)
        else:
            mean, var = state.get(layer.ema_state_index)
        told.append(
            ten_steps.layer(
                f"batch_norm_{index}", shape, mean=mean / scale, var=var / scale,
                momentum=1 - layer.momentum, eps=layer.eps,
            )
        )  # fmt: skip
    ten_steps.write(name, f"{name}.eqx", told)


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    answers = Answers(FOLDER)
    for file, steps, options in (
        ("batch-1.eqx", 1, {"mode": "batch"}),
        ("batch-40.eqx", 40, {"mode": "batch"}),
        ("untrained.eqx", 0, {"mode": "batch"}),
        ("ema.eqx", 5, {"mode": "ema"}),
        ("bfloat16.eqx", 3, {"mode": "ema", "dtype": jnp.bfloat16}),
    ):
        save(answers, file, *trained(steps, **options))
    network, state = trained(5, mode="ema")
    save(answers, "with-line.eqx", network, state, json.dumps({"width": 4}).encode() + b"\n")
    eqx.tree_serialise_leaves(FOLDER / "model-only.eqx", network)
    answers.write()
    record_ten_steps("equinox_young", "batch", ten_steps.BEFORE)
    record_ten_steps("equinox", "batch", range(100, 300))
    record_ten_steps("equinox_ema", "ema", ten_steps.BEFORE)


if __name__ == "__main__":
    main()
