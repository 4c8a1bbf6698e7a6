"""One run of 400 steps, and every moving average of its network that people take."""

import copy
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bncli.torchvision_compat import import_torchvision
from tests.audit_corpus.learning import seeded, train
from tests.audit_corpus.small import set_norm, small_resnet

NUM_STEPS = 400
Update = Callable[[int, nn.Module], None]


@seeded
def averages() -> dict[str, nn.Module]:
    """Some hold the network's statistics; in others most is still the (0, 1) that all began with."""
    import_torchvision()  # timm imports it
    from timm.utils import ModelEmaV2, ModelEmaV3

    model = set_norm(small_resnet(), momentum=0.03)
    v2 = {decay: ModelEmaV2(model, decay) for decay in (0.9, 0.9999)}
    v3, v3_warm, v3_no_step = (ModelEmaV3(model, 0.9999, use_warmup=warm) for warm in (False, True, True))
    torch_ = {
        decay: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        for decay in (0.9, 0.999)
    }
    ramped, state = copy.deepcopy(model), copy.deepcopy(model)
    floats = copy.deepcopy(model)
    for layer in floats.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.num_batches_tracked = layer.num_batches_tracked.float()

    def update(step: int, model: nn.Module) -> None:
        for average in v2.values():
            average.update(model)
        v3.update(model, step=step)
        v3_warm.update(model, step=step)
        v3_no_step.update(model)  # the warm-up needs the step; without one, it is skipped
        for average in torch_.values():
            average.update_parameters(model)
        # as Ultralytics: a decay that ramps up, of floats alone
        _mix(ramped, model, 0.9999 * (1 - math.exp(-step / 2000)), counters=False)
        _mix(state, model, 0.9999, counters=True)
        _mix(floats, model, 0.9999, counters=True)

    train(model, NUM_STEPS, after_step=update)
    return {
        "live": model,
        "v2-0.9": v2[0.9].module,
        "v2-0.9999": v2[0.9999].module,
        "v3-0.9999": v3.module,
        "v3-warmup": v3_warm.module,
        "v3-no-step": v3_no_step.module,
        "torch-0.9": torch_[0.9],
        "torch-0.999": torch_[0.999],
        "ramped": ramped,
        "state": state,
        "floats": floats,
    }


@torch.no_grad()
def _mix(average: nn.Module, model: nn.Module, decay: float, *, counters: bool) -> None:
    """One step of a moving average over the whole state dict, as many write it."""
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if counters or mean.is_floating_point():
            mean.copy_(decay * mean + (1 - decay) * value)
