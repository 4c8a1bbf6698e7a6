"""The rules of the audit, as a table: what each finds, what to do about it, and where its limit lies.

This is the only place where they are described. `bncli inspect-stats --explain`, the list in the README and
the findings themselves are made from it; `checks.py` has the tests that go with the names.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from bncli.batchnorm.audit.theory import THEORY
from bncli.errors import BncliError

Severity = Literal["error", "warning"]

PYTORCH_EPS = 1e-5  # the default of torch.nn.BatchNorm2d; assumed where a state dict leaves eps unknown
PYTORCH_MOMENTUM = 0.1  # likewise


@dataclass(frozen=True)
class Threshold:
    """A number that a rule compares with; `reason` says why the default is what it is."""

    name: str
    default: float
    meaning: str
    reason: str


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong with a BatchNorm layer.

    An error certainly makes eval mode compute something else than what was trained; a warning is suspicious,
    or harmless in some networks.
    """

    code: str  # never given to another rule
    name: str
    severity: Severity
    summary: str  # what is found, in one line
    advice: str  # what to do about it
    thresholds: tuple[Threshold, ...] = ()

    @property
    def theory(self) -> str:
        """Why it matters, as one paragraph."""
        return THEORY[self.name].text

    @property
    def source(self) -> str:
        """Where the theory is from: a paper, PyTorch's documentation, an issue."""
        return THEORY[self.name].source


RULES = (
    Rule(
        "BN001",
        "never_updated",
        "error",
        "mean exactly 0 and variance exactly 1, as initialised",
        "Run training batches through the network in train mode, or load the checkpoint that has the "
        "statistics.",
    ),
    Rule(
        "BN002",
        "initial_residue",
        "warning",
        "too few updates: part of the statistics is still the initial (0, 1)",
        "Train longer, raise momentum, or recompute the statistics over the training set.",
        (
            Threshold(
                "residue",
                0.01,
                "largest fraction of (0, 1) left",
                "1 % of the initial 1 moves the deviation by 0.25 % beside a variance of 2, by 4 % beside "
                "0.1, about as much as a moving average scatters; momentum 0.1 needs 44 updates for it",
            ),
        ),
    ),
    Rule(
        "BN003",
        "non_finite",
        "error",
        "a NaN or an infinity in `running_mean`, `running_var`, `weight` or `bias`",
        "Go back to a checkpoint without it; under mixed precision keep the activations inside the range.",
    ),
    Rule(
        "BN004",
        "negative_variance",
        "error",
        "a `running_var` below 0",
        "Recompute the statistics over the training set; do not extrapolate or subtract running statistics.",
    ),
    Rule(
        "BN005",
        "eps_decides",
        "warning",
        "a variance so small that eps, not the data, sets the scale",
        "Make sure that eps is the one used in training wherever the network is rebuilt; else prune the "
        "channels.",
        (
            Threshold(
                "eps_share",
                0.5,
                "largest share of eps in running_var + eps",
                "from one half on, eps contributes more than the data to what the layer divides by",
            ),
        ),
    ),
    Rule(
        "BN006",
        "dead_channel",
        "warning",
        "a `weight` of exactly 0, or a variance far below eps: the output hardly depends on the image",
        "Prune the channel, or look for what silenced it: a dead ReLU before it, weight decay on BatchNorm.",
        (
            Threshold(
                "dead_variance",
                0.01,
                "a running_var below this many eps is dead",
                "at var = eps / 100 the normalised deviation sqrt(var / (var + eps)) is 0.1, a tenth of "
                "its purpose",
            ),
        ),
    ),
    Rule(
        "BN007",
        "exploding_gain",
        "warning",
        "|weight| / sqrt(running_var + eps) far above that of the layer's other channels",
        "Compare outputs in train and eval mode; recompute the statistics, keep the layer in float32, or "
        "prune.",
        (
            Threshold(
                "gain",
                100.0,
                "a gain up to this is never reported",
                "a float16 activation near 1 is rounded by 0.0005; times 100 that is 5 % of a deviation",
            ),
            Threshold(
                "gain_per_median",
                30.0,
                "nor one up to this many times the layer's median",
                "the scale of a whole layer is free (weight decay shrinks it); the channels of the healthy "
                "networks measured stay within 15 times the median",
            ),
            Threshold(
                "gain_limit",
                65504.0,
                "above this always, whatever the median",
                "the largest float16: multiplied into a convolution's weights it overflows",
            ),
        ),
    ),
    Rule(
        "BN008",
        "switched_off",
        "warning",
        "under a normal model hardly any output is above 0: a ReLU behind it passes nothing",
        "Harmless where no ReLU follows. Else the channel can be pruned; training at a lower rate avoids it.",
        (
            Threshold(
                "active_share",
                1e-6,
                "smallest share of outputs above 0",
                "one in a million, bias = -4.75 deviations: one position in 80 maps of 112 x 112",
            ),
            Threshold(
                "off_bias",
                0.1,
                "smallest -bias that is judged",
                "blocks that start at weight 0 have tiny weights and biases in any ratio: in zero-init "
                "ResNets and RegNets up to 0.042 after 60 steps",
            ),
        ),
    ),
    Rule(
        "BN009",
        "counter_type",
        "warning",
        "`num_batches_tracked` is not int64: somebody averaged or converted it",
        "Recompute the statistics of averaged weights over the training set; store the counter as int64.",
    ),
    Rule(
        "BN010",
        "counter_unequal",
        "warning",
        "`num_batches_tracked` differs from that of most layers",
        "Fine if the layer was frozen, added later or used only now and then; else look why it missed "
        "batches.",
    ),
    Rule(
        "BN011",
        "counter_multiple",
        "warning",
        "`num_batches_tracked` is a multiple of that of most layers, or a fraction",
        "Shared layer: give each use its own BatchNorm. Activation checkpointing: use momentum 1 - sqrt(1 "
        "- m).",
    ),
    Rule(
        "BN012",
        "far_mean",
        "warning",
        "a mean so many deviations from 0 that short floats cannot resolve the deviations",
        "Keep the layer and its input in float32, or take the offset away before it (centre the input).",
        (
            Threshold(
                "mean_in_deviations",
                64.0,
                "largest |running_mean| / sqrt(running_var)",
                "neighbouring bfloat16 numbers around 64 deviations are half a deviation apart",
            ),
        ),
    ),
    Rule(
        "BN013",
        "no_running_stats",
        "error",
        "the layer keeps none (`track_running_stats=False`): eval mode uses batch statistics too",
        "Set track_running_stats=True and train, or take a normalisation that needs no batch (GroupNorm).",
    ),
)

RULE_OF = {rule.name: rule for rule in RULES}
DEFAULT_THRESHOLDS = {threshold.name: threshold.default for rule in RULES for threshold in rule.thresholds}


def find_rule(code_or_name: str) -> Rule:
    """The rule of a code such as BN003, in either case, or of a name such as non_finite.

    Raises BncliError, with the list, for anything else.
    """
    for rule in RULES:
        if code_or_name.strip().lower() in (rule.code.lower(), rule.name):
            return rule
    known = ", ".join(f"{rule.code} {rule.name}" for rule in RULES)
    raise BncliError(f"there is no rule {code_or_name.strip()!r}; there are {known}")


def describe_rule(rule: Rule) -> dict[str, object]:
    """The rule as plain values, with its theory and source."""
    return {**asdict(rule), "theory": rule.theory, "source": rule.source}
