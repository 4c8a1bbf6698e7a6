"""The configuration as pydantic models: every key, its type, range, default and meaning.

Every key has a default, so the empty configuration is the quickstart. Validation is strict: no silent
conversion from text to number, no unknown keys, no infinities. A key's meaning is the `description` of its
field: `bncli config` and the JSON schema show it. `bncli.config_file` reads and writes configurations.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag


class Section(BaseModel):
    """What all sections share: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class DataSection(Section):
    """What the kinds of data share: the name must be given, and editors that know the schema ask for it."""

    model_config = ConfigDict(json_schema_extra={"required": ["name"]})

    normalization: str | None = Field(
        None,
        max_length=200,
        description="How pixels are normalised: `imagenet`, `half` (from -1 to 1), `none` (from 0 to 1),"
        " `measured` (on the training images), or M,M,M/S,S,S (means and deviations of the channels, from 0"
        " to 1); null is that of the network's library, or measured.",
    )


class SyntheticConfig(DataSection):
    """The embedded data set: ten kinds of shapes, generated in code, deterministic in its seed."""

    name: Literal["synthetic"] = Field(
        "synthetic", description="The data set: `synthetic` is ten kinds of shapes, generated in code."
    )
    num_train: int = Field(10_000, ge=10, le=1_000_000, description="Number of training images.")
    num_test: int = Field(2_000, ge=10, le=1_000_000, description="Number of test images.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the images; another seed draws other images.")


class Cifar10Config(DataSection):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in 10 classes."""

    name: Literal["cifar10"] = Field(
        "cifar10", description="The data set: `cifar10` is CIFAR-10, downloaded if it is not there."
    )
    root: str = Field(
        "data",
        description="Folder that holds cifar-10-batches-py, or that folder itself; a download goes here.",
    )
    url: str | None = Field(
        None,
        description="Address of a mirror of cifar-10-python.tar.gz, whose MD5 is checked; null is the"
        " original address.",
    )
    archive: str | None = Field(
        None,
        description="A local file cifar-10-python.tar.gz, whose MD5 is checked; null is no such file, so that"
        " missing images are downloaded.",
    )


class StreamableConfig(DataSection):
    """What data sets share whose images may not fit into memory."""

    stream: Literal["auto"] | bool = Field(
        "auto",
        description="Whether images are decoded whenever they are used, and not kept; `auto`: where they"
        " would take more than 4 GB, or than there is memory.",
    )
    workers: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="Number of processes that decode images where they are not kept, 0 is none besides this"
        " one; null is as many as there are CPUs for this process.",
    )
    classes: str | None = Field(
        None,
        description="A file that says which output of the network is which class: a name a line, or JSON, a"
        " list of names or names with their indices; null is the data set's own order, of folders by name.",
    )


class ImageFolderConfig(StreamableConfig):
    """Your own images: root/{train,test}/CLASS/*.{png,jpg,jpeg,webp}. The test split may be called val."""

    name: Literal["imagefolder"] = Field(
        "imagefolder",
        description="The data set: `imagefolder` is your own images, in one folder for each class.",
    )
    root: str = Field("data", description="Folder that holds the folders train and test (or val).")
    image_size: int = Field(
        32,
        ge=8,
        le=512,
        description="Height and width in pixels of the squares that images become.",
    )
    resize: int | None = Field(
        None,
        ge=8,
        le=1024,
        description="Shorter side in pixels to which an image is resized before its middle is cut out, as in"
        " evaluation on ImageNet (256, with image_size 224); null resizes the whole image to the square.",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="How pixels are interpolated where an image is resized."
    )
    cache: str | None = Field(
        None, description="Folder where the decoded images are kept; null is the user's cache folder."
    )


class NamedDataConfig(StreamableConfig):
    """A data set of torchvision, or of the user's own code."""

    # the pattern is for editors; a name without a colon is answered with the nearest data sets
    name: str = Field(
        min_length=1,
        max_length=4096,
        json_schema_extra={"pattern": ":"},
        description="The data set: `torchvision:SVHN`, or a function or class that makes it,"
        " `package.module:NAME` or `path/to/file.py:NAME`. A relative path begins at the folder of the YAML"
        " file, or with --set at the current folder.",
    )
    root: str | None = Field(
        None, description="Folder that it is read from, if it takes a root; null is `data` for torchvision's."
    )
    arguments: dict[str, JsonValue] = Field(
        {},
        description="What that function takes, by name; train or split is added. Nothing is downloaded,"
        " unless it is told so here, as by `download: true`.",
    )
    image_size: int | None = Field(
        None,
        ge=1,
        le=512,
        description="Height and width in pixels of the squares that its PIL images become; null leaves them"
        " as they are.",
    )
    resize: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Shorter side in pixels to which an image is resized before its middle is cut out; null"
        " resizes the whole image to the square.",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="How pixels are interpolated where an image is resized."
    )
    num_train: int | None = Field(
        None,
        ge=1,
        description="Number of training samples that are read, from the first on; null is all, as many as"
        " there are. Data that never end need it.",
    )
    num_test: int | None = Field(
        None,
        ge=1,
        description="The same for the test samples; null is all, or where there is no test split,"
        " the training samples.",
    )


def _kind_of_data(values: Any) -> str | None:
    """Which of the data sets below the values of `data:` are for; other names are unknown."""
    if not isinstance(values, dict):
        return "named" if isinstance(values, NamedDataConfig) else getattr(values, "name", "synthetic")
    name = values.get("name")
    return "named" if isinstance(name, str) and ":" in name else name


DataConfig = Annotated[
    Annotated[SyntheticConfig, Tag("synthetic")]
    | Annotated[Cifar10Config, Tag("cifar10")]
    | Annotated[ImageFolderConfig, Tag("imagefolder")]
    | Annotated[NamedDataConfig, Tag("named")],
    Discriminator(_kind_of_data),
]


class AugmentConfig(Section):
    """Random changes to training images; test images are never changed."""

    crop_padding: int = Field(
        2,
        ge=0,
        le=64,
        description="Largest random shift in pixels, in each direction; the border is reflected; 0 is none.",
    )
    flip: Literal["none", "random", "alternating"] = Field(
        "alternating",
        description="How images are mirrored left to right: `none` never, `random` each with probability 1/2,"
        " `alternating` each in every second epoch.",
    )
    cutout: int = Field(
        0,
        ge=0,
        le=512,
        description="Side in pixels of a square that is erased at a random place of each image; 0 is none.",
    )
    small_epochs: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Number of epochs, from the first on, that see images shrunk to small_size.",
    )
    small_size: int = Field(
        24, ge=1, le=512, description="Height and width in pixels of the images of the first small_epochs."
    )
    crop_epochs: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Number of epochs, after small_epochs, that see only the middle of each shifted image: a"
        " random crop.",
    )
    crop_size: int = Field(28, ge=1, le=512, description="Height and width in pixels of those crops.")

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

    momentum: float | None = Field(
        0.1,
        ge=0,
        le=1,
        description="Weight of the new batch in running_mean and running_var, as in PyTorch (0.01 is Keras's"
        " 0.99); null is the plain average over all batches.",
    )
    eps: float = Field(
        1e-5,
        gt=0,
        le=1,
        description="Added to the variance before its square root, against division by zero.",
    )
    affine: bool = Field(
        True, description="Whether each layer has a weight and a bias for each channel, in both modes."
    )
    learn_weight: bool = Field(
        True, description="Whether the weight is learned; if false it stays 1 and only the bias is learned."
    )
    track_running_stats: bool = Field(
        True,
        description="Whether running statistics are kept for eval mode; if false, eval mode uses batch"
        " statistics too.",
    )
    sync: bool = Field(
        False,
        description="Whether, in training with torchrun, layers normalise by the whole batch of all processes"
        " together: SyncBatchNorm. Slow on CPUs.",
    )


class ConvNetConfig(Section):
    """The Conv-BN-ReLU network."""

    name: Literal["convnet"] = Field(
        "convnet",
        description="The network: `convnet` is stages of blocks of convolution, BatchNorm and activation.",
    )
    # strict mode would refuse YAML's lists here: only the container is lax, its numbers are not
    widths: Annotated[tuple[Annotated[int, Field(ge=1, le=8192)], ...], Field(strict=False)] = Field(
        (16, 32, 64),
        min_length=1,
        max_length=16,
        description="Number of channels of each stage; every stage halves height and width.",
    )
    blocks_per_stage: int = Field(
        2, ge=1, le=64, description="Number of blocks (convolution, BatchNorm, activation) in each stage."
    )
    pool: Literal["max", "avg"] = Field(
        "max",
        description="How a stage halves height and width: `max` or `avg` pooling of 2x2 pixels.",
    )
    pool_after: Literal["first", "last"] = Field(
        "first",
        description="Which block of a stage is pooled: the `first`, which is cheaper, or the `last`.",
    )
    pool_before_norm: bool = Field(
        False,
        description="Whether that block is pooled before its BatchNorm, which then normalises a quarter of"
        " the values.",
    )
    activation: Literal["relu", "gelu"] = Field(
        "relu", description="Activation after each BatchNorm: `relu` or `gelu`."
    )
    head_pool: Literal["max", "avg"] = Field(
        "max",
        description="How the last maps become one number for each channel: `max` or `avg`, over all pixels.",
    )
    logit_scale: float = Field(1.0, gt=0, le=100, description="Factor by which the logits are multiplied.")
    whitening: bool = Field(
        False,
        description="Whether a fixed first layer whitens patches of 2x2 pixels; it is computed from training"
        " images, not learned.",
    )
    init: Literal["kaiming", "dirac"] = Field(
        "kaiming",
        description="First weights of the convolutions: `kaiming` is PyTorch's default, `dirac` passes the"
        " input on.",
    )
    batch_norm: BatchNormConfig = Field(
        BatchNormConfig(),
        description="The arguments of torch.nn.BatchNorm2d, with PyTorch's meaning and defaults.",
    )


class NamedModelConfig(Section):
    """A network of torchvision, of timm, or of the user's own code."""

    # the pattern is for editors; a name without a colon is answered with the nearest networks
    name: str = Field(
        min_length=1,
        max_length=4096,
        json_schema_extra={"pattern": ":"},
        description="The network: `torchvision:resnet18`, `timm:NAME`, or a function or class that makes it,"
        " `package.module:NAME` or `path/to/file.py:NAME`. A relative path begins at the folder of the YAML"
        " file, or with --set at the current folder.",
    )
    arguments: dict[str, JsonValue] = Field(
        {},
        description="What that function takes, by name. A network that takes num_classes gets the data set's"
        " where it is not given. Weights are random at first; none are downloaded.",
    )
    logits: Annotated[str, Field(min_length=1, max_length=200)] | int | None = Field(
        None,
        description="Where the scores of the classes are, if the network returns several outputs: a key, the"
        " name of an attribute, or a number; null is `logits`, if there is one of that name.",
    )


def _kind_of_model(values: Any) -> str:
    """Which of the models below the values of `model:` are for."""
    if isinstance(values, NamedModelConfig):
        return "named"
    name = values.get("name", "convnet") if isinstance(values, dict) else "convnet"
    return "convnet" if name == "convnet" else "named"


ModelConfig = Annotated[
    Annotated[ConvNetConfig, Tag("convnet")] | Annotated[NamedModelConfig, Tag("named")],
    Discriminator(_kind_of_model),
]


class TrainConfig(Section):
    """The optimiser and its schedule."""

    epochs: int = Field(
        5, ge=1, le=100_000, description="Number of times that training sees the training split."
    )
    batch_size: int = Field(250, ge=1, le=1_000_000, description="Number of images for each step.")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Number of images computed at once, to save memory; their gradients are added up to the"
        " batch's, and BatchNorm sees each part as a batch of its own. null is the whole batch.",
    )
    last_batch: Literal["drop", "keep"] = Field(
        "drop",
        description="What happens to the last batch of an epoch if it is smaller than the others: `drop` or"
        " `keep`.",
    )
    optimizer: Literal["sgd", "muon"] = Field(
        "sgd",
        description="`sgd`, or `muon` for the weights of convolutions whose output BatchNorm normalises, with"
        " SGD for everything else.",
    )
    learning_rate: float = Field(0.5, gt=0, description="Learning rate at its peak.")
    bias_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Learning rate of biases and of BatchNorm's weights, at its peak; null is learning_rate.",
    )
    head_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Learning rate of the last layer's weights, at its peak; null is learning_rate.",
    )
    momentum: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="Momentum of the optimiser: how much of the last step goes on; not BatchNorm's momentum.",
    )
    nesterov: bool = Field(True, description="Whether that momentum is Nesterov's.")
    weight_decay: float = Field(
        5e-4,
        ge=0,
        description="L2 penalty on weights, as in torch.optim.SGD; never on biases, BatchNorm, or weights"
        " that Muon trains.",
    )
    warmup: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Fraction of all steps, from 0 to 1, in which the learning rate rises to its peak.",
    )
    decay: Literal["linear", "cosine", "none"] = Field(
        "linear",
        description="How the learning rate falls to 0 after its peak: `linear`, `cosine`, or `none` (it"
        " stays).",
    )
    label_smoothing: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Fraction of each target that is spread evenly over all classes, from 0 to 1.",
    )
    ema_epochs: float | None = Field(
        None,
        gt=0,
        le=100_000,
        description="Number of epochs over which weights are averaged, exponentially, for evaluation and"
        " checkpoints; null is no average.",
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of the first weights, the order of images and the augmentation."
    )
    evaluate_every: int = Field(
        1,
        ge=1,
        le=100_000,
        description="Number of epochs between evaluations on the test split; the last epoch is always"
        " evaluated.",
    )
    checkpoint_every: int = Field(
        1,
        ge=1,
        le=1_000_000_000,
        description="Number of epochs or steps, see checkpoint_unit, after which last.pt is written again.",
    )
    checkpoint_unit: Literal["epochs", "steps"] = Field(
        "epochs",
        description="Unit of checkpoint_every: `epochs`, or `steps` (and last.pt is also written at the end"
        " of every epoch).",
    )
    keep_epochs: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="How many of the last evaluated epochs keep their network, as epoch-0005.pt: `bncli"
        " average` averages them.",
    )
    log: Annotated[tuple[Literal["tensorboard"], ...], Field(strict=False)] = Field(
        (),
        description="Where the numbers of every epoch are written beside metrics.jsonl: [tensorboard] puts"
        " event files into the folder tensorboard of the run.",
    )
    recalibrate: Literal["none", "precise", "exact"] = Field(
        "none",
        description="How the training split's population statistics are measured at the end, for the file"
        " recalibrated.pt: `none` is not at all, `precise` while all layers use batch statistics, `exact`"
        " layer by layer, each one after the layers before it have theirs.",
    )


class RuntimeConfig(Section):
    """How to compute; never what."""

    device: str = Field(
        "auto",
        description="`cpu`, `cuda`, `cuda:1` (the second GPU), `mps`, or `auto`: a GPU if there is one.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="`float32`, `bfloat16` (autocast; weights and statistics stay float32), or `auto`:"
        " bfloat16 where the hardware is fast at it.",
    )
    engine: Literal["torch", "auto", "onnxruntime", "openvino"] = Field(
        "torch",
        description="What computes the network in `eval` and `predict`: `torch`, `onnxruntime` (float32),"
        " `openvino` (in `precision`), or `auto`: the fastest of those installed, measured at the start. Not"
        " read from a checkpoint.",
    )
    memory_format: Literal["channels_last", "contiguous"] = Field(
        "channels_last",
        description="Order of the values in memory: `channels_last` (NHWC), which is mostly faster, or"
        " `contiguous` (NCHW).",
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Number of CPU threads; null: as many as this process may use (CPU affinity and quota).",
    )
    compile: bool = Field(
        False,
        description="Whether the training step is compiled with torch.compile, which takes up to a minute;"
        " evaluation is not compiled.",
    )
    weight_gradient: Literal["auto", "torch", "patches"] = Field(
        "auto",
        description="How convolutions compute the gradient by their weights: `torch`, `patches` (one matrix"
        " product), or `auto`: `torch`, except on a CPU with AMX, where each layer takes what is faster in a"
        " short measurement. They round differently; a resumed run keeps what was measured.",
    )
    reuse_memory: bool = Field(
        True,
        description="Whether, on a CPU, the process keeps freed memory for its next step, which is faster;"
        " `recalibrate --method precise` does so too.",
    )
    eval_batch_size: int = Field(
        250,
        ge=1,
        le=1_000_000,
        description="Number of images computed at once in evaluation; more of them need more memory.",
    )
    timeout: float = Field(
        600.0,
        gt=0,
        le=1e6,
        description="Seconds that the processes of torchrun wait for each other before they give up.",
    )


class Config(Section):
    """A whole run."""

    data: DataConfig = Field(SyntheticConfig(), description="The images to train and test on.")
    augment: AugmentConfig = Field(
        AugmentConfig(), description="Random changes to training images; test images are never changed."
    )
    model: ModelConfig = Field(
        ConvNetConfig(), description="The network: bncli's own, or any other by its name."
    )
    train: TrainConfig = Field(TrainConfig(), description="How the network is trained, and what is written.")
    runtime: RuntimeConfig = Field(
        RuntimeConfig(), description="How to compute: speed and memory; the task stays the same."
    )
