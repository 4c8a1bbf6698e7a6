"""What there is to say about each rule: the pages of `bncli explain`, the advice and limits of the findings.

A page is text only, so that it can be shown without torch. The function that looks has the same name, in
`rules.py`. The command line keeps each page within one screen of 22 lines.
"""

from bncli.batchnorm.audit.rule_definition import RulePage, Threshold
from bncli.errors import BncliError

RECALIBRATE = "(bncli recalibrate)"  # in an advice: replaced where the file is not PyTorch's

PAGES = (
    RulePage(
        code="BN001",
        name="never_updated",
        severity="error",
        summary="running_mean is exactly 0 and running_var exactly 1",
        theory="A new BatchNorm layer holds running_mean 0 and running_var 1, and each batch in train mode "
        "moves them. So no batch reached this layer, or the values were put back. Usual causes: a "
        "checkpoint without these buffers, loaded with strict=False; a layer that training does not use; "
        "momentum 0; averaged weights whose buffers nobody averaged.",
        cost="In eval mode the layer does not normalise: it only multiplies by weight and adds bias. "
        "Predictions may be useless.",
        can_know="It is an error where bncli's record says that training batches were counted and that "
        "nothing else wrote the statistics.",
        cannot_know="Some tools move the statistics into weight and bias, or into the convolution before, "
        "and then set 0 and 1. That is harmless and looks the same. It is a warning beside a counter, an "
        "info without one or in a frozen class.",
        advice="Run training batches through the network in train mode, or load the checkpoint that has the "
        "statistics.",
        source="PyTorch documentation, torch.nn.BatchNorm2d; kuangliu/pytorch-cifar#162",
    ),
    RulePage(
        code="BN002",
        name="initial_residue",
        severity="warning",
        summary="few updates: part of the start is left",
        theory="Running statistics start at mean 0 and variance 1. After n batches with momentum m the "
        "fraction r = (1 - m)^n of that start is left: running_var = (1 - r) * average + r. With momentum "
        "0.1 it is below 1 % from the 44th batch on; momentum None keeps nothing of it.",
        cost="Eval mode normalises partly by numbers that no image had. 1 % of the start changes the scale "
        "by 0.25 % beside a variance of 2, by 4 % beside 0.1.",
        can_know="Certain where the file's record says that training alone made the statistics. Elsewhere a "
        "warning if the variances lie just above r or are more even than usual.",
        cannot_know="Whether they were recomputed since: PyTorch's update_bn restarts the counter. A state "
        "dict stores no momentum, so 0.1 is assumed. What stays open is an info.",
        advice="Train longer, raise momentum, or recompute the statistics over the training set (bncli "
        "recalibrate).",
        source="PyTorch documentation, torch.nn.BatchNorm2d; arXiv:1412.6980",
        thresholds=(
            Threshold(
                "residue",
                0.01,
                "largest fraction of the start that is accepted",
                "a moving average scatters as much",
            ),
        ),
    ),
    RulePage(
        code="BN003",
        name="non_finite",
        severity="error",
        summary="a NaN or an infinity in statistics, weight or bias",
        theory="Eval mode computes weight * (x - running_mean) / sqrt(running_var + eps) + bias. The usual "
        "cause is training in float16: an activation overflows, and the gradient scaler skips the "
        "optimiser's step, but the forward pass has already written the running statistics.",
        cost="One NaN makes its channel NaN for every image, and an infinite variance makes it constant. "
        "Training does not show it, because train mode does not read the running statistics. It does not "
        "heal, because NaN times (1 - momentum) is NaN.",
        can_know="The channels, exactly. No network can compute with such numbers.",
        cannot_know="When it happened, and whether earlier checkpoints of the run are sound.",
        advice="Go back to a checkpoint without it, or measure the statistics again if weight and bias are "
        "sound (bncli recalibrate). Under mixed precision keep activations inside the range of the type.",
        source="pytorch#88474 and pytorch#115500 (mixed precision)",
    ),
    RulePage(
        code="BN004",
        name="negative_variance",
        severity="error",
        summary="a running_var below 0",
        theory="running_var is a weighted average of batch variances. These are never negative, so training "
        "cannot make it negative. Arithmetic on whole checkpoints can: differences or extrapolations of "
        "weights (task vectors, averages with negative factors) that are applied to the buffers too. So can "
        "E[x^2] - E[x]^2 in float32 where the mean is large, and a loader that subtracts eps.",
        cost="Below -eps the square root of eval mode is NaN. Between -eps and 0 the channel merely has the "
        "wrong scale.",
        can_know="No average of variances is negative, so the number is wrong.",
        cannot_know="Which other channels were changed as well, and stayed above 0.",
        advice="Recompute the statistics over the training set (bncli recalibrate); do not extrapolate or "
        "subtract running statistics.",
        source="timgaripov/swa#8 (down to -31.9 after averaging); facebookresearch/detectron2#3160 (a loader "
        "subtracts eps)",
    ),
    RulePage(
        code="BN005",
        name="eps_decides",
        severity="info",
        summary="a variance so small that eps sets the scale",
        theory="BatchNorm divides by sqrt(running_var + eps). eps is there against division by zero. Where "
        "it is larger than the variance, the scale is a constant of the code and no property of the data. "
        "Small variances are common behind depthwise convolutions and under weight decay, in published "
        "networks too.",
        cost="Nothing as long as eps stays the same, since both modes agree. But a state dict does not store "
        "eps. Rebuilt with another one (1e-5 in PyTorch, 1e-3 in Keras and MobileNetV3), these channels "
        "change their scale by up to a factor of 10, and the others hardly.",
        can_know="The share of eps, where the file stores eps.",
        cannot_know="A state dict leaves eps unknown; 1e-5 is assumed then and called so. With a larger eps "
        "more channels would be listed.",
        advice="Use the same eps wherever the network is rebuilt. Such channels can be pruned.",
        source="Ioffe and Szegedy 2015, Batch Normalization, arXiv:1502.03167, algorithm 1",
        thresholds=(
            Threshold(
                "eps_share",
                0.5,
                "largest share of eps in running_var + eps",
                "above it eps weighs more than the data",
            ),
        ),
    ),
    RulePage(
        code="BN006",
        name="dead_channel",
        severity="warning",
        summary="weight 0 or hardly any variance: a constant output",
        theory="Where weight is exactly 0, the output is bias for every image. Where the variance is below "
        "eps / 100, the normalised value has a deviation below 0.1, while BatchNorm exists to make it 1. "
        "Usual causes: a dead ReLU or a zeroed filter before the layer, weight decay on BatchNorm, pruning. "
        "zero_init_residual starts with weight 0 in the last BatchNorm of every block.",
        cost="The channel takes time and says nothing about the image. Nothing is wrong.",
        can_know="A weight of 0 is certain. Single dead channels are in many published networks "
        "(MobileNetV2, EfficientNet-Lite0) and harm none: an info. A layer whose channels are all dead is a "
        "warning.",
        cannot_know="Whether it was meant so. Where eps is unknown, 1e-5 is assumed and called so.",
        advice="Prune the channel, or look for what silenced it: a dead ReLU before it, weight decay on "
        "BatchNorm.",
        source="Zhou et al. 2020, arXiv:2001.11216",
        thresholds=(
            Threshold(
                "dead_variance",
                0.01,
                "a running_var below this many eps is dead",
                "a deviation below a tenth",
            ),
        ),
    ),
    RulePage(
        code="BN007",
        name="exploding_gain",
        severity="warning",
        summary="a slope far above the rest of its layer",
        theory="In eval mode a channel is a straight line with the slope |weight| / sqrt(running_var + eps), "
        "its gain. The scale of a whole layer is free, so each channel is compared with its layer's median. "
        "A far steeper one had almost no variance in training, or a runaway weight.",
        cost="The gain multiplies rounding errors, and any shift from training to use. A shift of the whole "
        "batch cancels in train mode, not in eval mode.",
        can_know="The gain, and its cause. A runaway weight or a gain beyond float16 is a warning, little "
        "variance an info.",
        cannot_know="Whether later inputs differ from training's, and eps in a state dict.",
        advice="Compare outputs in train and eval mode. If they differ, recompute the statistics, keep the "
        "layer in float32, or prune.",
        source="van Laarhoven 2017, arXiv:1706.05350 (free scale)",
        thresholds=(
            Threshold(
                "gain",
                100.0,
                "none up to this is reported",
                "float16 rounds by 5 %",
            ),
            Threshold(
                "gain_per_median",
                30.0,
                "nor up to so many medians",
                "nearly all healthy channels stay within 15",
            ),
            Threshold(
                "gain_limit",
                65504.0,
                "above it always",
                "the largest float16",
            ),
        ),
    ),
    RulePage(
        code="BN008",
        name="switched_off",
        severity="info",
        summary="hardly any output is above 0: a ReLU passes nothing",
        theory="If the normalised input is normally distributed, the share of outputs above 0 is about "
        "Phi(bias / |weight|), where Phi is the normal distribution function. At bias = -4.75 |weight| it "
        "is one in a million. A ReLU behind such a channel passes nothing, and no gradient comes back to "
        "change that.",
        cost="The channel takes time and adds nothing. Both modes agree, so nothing is computed wrongly.",
        can_know="The share under this model.",
        cannot_know="Real activations have longer tails than the model, and a checkpoint does not say "
        "whether a ReLU follows. Many healthy networks have such channels. Where eps is unknown, 1e-5 is "
        "assumed.",
        advice="Harmless where no ReLU follows. Else prune the channel; a lower learning rate avoids it.",
        source="Lu et al. 2019, Dying ReLU and Initialization, arXiv:1903.06733",
        thresholds=(
            Threshold(
                "active_share",
                1e-6,
                "smallest share of outputs above 0 that is accepted",
                "one position in 80 maps of 112x112",
            ),
            Threshold(
                "off_bias",
                0.1,
                "a bias nearer to 0 than this is not judged",
                "in blocks that started at weight 0 both are tiny",
            ),
        ),
    ),
    RulePage(
        code="BN009",
        name="counter_type",
        severity="warning",
        summary="num_batches_tracked is not an int64",
        theory="num_batches_tracked is an int64 in every BatchNorm that PyTorch makes, and model.half() "
        "leaves it alone. A float shows that somebody computed with the whole state dict: a mean of several "
        "checkpoints, a moving average of weights, a conversion. Then the running statistics were averaged "
        "too. PyTorch loads such a counter without a word, rounded down.",
        cost="Averaged statistics belong to none of the networks: averaged weights make activations with "
        "another mean and variance. Accuracy falls a little where the averaged networks are alike, and to "
        "chance where they are not.",
        can_know="The type, which training never changes. Another whole number type is an info.",
        cannot_know="Whether the statistics were recomputed since, and how far they are from the truth.",
        advice="If the weights were averaged, recompute the statistics over the training set (bncli "
        "recalibrate). Store the counter as int64.",
        source="Izmailov et al. 2018, Averaging Weights Leads to Wider Optima, arXiv:1803.05407",
    ),
    RulePage(
        code="BN010",
        name="counter_unequal",
        severity="warning",
        summary="num_batches_tracked differs from most layers",
        theory="Layers that take part in every training batch have counted the same number. A layer with "
        "fewer was frozen for a while (eval mode), added later, loaded from elsewhere, or is used in some "
        "batches only. A layer with more may have stayed in train mode while somebody believed it frozen: "
        "requires_grad=False stops the optimiser but not the running statistics, and model.train() takes a "
        "frozen layer out of eval mode again.",
        cost="Nothing, if it was meant so. Otherwise the statistics are those of other batches than the rest "
        "of the network saw.",
        can_know="The layers did not see the same batches, or a counter was set. It is an info if the first "
        "layers agree on one count and the last ones on another.",
        cannot_know="Whether it was meant so. Fine-tuning with a frozen backbone looks like an accident that "
        "froze it.",
        advice="Fine if the layer was frozen, added later or used only now and then. Else find out why it "
        "missed batches.",
        source="pytorch#86590 and pytorch#66073 (frozen BatchNorm)",
    ),
    RulePage(
        code="BN011",
        name="counter_multiple",
        severity="warning",
        summary="a count k times that of most layers, or 1/k",
        theory="A layer that has counted exactly k times as many batches as the others (k from 2 to 8) was "
        "updated k times in each step. Either it is used several times in one forward pass (a shared head, "
        "a siamese network), or activation checkpointing ran the forward pass again for the backward pass. "
        "An exact fraction is the same, seen from the other side.",
        cost="A shared layer mixes the statistics of all its uses, and eval mode normalises each use by the "
        "mixture. Checkpointing counts every batch twice, so momentum m acts as 1 - (1 - m)^2.",
        can_know="The ratio, exactly. Where the last layers alone counted fewer, it is an info: a new head "
        "on an older backbone.",
        cannot_know="Which of the causes it is. A layer that was frozen for exactly half of the batches "
        "looks the same.",
        advice="If the layer is used several times in a step, give each use its own BatchNorm. If activation "
        "checkpointing runs it twice, use momentum 1 - sqrt(1 - m).",
        source="pytorch#96136 (checkpointing updates twice)",
    ),
    RulePage(
        code="BN012",
        name="far_mean",
        severity="warning",
        summary="a mean so far from 0 that short floats lose the rest",
        theory="Eval mode subtracts running_mean from activations that lie around it. If the mean is many "
        "deviations away from 0, most digits of each activation are spent on the offset. Near 64 deviations "
        "neighbouring bfloat16 numbers are half a deviation apart; float16 gets there near 512, float32 in "
        "the millions. It happens to inputs that were never centred, behind layers with a large bias, and "
        "in channels that hardly vary.",
        cost="What is rounded away before the layer cannot come back, and part of the measured variance is "
        "that of the rounding.",
        can_know="The distance, and what each number format can resolve there.",
        cannot_know="In which format the network runs. In float32 it is harmless.",
        advice="Keep the layer and its input in float32, or subtract the mean of the input before the layer.",
        source="Higham 2002, Accuracy and Stability of Numerical Algorithms, section 1.7; arXiv:1502.03167",
        thresholds=(
            Threshold(
                "mean_in_deviations",
                64.0,
                "largest |running_mean| / sqrt(running_var) that is accepted",
                "bfloat16 resolves half a deviation there",
            ),
        ),
    ),
    RulePage(
        code="BN013",
        name="no_running_stats",
        severity="error",
        summary="no running statistics to use in eval mode",
        theory="With track_running_stats=False a layer has no running_mean and running_var. Eval mode then "
        "normalises by the batch at hand, as train mode does. It may be meant so, in style transfer or "
        "test-time adaptation; then use --ignore no_running_stats.",
        cost="The prediction for one image depends on the images beside it. A batch of one image is "
        "normalised by that image alone; with one value per channel PyTorch refuses it (Expected more than "
        "1 value per channel).",
        can_know="Certain where the file knows its network: files of bncli and whole pickled modules.",
        cannot_know="In a state dict such a layer looks like any layer with weight and bias, so it is not "
        "found there.",
        advice="Train with track_running_stats=True, or use a normalisation that needs no batch (GroupNorm).",
        source="PyTorch documentation, torch.nn.BatchNorm2d; pytorch#156051",
    ),
    RulePage(
        code="BN014",
        name="near_initial",
        severity="warning",
        summary="variances near 1: much of the initial 1 is left",
        theory="An average that still holds the share s of its start has running_var = s + (1 - s) * b, with "
        "b >= 0. So no variance is below s, and all are more even than those of real data. A moving average "
        "over a whole state dict does that: with decay 0.9999 it holds 95 % of its start after 500 steps "
        "(timm's ModelEmaV2 and V3). So does momentum 0.001.",
        cost="Eval mode normalises by numbers that no image had. Predictions may be useless.",
        can_know="Seven layers in ten agree, their variances are above 0.5, and weights or counters show "
        "that the network was used. The share is given as two bounds.",
        cannot_know="An input whose variance truly is 1 looks the same; so BatchNorm on standardised "
        "features, or right behind BatchNorm, is not judged. That real layers are less even was measured, "
        "not proved. Smaller shares are not found.",
        advice="Recompute the statistics over the training set (bncli recalibrate). In later runs average "
        "the weights alone, raise momentum, or update more often.",
        source="huggingface/pytorch-image-models#245 and #1182 (averaged buffers)",
        thresholds=(
            Threshold(
                "initial_share",
                0.3,
                "smallest lower bound of the share that is reported",
                "healthy networks show less than 0.1",
            ),
        ),
    ),
    RulePage(
        code="BN015",
        name="few_batches",
        severity="warning",
        summary="the statistics of hardly more than one batch",
        theory="With momentum m the last batch has the weight m, the one before it m * (1 - m), and so on. "
        "The mean scatters like that of (2 - m) / m batches: 19 with 0.1, 3 with 0.5, 1.02 with 0.99. Keras "
        "and Flax (0.99) and ONNX (0.9) call the weight of the old value momentum. Copied as it is, "
        "training looks the same: it does not read the running statistics.",
        cost="Eval mode normalises by whatever batch came last, so accuracy changes from step to step.",
        can_know="The momentum, in files of bncli and whole pickled modules. A count of 1, beside a variance "
        "that one step with 0.1 cannot reach, shows one batch: an info.",
        cannot_know="A state dict stores no momentum. Statistics that were recomputed since are right "
        "whatever it says. The one batch may have been all images.",
        advice="PyTorch's momentum is the weight of the new batch: Keras's 0.99 is 0.01 here. Recompute the "
        "statistics over the training set (bncli recalibrate).",
        source="PyTorch documentation, torch.nn.BatchNorm2d; Keras documentation",
        thresholds=(
            Threshold(
                "effective_batches",
                2.0,
                "fewest batches that are accepted",
                "short recipes take momentum up to 0.6",
            ),
        ),
    ),
)


def find_page(code_or_name: str) -> RulePage:
    """The page of a code such as BN003, in either case, or of a name such as non_finite.

    Raises BncliError, with the list, for anything else.
    """
    for page in PAGES:
        if code_or_name.strip().lower() in (page.code.lower(), page.name):
            return page
    known = ", ".join(f"{page.code} {page.name}" for page in PAGES)
    raise BncliError(f"there is no rule {code_or_name.strip()!r}; there are {known}")
