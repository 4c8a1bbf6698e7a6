#!/usr/bin/env bash
# On a CPU, BatchNorm's backward pass takes the memory of the input's gradient twice, and uses one of the two.
#
# In train mode and in eval mode, float32 and bfloat16, contiguous and channels_last: the operator makes a tensor of
# the input's size, makes a second one, writes the gradient into that, and frees the first. Only where the layouts
# of input and gradient differ, it makes one. So the peak of a training step holds one activation more than needed,
# at the layer whose activations are largest, where the peak mostly is; only a memory profile shows it.
#
# Versions: torch 2.13.0 (CPU). Found 30 November 2026.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat >"$folder/memory.py" <<'PYTHON'
import torch
from torch.profiler import profile


def allocations(layout, dtype, train, gradient_layout):
    """How often the backward pass takes memory of the input's size, and how much of it is free again."""
    x = torch.randn(32, 64, 64, 64).to(dtype).contiguous(memory_format=layout)
    weight, bias, mean, var = torch.ones(64), torch.zeros(64), torch.zeros(64), torch.ones(64)
    if dtype == torch.bfloat16 and not train:
        weight, bias, mean, var = (each.to(dtype) for each in (weight, bias, mean, var))
    _, saved_mean, saved_invstd = torch.native_batch_norm(x, weight, bias, mean, var, train, 0.1, 1e-5)
    gradient = torch.randn_like(x).contiguous(memory_format=gradient_layout)
    with profile(profile_memory=True) as profiled:
        result = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, var, saved_mean, saved_invstd, train, 1e-5, [True, True, True]
        )
    size = x.numel() * x.element_size()
    found = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert result[0].shape == x.shape
    return sum(each == size for each in found), sum(each == -size for each in found)


print("torch", torch.__version__, "- tensors of the input's size: taken, freed before the result is there")
layouts = (torch.contiguous_format, torch.channels_last)
for layout in layouts:
    for dtype in (torch.float32, torch.bfloat16):
        for train in (True, False):
            found = allocations(layout, dtype, train, layout)
            print(layout, dtype, "train mode" if train else "eval mode", *found)
            assert found == (2, 1), "the behaviour has changed"
found = allocations(layouts[0], torch.float32, True, layouts[1])
print("layouts of input and gradient differ", *found)
assert found[0] == 1, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/memory.py"
