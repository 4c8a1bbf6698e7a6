from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import load_checkpoint as load_checkpoint
from .checkpoint import load_model as load_model
from .config import Config as Config
from .config_file import load_config as load_config
from .data import load_dataset as load_dataset
from .errors import BncliError as BncliError
from .evaluation import FixedShape as FixedShape
from .evaluation import Folding as Folding
from .evaluation import certify as certify
from .evaluation import check_determinism as check_determinism
from .evaluation import evaluate as evaluate
from .evaluation import fold_batch_norm as fold_batch_norm
from .evaluation import measure_gap as measure_gap
from .evaluation import optimize_for_inference as optimize_for_inference
from .stats import Moments as Moments
from .stats import audit as audit
from .stats import measure_population as measure_population
from .stats import read_running_stats as read_running_stats
from .stats import recalibrate as recalibrate
from .training import train as train

__version__: str
