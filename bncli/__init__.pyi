from .batchnorm import Moments as Moments
from .batchnorm import audit as audit
from .batchnorm import measure_population as measure_population
from .batchnorm import read_running_stats as read_running_stats
from .batchnorm import recalibrate as recalibrate
from .checkpoints import Checkpoint as Checkpoint
from .checkpoints import load_checkpoint as load_checkpoint
from .checkpoints import load_model as load_model
from .config import Config as Config
from .config_file import load_config as load_config
from .data import load_dataset as load_dataset
from .determinism import FixedShape as FixedShape
from .determinism import certify as certify
from .determinism import check_determinism as check_determinism
from .errors import BncliError as BncliError
from .evaluation import evaluate as evaluate
from .evaluation import measure_gap as measure_gap
from .inference import fold_batch_norm as fold_batch_norm
from .inference import optimize_for_inference as optimize_for_inference
from .training import train as train

__version__: str
