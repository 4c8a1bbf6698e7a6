#!/usr/bin/env bash
# One torch.autocast context around a whole training loop computes every step with the weights of the first.
#
# Autocast casts each weight once and keeps the copy until the outermost context ends. An optimiser's step
# changes the weight in place and does not clear that copy. So a loop inside one context goes on computing with
# the first weights: no error and no warning, the weights move, and BatchNorm's running statistics come to fit
# the first weights exactly instead of the saved ones. In eval mode, outside the context, mean and variance are
# then those of another network. With one context around each forward pass the same loop is right.
#
# Versions: torch 2.13.0, on the CPU in bfloat16. Found 27 November 2026.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
cat >"$folder/train.py" <<'PYTHON'
import torch
from torch import nn

torch.set_num_threads(1)
print("torch", torch.__version__)


def train(one_context: bool) -> tuple[float, float, float]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    convolution, norm = network
    first = convolution.weight.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    images = torch.randn(64, 3, 8, 8)
    target = torch.linspace(-1, 1, 8)[:, None, None] * images[:, :1, :6, :6]

    def step() -> None:
        loss = (network(images) * target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    if one_context:
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(100):
                step()
    else:
        for _ in range(100):
            with torch.autocast("cpu", torch.bfloat16):
                step()
    with torch.no_grad():
        by_weights = []
        for weight in (first, convolution.weight):
            variance = nn.functional.conv2d(images, weight, convolution.bias).var((0, 2, 3))
            by_weights.append((norm.running_var / variance).log().abs().mean().exp().item())
        moved = ((convolution.weight - first).norm() / first.norm()).item()
    return moved, *by_weights


for one_context in (True, False):
    moved, against_first, against_last = train(one_context)
    print(
        f"{'one context around the loop' if one_context else 'a context for each step   '}:"
        f" weights moved by {moved:.1f} of their norm; running_var is off by a factor of {against_first:.3f} from"
        f" the first weights' variance, {against_last:.3f} from the last weights'"
    )
    if one_context:
        assert moved > 1 and against_first < 1.01 and against_last > 10, "the behaviour has changed"
    else:
        assert moved > 1 and against_first > 1.1 and against_last < 1.05, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/train.py"
