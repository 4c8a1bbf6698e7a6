from .convolutions import ConvolutionSpeed as ConvolutionSpeed
from .convolutions import ProductSpeed as ProductSpeed
from .evaluation import EvaluationBench as EvaluationBench
from .evaluation import PathSpeed as PathSpeed
from .evaluation import Ratio as Ratio
from .evaluation import bench_evaluation as bench_evaluation
from .training_step import TrainingStepBench as TrainingStepBench
from .training_step import bench_training_step as bench_training_step
