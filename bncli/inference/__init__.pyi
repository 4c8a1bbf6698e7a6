from .fold import FoldedLayer as FoldedLayer
from .fold import Folding as Folding
from .fold import KeptLayer as KeptLayer
from .fold import fold_batch_norm as fold_batch_norm
from .fold import norms_behind as norms_behind
from .optimize import INFERENCE_ROWS as INFERENCE_ROWS
from .optimize import InferenceNetwork as InferenceNetwork
from .optimize import optimize_for_inference as optimize_for_inference
