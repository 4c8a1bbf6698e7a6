"""Whether a network can be trained on a data set: a look at what it computes, before anything is written."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bncli.batchnorm.modes import eval_mode, preserved_buffers, train_mode
from bncli.errors import BncliError, ConfigError
from bncli.models.picked_output import describe_outputs
from bncli.training.losses import find_logits


def check_network(model: nn.Module, name: str, images: Tensor, num_classes: int) -> None:
    """Compute two raw images (2, 3, H, W) in either mode; the model and the generator stay as they are.

    Raises:
        ConfigError: the network cannot compute them, or returns no logits of these classes; it has no weights
            to train, or holds what no checkpoint can.
    """

    def refuse(reason: str) -> ConfigError:
        return ConfigError(f"model {name}", [reason])

    tensors = (*model.parameters(), *model.buffers())
    if any(is_lazy(tensor) for tensor in tensors):
        raise refuse(
            "it has lazy layers, whose weights have no shape yet; let the function"
            " that makes the network compute an image once"
        )
    if not any(weight.requires_grad for weight in model.parameters()):
        raise refuse("it has no weights to train")
    if not all(isinstance(value, Tensor) for value in model.state_dict().values()):
        raise refuse("its state dict holds more than tensors, which no checkpoint of bncli keeps")
    size = "x".join(str(length) for length in images.shape[1:])
    for mode, context in (("train", train_mode), ("eval", eval_mode)):
        try:
            with context(model), preserved_buffers(model), torch.random.fork_rng(devices=[]), torch.no_grad():
                outputs = model(images)
        except BncliError as error:  # what `model.logits` asks for is not there
            raise refuse(f"model.logits: {error}") from None
        except Exception as error:  # of anybody's network
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise refuse(f"cannot compute two images of {size} values in {mode} mode: {text}") from None
        logits = find_logits(outputs) if mode == "train" else outputs
        if not isinstance(logits, Tensor):
            found = f"{describe_outputs(outputs)}; --set model.logits=NAME takes one of them"
        elif logits.ndim != 2 or len(logits) != len(images) or not logits.is_floating_point():
            found = f"a tensor {tuple(logits.shape)} of {str(logits.dtype).removeprefix('torch.')}"
        elif logits.shape[1] != num_classes:
            raise refuse(
                f"it has {logits.shape[1]:,} classes, but the data have {num_classes:,}; where it takes"
                " num_classes, it is given theirs; what else it takes goes into model.arguments"
            )
        else:
            continue
        raise refuse(f"training needs logits of shape (N, classes); in {mode} mode it returns {found}")
