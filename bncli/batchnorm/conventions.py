"""What the numbers of a BatchNorm layer mean in each framework: one place, from which all else is told.

bncli keeps every layer in PyTorch's terms: `momentum` is the weight of the new batch, and `running_mean` and
`running_var` are what eval mode computes with. A convention says what was translated, and what a default is
where the file is silent. Every row was measured with the version that it names, on a CPU.
"""

from dataclasses import dataclass, replace
from typing import Literal

Weighs = Literal["new batch", "old average"]
Variance = Literal["unbiased", "biased", "unbiased for images", "biased or unbiased"]


@dataclass(frozen=True)
class Convention:
    """How one framework's BatchNorm writes and updates its statistics."""

    framework: str
    package: str  # that was run to measure it
    version: str
    weight: str  # what it calls each of the four
    bias: str
    running_mean: str
    running_var: str
    momentum_name: str
    momentum_weighs: Weighs
    default_momentum: float  # as the framework writes it
    default_eps: float
    variance: Variance  # that is averaged: `unbiased for images` is biased after layers without pixels
    counter: str | None  # what a counter in its files counts; None: it has none
    starts_at_0_1: bool = True  # whether its averages begin at mean 0 and variance 1, and keep a share of it

    @property
    def new_batch_weight(self) -> float:
        """The default momentum in PyTorch's meaning."""
        return self.translate_momentum(self.default_momentum)

    @property
    def remeasured_by(self) -> str:
        """What measures statistics again where such a file is: `bncli recalibrate` writes PyTorch's only."""
        if self is PYTORCH:
            return "bncli recalibrate"
        if self.framework.startswith(ONNX.framework):
            return "bncli recalibrate, on the checkpoint that the file was exported from"
        return f"in {self.framework} itself, or by bncli convert and then bncli recalibrate"

    def translate_momentum(self, momentum: float) -> float:
        """A momentum of the framework in PyTorch's meaning, or the other way: 1 - m is its own inverse."""
        return momentum if self.momentum_weighs == "new batch" else complement(momentum)


def complement(momentum: float) -> float:
    """1 - momentum, as a person would write it: binary rounding behind the 12th digit is left out."""
    return round(1 - momentum, 12)


PYTORCH = Convention(
    framework="PyTorch",
    package="torch",
    version="2.13.0",
    weight="weight",
    bias="bias",
    running_mean="running_mean",
    running_var="running_var",
    momentum_name="momentum",
    momentum_weighs="new batch",
    default_momentum=0.1,
    default_eps=1e-5,
    variance="unbiased",
    counter="batches",
)
KERAS_3 = Convention(
    framework="Keras 3",
    package="keras",
    version="3.15.1",
    weight="gamma",
    bias="beta",
    running_mean="moving_mean",
    running_var="moving_variance",
    momentum_name="momentum",
    momentum_weighs="old average",
    default_momentum=0.99,
    default_eps=1e-3,
    variance="biased",
    counter=None,
)
KERAS_2 = Convention(
    framework="tf.keras 2",
    package="tf-keras",
    version="2.21.0",
    weight="gamma",
    bias="beta",
    running_mean="moving_mean",
    running_var="moving_variance",
    momentum_name="momentum",
    momentum_weighs="old average",
    default_momentum=0.99,
    default_eps=1e-3,
    variance="unbiased for images",
    counter=None,
)
# a file that does not say which of both wrote it
KERAS_2_OR_3 = replace(
    KERAS_3,
    framework="Keras 2 or 3",
    package="tf-keras, keras",
    version="2.21.0 and 3.15.1",
    variance="biased or unbiased",
)
# tf.layers and tf.compat.v1.layers: the same code as tf.keras 2, and names without a layer's configuration
TENSORFLOW_1 = replace(KERAS_2, framework="TensorFlow 1", package="tensorflow")
FLAX = Convention(
    framework="Flax",
    package="flax",
    version="0.12.8",
    weight="scale",
    bias="bias",
    running_mean="mean",
    running_var="var",
    momentum_name="momentum",
    momentum_weighs="old average",
    default_momentum=0.99,
    default_eps=1e-5,
    variance="biased",
    counter=None,
)
HAIKU = Convention(
    framework="Haiku",
    package="dm-haiku",
    version="0.0.17",
    weight="scale",
    bias="offset",
    running_mean="mean_ema/average",
    running_var="var_ema/average",
    momentum_name="decay_rate",
    momentum_weighs="old average",
    default_momentum=0.9,  # of its ResNet: BatchNorm itself has none, it must be given
    default_eps=1e-5,
    variance="biased",
    counter="calls in training",
    starts_at_0_1=False,
)
EQUINOX = Convention(
    framework="Equinox",
    package="equinox",
    version="0.13.8",
    weight="weight",
    bias="bias",
    running_mean="running_mean",
    running_var="running_var",
    momentum_name="momentum",
    momentum_weighs="old average",
    default_momentum=0.99,
    default_eps=1e-5,
    variance="biased",
    counter="calls in training",
    starts_at_0_1=False,
)
# the operator; the statistics in a file are those of whoever trained the network
ONNX = Convention(
    framework="ONNX",
    package="onnx",
    version="opset 23",
    weight="scale",
    bias="B",
    running_mean="input_mean",
    running_var="input_var",
    momentum_name="momentum",
    momentum_weighs="old average",
    default_momentum=0.9,
    default_eps=1e-5,
    variance="biased or unbiased",
    counter=None,
)
ONNX_OF_PYTORCH = replace(
    ONNX, framework="ONNX (of PyTorch)", package="torch", version="2.13.0", variance="unbiased"
)
PADDLE = Convention(
    framework="PaddlePaddle",
    package="paddlepaddle",
    version="3.3.1",
    weight="weight",
    bias="bias",
    running_mean="_mean",
    running_var="_variance",
    momentum_name="momentum",
    momentum_weighs="old average",
    default_momentum=0.9,
    default_eps=1e-5,
    variance="biased",
    counter=None,
)
# of Gluon; the operator by itself has eps 1e-3 and ignores gamma (fix_gamma)
MXNET = Convention(
    framework="MXNet",
    package="mxnet",
    version="1.9.1",
    weight="gamma",
    bias="beta",
    running_mean="running_mean",
    running_var="running_var",
    momentum_name="momentum",
    momentum_weighs="old average",
    default_momentum=0.9,
    default_eps=1e-5,
    variance="biased",
    counter=None,
)
MINDSPORE = Convention(
    framework="MindSpore",
    package="mindspore",
    version="2.10.0",
    weight="gamma",
    bias="beta",
    running_mean="moving_mean",
    running_var="moving_variance",
    momentum_name="momentum",
    momentum_weighs="old average",
    default_momentum=0.9,
    default_eps=1e-5,
    variance="unbiased",
    counter=None,
)
CHAINER = Convention(
    framework="Chainer",
    package="chainer",
    version="7.8.1",
    weight="gamma",
    bias="beta",
    running_mean="avg_mean",
    running_var="avg_var",
    momentum_name="decay",
    momentum_weighs="old average",
    default_momentum=0.9,
    default_eps=2e-5,
    variance="unbiased",
    counter="batches of finetuning",  # N; 0 in any other training
)
# as its source has it: there is no package to run. Its files are in the zoo of Detectron
CAFFE2 = Convention(
    framework="Caffe2",
    package="caffe2",
    version="not run",
    weight="s",
    bias="b",
    running_mean="rm",
    running_var="riv",
    momentum_name="momentum",
    momentum_weighs="old average",
    default_momentum=0.9,
    default_eps=1e-5,
    variance="unbiased",
    counter=None,
)
MLX = replace(PYTORCH, framework="MLX", package="mlx", version="0.32.4", counter=None)
TINYGRAD = replace(PYTORCH, framework="tinygrad", package="tinygrad", version="0.14.0")
CONVENTIONS = (
    PYTORCH,
    KERAS_3,
    KERAS_2,
    TENSORFLOW_1,
    FLAX,
    HAIKU,
    EQUINOX,
    ONNX,
    PADDLE,
    MXNET,
    MINDSPORE,
    CHAINER,
    MLX,
    TINYGRAD,
)
