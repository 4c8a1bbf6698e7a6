"""The configuration as pydantic models: every key, its type, range, default and meaning.

Every key has a default, so the empty configuration is the quickstart. Validation is strict: no silent
conversion from text to number, no unknown keys, no infinities. `bncli.config_file` reads and writes it.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """What all sections share: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class SyntheticConfig(Section):
    """The embedded data set: generated in code, deterministic in its seed."""

    name: Literal["synthetic"] = "synthetic"
    num_train: int = Field(10_000, ge=10, le=1_000_000)
    num_test: int = Field(2_000, ge=10, le=1_000_000)
    seed: int = Field(0, ge=0, lt=2**32)


class Cifar10Config(Section):
    """CIFAR-10."""

    name: Literal["cifar10"] = "cifar10"
    root: str = "data"  # the folder of cifar-10-batches-py; that one itself, one above or below is found too
    url: str | None = None  # a mirror of cifar-10-python.tar.gz; the same MD5 is required
    archive: str | None = None  # a local cifar-10-python.tar.gz; the same MD5 is required


class ImageFolderConfig(Section):
    """Your own images: root/{train,test}/CLASS/*.{png,jpg,jpeg,webp}. The test split may be called val."""

    name: Literal["imagefolder"] = "imagefolder"
    root: str = "data"
    image_size: int = Field(32, ge=8, le=512)  # pixels; images of another size are resized to it
    cache: str | None = None  # folder of the decoded images; null: the user's cache folder


DataConfig = Annotated[SyntheticConfig | Cifar10Config | ImageFolderConfig, Field(discriminator="name")]


class AugmentConfig(Section):
    """Random changes to training images; test images are never changed."""

    crop_padding: int = Field(2, ge=0, le=64)  # shifts of up to so many pixels, by reflection; 0: off
    flip: Literal["none", "random", "alternating"] = "alternating"
    cutout: int = Field(0, ge=0, le=512)  # side of the erased square in pixels; 0: off
    small_epochs: int = Field(0, ge=0, le=100_000)  # the first so many epochs see smaller images
    small_size: int = Field(24, ge=1, le=512)  # height and width of those, in pixels
    crop_epochs: int = Field(0, ge=0, le=100_000)  # so many epochs after those see the middle of the images
    crop_size: int = Field(28, ge=1, le=512)  # height and width of that, in pixels

    def at_full_size(self) -> "AugmentConfig":
        """The same without smaller images: as in the last epochs."""
        return self.model_copy(update={"small_epochs": 0, "crop_epochs": 0})

    def smallest_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the smallest images that any epoch sees."""
        sizes = [(height, width)]
        if self.small_epochs:
            sizes.append((self.small_size, self.small_size))
        if self.crop_epochs:
            sizes.append((self.crop_size, self.crop_size))
        return min(sizes, key=min)


class BatchNormConfig(Section):
    """The arguments of torch.nn.BatchNorm2d, with PyTorch's meaning and defaults."""

    momentum: float | None = Field(0.1, ge=0, le=1)  # weight of the new batch; null: cumulative average
    eps: float = Field(1e-5, gt=0, le=1)
    affine: bool = True
    learn_weight: bool = True  # false: the weight stays 1, only the bias is learned
    track_running_stats: bool = True


class ModelConfig(Section):
    """The Conv-BN-ReLU network."""

    # strict mode would refuse YAML's lists here: only the container is lax, its numbers are not
    widths: Annotated[tuple[Annotated[int, Field(ge=1, le=8192)], ...], Field(strict=False)] = Field(
        (16, 32, 64), min_length=1, max_length=16
    )
    blocks_per_stage: int = Field(2, ge=1, le=64)
    pool: Literal["max", "avg"] = "max"
    pool_after: Literal["first", "last"] = "first"  # the block of each stage that is followed by pooling
    pool_before_norm: bool = False  # pool between convolution and BatchNorm, on a quarter of the values
    activation: Literal["relu", "gelu"] = "relu"
    head_pool: Literal["max", "avg"] = "max"
    logit_scale: float = Field(1.0, gt=0, le=100)
    whitening: bool = False  # a first layer, fixed, that whitens 2x2 patches of the training images
    init: Literal["kaiming", "dirac"] = "kaiming"
    batch_norm: BatchNormConfig = BatchNormConfig()


class TrainConfig(Section):
    """The optimiser and its schedule."""

    epochs: int = Field(5, ge=1, le=100_000)
    batch_size: int = Field(250, ge=1, le=1_000_000)
    # images computed at once, whose gradients are added up to the batch's; null: the batch
    micro_batch_size: int | None = Field(None, ge=1, le=1_000_000)
    last_batch: Literal["drop", "keep"] = "drop"  # of an epoch, when it is smaller than the others
    optimizer: Literal["sgd", "muon"] = "sgd"  # muon: of the convolutions; all else is trained with SGD
    learning_rate: float = Field(0.5, gt=0)  # at its peak
    bias_learning_rate: float | None = Field(None, gt=0)  # of biases and BatchNorm; null: the one above
    head_learning_rate: float | None = Field(None, gt=0)  # of the last layer's weights; null: as above
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(5e-4, ge=0)  # of weights; never of BatchNorm's or of biases
    warmup: float = Field(0.2, ge=0, le=1)  # fraction of all steps in which the learning rate rises
    decay: Literal["linear", "cosine", "none"] = "linear"  # after the warm-up, to 0
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    # epochs over which weights are averaged, exponentially, for evaluation and checkpoints; null: not at all
    ema_epochs: float | None = Field(None, gt=0, le=100_000)
    seed: int = Field(0, ge=0, lt=2**32)
    evaluate_every: int = Field(1, ge=1, le=100_000)  # epochs between evaluations on the test split
    checkpoint_every: int = Field(1, ge=1, le=1_000_000_000)  # so many epochs or steps
    checkpoint_unit: Literal["epochs", "steps"] = "epochs"  # steps: and at the end of every epoch
    recalibrate: Literal["none", "precise", "exact"] = "none"  # at the end, into recalibrated.pt


class RuntimeConfig(Section):
    """How to compute; never what."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    memory_format: Literal["channels_last", "contiguous"] = "channels_last"
    threads: int | None = Field(None, ge=1, le=1024)  # CPU threads; null: PyTorch's choice
    compile: bool = False  # torch.compile for the training step; evaluation computes as without it
    reuse_memory: bool = True  # freed memory stays with the process, for the next step
    eval_batch_size: int = Field(250, ge=1, le=1_000_000)


class Config(Section):
    """A whole run."""

    data: DataConfig = SyntheticConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    runtime: RuntimeConfig = RuntimeConfig()
