"""NaN and infinity in training: noticed, and traced to where they began."""

import torch
from torch import Tensor, nn

from bncli.batchnorm.modes import preserved_buffers
from bncli.training.losses import loss_and_logits
from bncli.training.run import Run

IN_THE_UPDATE = "it began in the update of the weights"


def all_finite(model: nn.Module, loss: Tensor) -> bool:
    """Whether the loss, every weight and every running statistic is finite, after one step or several.

    A gradient that is not makes the weights it is subtracted from the same, and what is once NaN stays it, so
    with the sum of the losses of all steps every one of them is covered.
    """
    with torch.no_grad():
        tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
        # not finite if one number is not; it may also overflow, so only then each number is looked at
        if bool(nn.utils.get_total_norm([loss, *tensors]).isfinite()):
            return True
        return all(bool(tensor.isfinite().all()) for tensor in (loss, *tensors))


def find_origin(run: Run, images: Tensor, labels: Tensor) -> str:
    """In words, where the next step of `run`, on this batch, makes a number that is not finite.

    The batch is computed once more, from the state before the step; buffers and weights are left alone.
    """
    for name, tensor in (*run.model.named_parameters(), *run.model.named_buffers()):
        if not bool(tensor.isfinite().all()):
            return f"{name} was not finite before the step"
    outputs: list[str] = []
    handles = [
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: (
                outputs.append(name)
                if isinstance(output, Tensor) and not bool(output.isfinite().all())
                else None
            )
        )
        for name, module in run.model.named_modules()
        if not list(module.children())
    ]
    try:
        share = run.share_in(labels)
        parts = zip(images.split(share.sizes), labels.split(share.sizes), strict=True)
        with preserved_buffers(run.model), run.synchronized():
            for number, (part, part_labels) in enumerate(parts, share.first):
                with run.network_randomness(number):
                    origin = _origin_in_part(run, part, part_labels, outputs)
                if origin is not None:
                    return f"it began in {origin}"
        return IN_THE_UPDATE
    finally:
        for handle in handles:
            handle.remove()


def _origin_in_part(run: Run, images: Tensor, labels: Tensor, outputs: list[str]) -> str | None:
    """The first thing that is not finite in the pass of these images; hooks name layers in `outputs`."""
    loss = _loss_of(run, images, labels)
    if outputs:
        return f"the output of {outputs[0]}"
    if not bool(loss.isfinite()):
        return "the loss: the logits are too large"
    buffers = [name for name, buffer in run.model.named_buffers() if not bool(buffer.isfinite().all())]
    if buffers:
        return buffers[0]
    # before the buffers are written back, which would invalidate the graph
    return _origin_behind_the_loss(run, loss)


def _origin_behind_the_loss(run: Run, loss: Tensor) -> str | None:
    parameters = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    bad = [name for name, gradient in pairs if gradient is not None and not bool(gradient.isfinite().all())]
    # gradients are computed from the last layer to the first
    return f"the gradient of {bad[-1]}" if bad else None


def _loss_of(run: Run, images: Tensor, labels: Tensor) -> Tensor:
    runtime = run.setup.runtime
    with runtime.autocast():
        outputs = run.model(runtime.place(images))
    return loss_and_logits(outputs, labels.to(runtime.device), run.setup.config.train.label_smoothing)[0]
