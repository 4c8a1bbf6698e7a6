"""Files of Flax (linen and nnx) and Orbax, with the statistics and the eval-mode outputs of Flax itself.

    python3 -m venv flax && flax/bin/pip install jax==0.10.2 flax==0.12.8 orbax-checkpoint==0.12.8
    PYTHONPATH=. flax/bin/python tests/frameworks/make_flax.py

writes tests/frameworks/files/flax and tests/frameworks/files/orbax. Python 3.11, CPU.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"

import json
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import nnx, serialization
from flax.training import train_state
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.frameworks import ten_steps
from tests.frameworks.jax_answers import Answers

FILES = Path(__file__).parent / "files"
MSGPACK, ORBAX = FILES / "flax", FILES / "orbax"


def data(seed: int, *shape: int) -> jax.Array:
    scale = jnp.linspace(0.5, 3, shape[-1])
    return jax.random.normal(jax.random.key(seed), shape) * scale + jnp.linspace(-2, 2, shape[-1])


# ---- linen


class Block(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        return nn.BatchNorm(use_running_average=not self.train, momentum=0.9, epsilon=1e-3)(x)


class Network(nn.Module):
    """Twelve layers and more, two of them without weight or bias, one called twice, one with an odd name."""

    train: bool

    @nn.compact
    def __call__(self, x):
        norm = {"use_running_average": not self.train, "momentum": 0.9}
        x = nn.Conv(5, (1, 1))(x)
        for _ in range(11):
            x = nn.BatchNorm(**norm)(x)
        x = nn.BatchNorm(**norm, use_scale=False, use_bias=False)(x)
        x = nn.BatchNorm(**norm, use_scale=False)(x)
        shared = nn.BatchNorm(**norm, name="Odd.Name/x")
        x = shared(shared(x) + 1)
        x = nn.SpectralNorm(nn.Dense(5))(x, update_stats=self.train)
        x = nn.LayerNorm()(x)
        return Block(self.train)(Block(self.train)(x))


class Scanned(nn.Module):
    """Three blocks in one array, and one layer that is not in the loop."""

    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=not self.train, momentum=0.9)(x)
        loop = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = loop(Block(self.train), x, None)
        return nn.Dense(2)(x)


class TwoAxes(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):  # (N, 3, 2, 5)
        x = nn.BatchNorm(use_running_average=not self.train, axis=(1, 3))(x)
        return nn.Dense(2)(x)


def train_linen(network: type[nn.Module], x: jax.Array, *, jitted: bool, steps: int = 3) -> dict[str, Any]:
    """Variables after some training: with the statistics moved, and weight and bias off 1 and 0."""
    variables = network(train=True).init(jax.random.key(0), x)

    def step(variables, x):
        _, updates = network(train=True).apply(variables, x, mutable=["batch_stats"])
        return {**variables, **updates}

    run = jax.jit(step) if jitted else step
    for number in range(steps):
        variables = run(variables, x * (1 + number) + number)

    def moved(path, leaf):
        number = sum(map(ord, jax.tree_util.keystr(path))) % 1000
        return leaf + 0.1 * jax.random.normal(jax.random.key(number), leaf.shape, leaf.dtype)

    if jitted:  # tree.map sorts
        return {**variables, "params": jax.tree_util.tree_map_with_path(moved, variables["params"])}

    def walk(node, path=()):  # keeps the order of calls
        if not isinstance(node, dict):
            return moved(tuple(jax.tree_util.DictKey(key) for key in path), node)
        return {key: walk(part, (*path, key)) for key, part in node.items()}

    return {**variables, "params": walk(variables["params"])}


def linen_answers(
    answers: Answers, file: str, network: type[nn.Module], variables: dict[str, Any], x: jax.Array
) -> None:
    """Each BatchNorm in the order of calls, with what went in and came out in eval mode."""
    seen: dict[tuple[str, ...], list[tuple[nn.BatchNorm, Any, Any]]] = {}

    def spy(function, arguments, keywords, context):
        out = function(*arguments, **keywords)
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
            seen.setdefault(context.module.path, []).append((context.module, arguments[0], out))
        return out

    with nn.intercept_methods(spy):
        network(train=False).apply(variables, x)
    for path, calls in seen.items():
        module, given, out = calls[0]
        stats = variables["batch_stats"]
        params = variables["params"]
        for key in path:
            stats, params = stats[key], params.get(key, {})
        answers.add(
            file,
            ".".join(path),
            eps=module.epsilon,
            momentum=module.momentum,
            running_mean=stats["mean"],
            running_var=stats["var"],
            weight=params.get("scale"),
            bias=params.get("bias"),
            input=given,
            output=out,
        )


def scan_answers(answers: Answers, file: str, variables: dict[str, Any], x: jax.Array) -> None:
    """Each layer of the stack by itself: a block with its own slice of every array."""

    def add(name: str, stats, params, eps, given):
        norm = nn.BatchNorm(use_running_average=True, momentum=0.9, epsilon=eps)
        out = norm.apply({"params": params, "batch_stats": stats}, given)
        answers.add(
            file, name, eps=eps, momentum=0.9, running_mean=stats["mean"], running_var=stats["var"],
            weight=params["scale"], bias=params["bias"], input=given, output=out,
        )  # fmt: skip

    stats, params = variables["batch_stats"], variables["params"]
    add("BatchNorm_0", stats["BatchNorm_0"], params["BatchNorm_0"], 1e-5, x)
    (scan,) = (key for key in stats if key != "BatchNorm_0")
    for index in range(3):
        stat, param = (
            jax.tree.map(lambda leaf, i=index: leaf[i], tree[scan]["BatchNorm_0"]) for tree in (stats, params)
        )
        add(f"{scan}.BatchNorm_0[{index}]", stat, param, 1e-3, x)


def linen_files(answers: Answers) -> None:
    x = data(1, 4, 2, 2, 3)
    called = train_linen(Network, x, jitted=False)
    (MSGPACK / "called.msgpack").write_bytes(serialization.to_bytes(called))
    linen_answers(answers, "called.msgpack", Network, called, x)

    sorted_ = train_linen(Network, x, jitted=True)
    assert list(sorted_["batch_stats"])[2] == "BatchNorm_10"

    class State(train_state.TrainState):
        batch_stats: Any

    state = State.create(
        apply_fn=None, params=sorted_["params"], tx=optax.adam(1e-3), batch_stats=sorted_["batch_stats"]
    )
    (MSGPACK / "sorted.msgpack").write_bytes(serialization.to_bytes(state))
    linen_answers(answers, "sorted.msgpack", Network, sorted_, x)

    limit, serialization.MAX_CHUNK_SIZE = serialization.MAX_CHUNK_SIZE, 8
    (MSGPACK / "chunked.msgpack").write_bytes(serialization.to_bytes(called))
    serialization.MAX_CHUNK_SIZE = limit
    linen_answers(answers, "chunked.msgpack", Network, called, x)

    bfloat16 = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), called)
    (MSGPACK / "bfloat16.msgpack").write_bytes(serialization.to_bytes(bfloat16))
    linen_answers(answers, "bfloat16.msgpack", Network, bfloat16, x)

    flat = data(2, 8, 4)
    scanned = train_linen(Scanned, flat, jitted=True)
    (MSGPACK / "scan.msgpack").write_bytes(serialization.to_bytes(scanned))
    scan_answers(answers, "scan.msgpack", scanned, flat)

    axes = data(3, 4, 3, 2, 5)
    two = train_linen(TwoAxes, axes, jitted=False)
    (MSGPACK / "two-axes.msgpack").write_bytes(serialization.to_bytes(two))
    stats, params = two["batch_stats"]["BatchNorm_0"], two["params"]["BatchNorm_0"]
    answers.add(
        "two-axes.msgpack", "BatchNorm_0", eps=1e-5, momentum=0.99,
        running_mean=stats["mean"], running_var=stats["var"], weight=params["scale"], bias=params["bias"],
    )  # fmt: skip

    for name, equal in (("replicated.msgpack", True), ("drifted.msgpack", False)):
        called_flat = train_linen(Block, flat, jitted=True)
        copies = jax.device_get(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), called_flat))
        if not equal:  # statistics of two devices that nobody averaged
            copies["batch_stats"] = jax.tree.map(
                lambda leaf: leaf * np.float32([[1], [1.5]]), copies["batch_stats"]
            )
        (MSGPACK / name).write_bytes(serialization.to_bytes(copies))
        for index in (0,) if equal else (0, 1):
            one = jax.tree.map(lambda leaf, i=index: leaf[i], copies)
            linen_answers(answers, name, Block, one, flat)
            if not equal:
                answers.layers[name][-1]["name"] += f"[{index}]"
    one_device = jax.tree.map(lambda leaf: leaf[None], called_flat)
    (MSGPACK / "one-device.msgpack").write_bytes(serialization.to_bytes(one_device))
    linen_answers(answers, "one-device.msgpack", Block, called_flat, flat)


# ---- nnx


class NnxNetwork(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.zz = nnx.BatchNorm(4, rngs=rngs, momentum=0.9)
        self.alias = self.zz
        self.blocks = nnx.List([nnx.BatchNorm(4, rngs=rngs, use_bias=False) for _ in range(11)])
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.plain = nnx.BatchNorm(4, rngs=rngs, use_bias=False, use_scale=False)

    def __call__(self, x):
        x = self.zz(x)
        for block in self.blocks:
            x = block(x * 1.5 + 0.25)
        return self.plain(self.norm(x))


def nnx_network(x: jax.Array) -> tuple[NnxNetwork, list[tuple[str, nnx.BatchNorm]]]:
    network = NnxNetwork(nnx.Rngs(0))
    for number in range(3):
        network(x * (1 + number))
    layers = [
        ("alias", network.zz),
        *((f"blocks.{index}", block) for index, block in enumerate(network.blocks)),
        ("plain", network.plain),
    ]
    for index, (_, layer) in enumerate(layers):
        for part in (layer.scale, layer.bias):
            if part is not None:
                part[...] = part[...] + 0.1 * data(index, 4)
    network.eval()
    return network, layers


def nnx_answers(answers: Answers, file: str, layers: list[tuple[str, nnx.BatchNorm]], x: jax.Array) -> None:
    for name, layer in layers:
        answers.add(
            file, name, eps=layer.epsilon, momentum=layer.momentum,
            running_mean=layer.mean[...], running_var=layer.var[...],
            weight=None if layer.scale is None else layer.scale[...],
            bias=None if layer.bias is None else layer.bias[...],
            input=x, output=layer(x),
        )  # fmt: skip


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)


def nnx_stack(answers: Answers, file: str) -> dict[str, Any]:
    """Three blocks made by nnx.vmap: each array has a leading axis of three."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> NnxBlock:
        return NnxBlock(rngs)

    blocks = make(nnx.Rngs(0))
    blocks.bn.mean[...] = data(1, 3, 4)
    blocks.bn.var[...] = jnp.abs(data(2, 3, 4)) + 0.1
    x = data(5, 6, 4)
    for index in range(3):
        layer = nnx.BatchNorm(4, rngs=nnx.Rngs(0), use_running_average=True)
        layer.mean[...], layer.var[...] = blocks.bn.mean[...][index], blocks.bn.var[...][index]
        nnx_answers(answers, file, [(f"bn[{index}]", layer)], x)
    return nnx.to_pure_dict(nnx.state(blocks))


def nnx_files(answers: Answers) -> None:
    x = data(4, 6, 4)
    network, layers = nnx_network(x)
    pure = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(network)))
    pure["blocks"] = {str(key): part for key, part in pure["blocks"].items()}
    (MSGPACK / "nnx.msgpack").write_bytes(serialization.msgpack_serialize(pure))
    nnx_answers(answers, "nnx.msgpack", layers, x)
    stack = jax.tree.map(np.asarray, nnx_stack(answers, "nnx-vmap.msgpack"))
    (MSGPACK / "nnx-vmap.msgpack").write_bytes(serialization.msgpack_serialize(stack))


# ---- Orbax


def save(name: str, tree: Any, **options: bool) -> None:
    handler = ocp.PyTreeCheckpointHandler(**options)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(ORBAX / name, tree)


def orbax_files(answers: Answers) -> None:
    x = data(1, 4, 2, 2, 3)
    variables = train_linen(Network, x, jitted=True)
    for name, ocdbt, zarr3 in (
        ("ocdbt", True, False),
        ("ocdbt-zarr3", True, True),
        ("folders", False, False),
        ("folders-zarr3", False, True),
    ):
        small = variables if name == "ocdbt" else train_linen(Block, data(2, 8, 4), jitted=True)
        save(name, small, use_ocdbt=ocdbt, use_zarr3=zarr3)
        if name == "ocdbt":
            linen_answers(answers, name, Network, small, x)
        else:
            linen_answers(answers, name, Block, small, data(2, 8, 4))

    # untrained: its means are zeros, of which TensorStore writes no chunk
    fresh = Block(train=True).init(jax.random.key(0), data(2, 8, 4))
    save("untrained", fresh, use_ocdbt=True, use_zarr3=True)
    linen_answers(answers, "untrained", Block, fresh, data(2, 8, 4))

    # an array of 1,200 bytes that does not compress lies outside the tree, in another data file
    wide = data(7, 3, 300)
    layer = nn.BatchNorm(use_running_average=False, momentum=0.5)
    variables = layer.init(jax.random.key(0), wide)
    _, updates = layer.apply(variables, wide, mutable=["batch_stats"])
    wide_variables = {"params": {"bn": variables["params"]}, "batch_stats": {"bn": updates["batch_stats"]}}
    save("wide", wide_variables, use_ocdbt=True, use_zarr3=False)
    stats, params = updates["batch_stats"], variables["params"]
    out = nn.BatchNorm(use_running_average=True).apply({"params": params, "batch_stats": stats}, wide)
    answers.add(
        "wide", "bn", eps=1e-5, momentum=0.5, running_mean=stats["mean"], running_var=stats["var"],
        weight=params["scale"], bias=params["bias"], input=wide, output=out,
    )  # fmt: skip

    # arrays divided among two devices: two chunks each
    mesh = Mesh(np.array(jax.devices()), ("x",))
    block = train_linen(Block, data(2, 8, 4), jitted=True)
    divided = jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "x"))),
        block,
    )
    for name, zarr3 in (("sharded", False), ("sharded-zarr3", True)):
        save(name, divided, use_ocdbt=False, use_zarr3=zarr3)
        linen_answers(answers, name, Block, block, data(2, 8, 4))

    nnx_x = data(4, 6, 4)
    network, layers = nnx_network(nnx_x)
    save("nnx", nnx.state(network), use_ocdbt=True, use_zarr3=False)  # with `.value`
    nnx_answers(answers, "nnx", layers, nnx_x)

    with ocp.CheckpointManager(ORBAX / "manager") as manager:
        for step in (2, 10):
            scaled = jax.tree.map(lambda leaf, by=step: leaf * by, block)
            manager.save(step, args=ocp.args.StandardSave(scaled))
    linen_answers(answers, "manager", Block, scaled, data(2, 8, 4))


def ocdbt_store() -> None:
    """A tree of several levels, which Orbax makes for large networks only."""
    path = ORBAX.parent / "ocdbt"
    shutil.rmtree(path, ignore_errors=True)
    store = ts.KvStore.open(
        {
            "driver": "ocdbt",
            "base": f"file://{path}/",
            "config": {"max_decoded_node_bytes": 400, "max_inline_value_bytes": 20},
        }
    ).result()
    values = {f"layer{number % 7}/{number}/value": f"{number} " * (number % 12) for number in range(150)}
    with ts.Transaction() as transaction:
        for key, value in values.items():
            store.with_transaction(transaction)[key] = value
    store["layer3/3/value"] = "written again"  # a second version
    del store["layer4/4/value"]
    final = {key.decode(): bytes(store[key]).decode() for key in store.list().result()}
    (path / "answers.json").write_text(json.dumps(final, indent=0) + "\n")


class TwoLayers(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, images, features):
        norm = {"use_running_average": not self.train}
        nn.BatchNorm(**norm, momentum=0.875, epsilon=0.01, name="images")(images)
        return nn.BatchNorm(**norm, momentum=0.75, epsilon=0.02, name="features")(features)


def record_ten_steps() -> None:
    def inputs(step: int) -> tuple[Any, Any]:
        images = ten_steps.channels_last(ten_steps.batch(step, ten_steps.IMAGES))
        return images, ten_steps.batch(step, ten_steps.FEATURES)

    network = TwoLayers(train=True)
    variables = network.init(jax.random.key(0), *inputs(0))

    def train(variables: dict[str, Any], steps: range) -> dict[str, Any]:
        for step in steps:
            _, updates = network.apply(variables, *inputs(step), mutable=["batch_stats"])
            variables = {**variables, **updates}
        return variables

    variables = train(variables, ten_steps.BEFORE)
    ten_steps.FOLDER.mkdir(parents=True, exist_ok=True)
    (ten_steps.FOLDER / "flax.msgpack").write_bytes(serialization.to_bytes(variables))
    stats = train(variables, ten_steps.AFTER)["batch_stats"]
    told = [
        ten_steps.layer(
            name, shape, mean=stats[name]["mean"], var=stats[name]["var"], momentum=momentum, eps=eps
        )
        for name, shape, momentum, eps in (
            ("images", ten_steps.IMAGES, 0.125, 0.01), ("features", ten_steps.FEATURES, 0.25, 0.02),
        )
    ]  # fmt: skip
    ten_steps.write("flax", "flax.msgpack", told)


def main() -> None:
    for folder in (MSGPACK, ORBAX):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    flax, orbax = Answers(MSGPACK), Answers(ORBAX)
    linen_files(flax)
    nnx_files(flax)
    flax.write()
    orbax_files(orbax)
    orbax.write()
    for path in sorted(ORBAX.rglob("*")):  # what no reader needs
        if path.is_file() and path.name in ("_sharding", "commit_success.txt", "process_0"):
            path.unlink()
    ocdbt_store()
    record_ten_steps()


if __name__ == "__main__":
    main()
