"""A callback for Lightning: measure population statistics before each validation.

    trainer = Trainer(callbacks=[RecalibrateBeforeValidation(training_loader)])

Works with `lightning` and with `pytorch_lightning`: with the one that is imported already, else the first.
The extra `bncli[lightning]` installs it.
"""

import sys
from typing import TYPE_CHECKING

import torch

from bncli.batches import Batches, GetTensor
from bncli.batchnorm.population.selection import Layers
from bncli.before_validation import NUM_IMAGES, recalibrate_before_validation
from bncli.distributed.ranks import Ranks
from bncli.distributed.shards import divided
from bncli.errors import BncliError

if TYPE_CHECKING or "lightning" in sys.modules or "pytorch_lightning" not in sys.modules:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:  # a class of one package is none of the other's
    from pytorch_lightning import Callback, LightningModule, Trainer


class RecalibrateBeforeValidation(Callback):
    """Before each validation, write population statistics of training images into the module.

    The module needs a `forward` that takes images. `batches` are training images as validation sees images,
    without random augmentation: a DataLoader, or a function that returns one. Several processes divide it
    among themselves, as Lightning does; one that is divided already, or no DataLoader, is taken as each
    process's own part. With persistent workers it must not be the one that training reads. The other
    arguments are those of `recalibrate_before_validation`.

    Logs `batch_norm/mean_shift`, `batch_norm/var_ratio_min` and `batch_norm/var_ratio_max`: how far the
    running statistics were off, of several processes on average. Training computes the same as without the
    callback. The validation and the checkpoints after it have population statistics. The sanity check before
    the first step is left alone.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        num_images: int = NUM_IMAGES,
        layers: Layers = None,
        get_input: GetTensor | None = None,
        prefix: str = "batch_norm/",
    ) -> None:
        self.batches = batches
        self.num_images = num_images
        self.layers = layers
        self.get_input = get_input
        self.prefix = prefix

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, write and log; only within `fit`, since `validate` must not change a module."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if type(pl_module).forward is LightningModule.forward:
            raise BncliError(
                f"RecalibrateBeforeValidation computes images with {type(pl_module).__name__}.forward, which"
                " it lacks; write it: def forward(self, images): return self.model(images)"
            )
        batches, group = self.batches, None
        if trainer.world_size > 1:
            group = torch.distributed.group.WORLD
            batches = divided(batches, Ranks.of(group))
        with trainer.precision_plugin.forward_context():
            found = recalibrate_before_validation(
                pl_module,
                batches,
                num_images=self.num_images,
                layers=self.layers,
                group=group,
                get_input=self.get_input,
            )
        pl_module.log_dict(found.to_log(self.prefix), sync_dist=group is not None)
