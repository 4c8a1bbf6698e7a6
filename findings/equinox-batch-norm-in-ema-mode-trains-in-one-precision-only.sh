#!/usr/bin/env bash
# Equinox's BatchNorm in mode "ema" trains on inputs of the type of its statistics only: bfloat16 inputs with
# the float32 statistics that it makes by default end in a TypeError of lax.select, deep inside.
#
# So mixed precision (activations in bfloat16, statistics in float32) is impossible in this mode, which is also
# what one gets without `mode=`. In mode "batch" the same call works. The other way round, statistics of bfloat16
# and inputs of float32 fail in both modes, where they are stored (ValueError). In inference every pair works,
# so a network that is only evaluated shows nothing.
#
# Versions: equinox 0.13.8, jax 0.10.2. Found 29 November 2026.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check jax==0.10.2 equinox==0.13.8
cat >"$folder/train.py" <<'PYTHON'
import equinox as eqx
import jax
import jax.numpy as jnp

print("equinox", eqx.__version__, "jax", jax.__version__)


def outcome(mode: str, statistics, inputs, *, inference: bool) -> str:
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode=mode, dtype=statistics)
    layer = eqx.nn.inference_mode(layer, inference)
    run = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    try:
        run(jnp.ones((4, 3), inputs), state)
    except (TypeError, ValueError) as error:
        said = str(error).splitlines()[0]
        return f"{type(error).__name__}: {said[:70]}"
    return "works"


f32, bf16 = jnp.float32, jnp.bfloat16
found = {}
for mode in ("ema", "batch"):
    for statistics, inputs in ((f32, f32), (f32, bf16), (bf16, f32), (bf16, bf16)):
        for inference in (False, True):
            key = mode, statistics.__name__, inputs.__name__, "inference" if inference else "training"
            found[key] = outcome(mode, statistics, inputs, inference=inference)
            print("mode {}, statistics {}, inputs {}, {}: {}".format(*key, found[key]))

assert found["ema", "float32", "bfloat16", "training"].startswith("TypeError"), "the behaviour has changed"
assert found["batch", "float32", "bfloat16", "training"] == "works", "the behaviour has changed"
for mode in ("ema", "batch"):
    assert found[mode, "bfloat16", "float32", "training"].startswith("ValueError"), "the behaviour has changed"
assert all(text == "works" for key, text in found.items() if key[3] == "inference"), "the behaviour has changed"
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore "$folder/train.py"
