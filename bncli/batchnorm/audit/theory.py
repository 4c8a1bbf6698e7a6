"""Why each rule of the audit matters, in about ten lines, and who says so: the pages of `--explain`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Theory:
    """One paragraph on a rule, and where it is from."""

    text: str
    source: str


IOFFE = "Ioffe and Szegedy 2015, Batch Normalization, arXiv:1502.03167"
BATCH_NORM = "PyTorch documentation, torch.nn.BatchNorm2d"

THEORY = {
    "never_updated": Theory(
        "A BatchNorm layer starts with running_mean 0 and running_var 1. Each batch in train mode moves "
        "them by running = (1 - momentum) * running + momentum * batch. No real batch leaves every channel "
        "at exactly 0 and 1, so such values were never updated: in eval mode the layer does not normalise "
        "at all. The usual causes are weights that were loaded with strict=False and found no buffer of "
        "that name, a layer that training never reached, or momentum 0. The counter num_batches_tracked is "
        "not asked: it is 0 in every model loaded from a checkpoint without it, and it counts on when "
        "momentum is 0. A network fresh from its constructor has this finding in every layer, and rightly "
        "so.",
        f"{BATCH_NORM}; kuangliu/pytorch-cifar#162 (a load that loads nothing)",
    ),
    "initial_residue": Theory(
        "An exponential average that starts at (0, 1) still holds the fraction r = (1 - momentum) ^ "
        "num_batches_tracked of its start: running_var = (1 - r) * average + r. Eval mode then normalises "
        "partly by numbers that no image had. A state dict stores no momentum; PyTorch's default 0.1 is "
        "assumed there, and the finding says so. Not judged are a cumulative average (momentum None: its "
        "first batch replaces the start), momentum 0, layers that BN001 reports, a counter of 0 (a "
        "checkpoint without counter), and layers with a running_var below r: since a variance is never "
        "negative, an average that started at 1 cannot have come down below r, so these started elsewhere, "
        "from pretrained statistics for example. Nor is what a checkpoint of bncli's says was measured: "
        "recalibrated statistics, and those of averaged weights. Where momentum was constant the residue can "
        "be removed without data: mean / (1 - r) and (var - r) / (1 - r).",
        f"{BATCH_NORM}; the same bias as of Adam's averages: Kingma and Ba 2015, arXiv:1412.6980, section 3",
    ),
    "non_finite": Theory(
        "Eval mode computes weight * (x - running_mean) / sqrt(running_var + eps) + bias. One NaN among "
        "them makes that channel NaN for every image; an infinite variance makes it constant. Train mode "
        "does not read the running statistics, so training goes on and the loss looks healthy: the damage "
        "shows in evaluation only, and it stays, because NaN times (1 - momentum) is NaN. The usual cause "
        "is float16: an activation overflows, the gradient scaler skips the optimiser's step, but the "
        "forward pass has already updated the buffers. Another is a batch with one value per channel, "
        "whose unbiased variance is 0 / 0.",
        "pytorch#88474 and pytorch#115500 (mixed precision)",
    ),
    "negative_variance": Theory(
        "Batch variances are never negative and running_var is a weighted average of them, so no training "
        "reaches a value below 0. Below -eps the square root in eval mode is NaN; above it the output "
        "merely has the wrong scale. It comes from arithmetic on checkpoints: differences or "
        "extrapolations of weights (task vectors, weight averages with negative factors) applied to the "
        "buffers too; from E[x^2] - E[x]^2 in float32, which cancels where the mean is large; or from "
        "loaders that subtract eps.",
        "timgaripov/swa#8 (down to -31.9 after averaging); facebookresearch/detectron2#3160 (subtracting "
        "eps)",
    ),
    "eps_decides": Theory(
        "BatchNorm divides by sqrt(running_var + eps). eps is there against division by zero; where it is "
        "larger than the variance, the layer's scale is a constant of the code instead of a property of "
        "the data, and the output's deviation, sqrt(var / (var + eps)), falls below 0.71 of what weight "
        "says. Train and eval mode agree on that, so nothing is broken yet. But a state dict does not "
        "store eps: rebuilt with another one (1e-5 in PyTorch, 1e-3 in Keras and MobileNetV3) these "
        "channels change their scale by up to a factor of 10, while all others stay as they are. Where eps "
        "is unknown PyTorch's 1e-5 is assumed. Small variances are common behind depthwise convolutions "
        "and under weight decay. Dead channels are BN006's.",
        f"{IOFFE}, algorithm 1; pytorch#173337 (eps may not be 0)",
    ),
    "dead_channel": Theory(
        "With weight exactly 0 the output is bias, whatever the image shows. With a variance of less than "
        "eps / 100 the normalised value has a deviation sqrt(var / (var + eps)) below 0.1 where BatchNorm "
        "exists to make it 1. Either way the channel costs time and says almost nothing. Typical causes "
        "are a dead ReLU or a zeroed filter before the layer, an input that is constant in the training "
        "set, and weight decay on BatchNorm, which drives weight and filter to 0 together. Structured "
        "pruning does it on purpose. A residual network built with zero_init_residual starts with weight 0 "
        "in the last BatchNorm of every block, until its first step. NaN and negative variances are "
        "BN003's and BN004's.",
        "Zhou et al. 2020, How Does BN Increase Collapsed Neural Network Filters?, arXiv:2001.11216",
    ),
    "exploding_gain": Theory(
        "In eval mode a channel is a straight line: its slope |weight| / sqrt(running_var + eps) "
        "multiplies whatever differs from running_mean, the noise of a short float format and the shift "
        "between training and use as well as the signal. In train mode a shift of the whole batch cancels; "
        "in eval mode it comes out times the slope. How steep the channels of a layer are together says "
        "little, since the scale of the weights before BatchNorm is free and weight decay shrinks it; so "
        "the limit is relative: one channel far steeper than its neighbours had nearly no variance in "
        "training, or a weight that ran away. Dead channels are BN006's.",
        "van Laarhoven 2017, L2 Regularization versus Batch and Weight Normalization, arXiv:1706.05350 "
        "(free scale)",
    ),
    "switched_off": Theory(
        "If the normalised input z of a channel were normal, the share of outputs above 0 would be "
        "P(weight * z + bias > 0) = Phi(bias / (|weight| * s)) with s = sqrt(var / (var + eps)). Where "
        "that is nearly 0, a ReLU behind the layer passes nothing, in train mode as in eval mode, and no "
        "gradient comes back to change it. It is a model: real activations have longer tails, and a "
        "checkpoint does not say whether a ReLU follows at all. In a residual block it may follow only "
        "after the sum; a bias of less than a tenth is therefore not judged, because the last BatchNorm of "
        "a block that started at weight 0 (zero_init_residual) has tiny weights and biases in any ratio. "
        "Weight 0 is BN006's.",
        "Lu et al. 2019, Dying ReLU and Initialization, arXiv:1903.06733",
    ),
    "counter_type": Theory(
        "num_batches_tracked is an int64 scalar in every BatchNorm that PyTorch makes, and casts such as "
        "model.half() leave it alone. A float means that somebody did arithmetic on the whole state dict: "
        "the mean of several checkpoints, an exponential average of weights, a conversion. Then the "
        "running statistics beside it are averages too, and they belong to none of the networks: the "
        "activations of averaged weights have another mean and variance than the average of the "
        "activations' means and variances. PyTorch loads such a counter without a word, rounded down.",
        "Izmailov et al. 2018, Averaging Weights Leads to Wider Optima, arXiv:1803.05407; "
        "torch.optim.swa_utils.update_bn",
    ),
    "counter_unequal": Theory(
        "Every layer that takes part in every training batch has counted the same number. One that has "
        "counted fewer was frozen for a while (eval mode), was added later, loaded from elsewhere, or is "
        "used only in some batches; with more it may have gone on in train mode while somebody believed it "
        "frozen: requires_grad=False stops the optimiser but not the running statistics, and model.train() "
        "takes a frozen layer out of eval mode again. Compared is with the number that most layers have "
        "(of several, the smallest). Not compared are layers without counter, and layers that BN001 "
        "reports.",
        "pytorch#86590 and pytorch#66073 (frozen BatchNorm)",
    ),
    "counter_multiple": Theory(
        "A layer that has counted exactly k times as many batches as the others (k from 2 to 8) was "
        "updated k times per step. Two causes are common. A layer that is used several times in one "
        "forward pass (a shared head, the two views of a siamese network) mixes the statistics of all its "
        "uses, and eval mode normalises each use by the mixture. Activation checkpointing runs the forward "
        "pass again for the backward pass: the same batch counts twice, so momentum m acts as 1 - (1 - "
        "m)^2. An exact fraction is the same seen from the other side: most layers are updated k times, or "
        "this one in every k-th step.",
        "pytorch#96136 (checkpointing updates twice)",
    ),
    "far_mean": Theory(
        "Eval mode subtracts running_mean from activations that lie around it. If the mean is many "
        "deviations away from 0, most digits of every activation are spent on the offset: near 64 "
        "deviations the numbers of bfloat16 (8 significant bits) are half a deviation apart, near 512 "
        "those of float16 (11 bits). What is rounded away before the layer cannot come back, and the "
        "variance that training measured is partly that of the rounding. It happens to inputs that were "
        "never centred, behind layers with a large bias, and in channels that hardly vary. float32 (24 "
        "bits) is safe up to millions. Dead channels are BN006's.",
        f"Higham 2002, Accuracy and Stability of Numerical Algorithms, section 1.7 (cancellation); {IOFFE}",
    ),
    "no_running_stats": Theory(
        "With track_running_stats=False the layer has no running_mean and running_var, and eval mode "
        "normalises by the statistics of the batch at hand, as train mode does. The prediction for one "
        "image then depends on the images beside it, and on the order in which they come; batches of one "
        "image lose what the layer's channels have in common, and without spatial positions they are "
        "refused "
        '("Expected more than 1 value per channel"). It may be meant so, in style transfer or test-time '
        "adaptation; then --ignore this rule. A state dict of such a layer has no trace of BatchNorm, so "
        "only checkpoints that know their network can have this finding.",
        f"{BATCH_NORM}; pytorch#156051",
    ),
}
