"""Training: the state, objectives, steps and their compilation, optimizers and the loop."""

from flaxvision.processes import initialize
from flaxvision.train import stopping
from flaxvision.train.callbacks import Profiler
from flaxvision.train.evaluation import Evaluation, accumulate, evaluate
from flaxvision.train.input import InputTimeoutError
from flaxvision.train.lock import WorkdirInUseError
from flaxvision.train.loop import FitResult, fit
from flaxvision.train.objectives import (
    Objective,
    average_precision,
    binary,
    capsule,
    classification,
    detection,
    multilabel,
    regression,
    segmentation,
)
from flaxvision.train.optim import OPTIMIZERS, SCHEDULES, optimizer, schedule
from flaxvision.train.parallel import CompiledStep, compile_steps, jit_step, make_mesh, pmap_step, prefetch
from flaxvision.train.range_test import LearningRateRange, learning_rate_range
from flaxvision.train.recipe import Recipe
from flaxvision.train.reproducibility import deterministic
from flaxvision.train.settings import RunSettings, eval_batch_size
from flaxvision.train.sharding import collect, state_sharding
from flaxvision.train.state import TrainState, create_state
from flaxvision.train.step import eval_step, train_step
from flaxvision.train.stopping import EarlyStopping
from flaxvision.train.workdir import (
    draw_samples,
    fit_in_workdir,
    open_workdir,
    print_once,
    run_experiment,
    run_info,
    versions,
)
from flaxvision.train.writers import JsonlWriter, ProgressBar, TensorBoardWriter, read_records

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "CompiledStep",
    "EarlyStopping",
    "Evaluation",
    "FitResult",
    "InputTimeoutError",
    "JsonlWriter",
    "LearningRateRange",
    "Objective",
    "Profiler",
    "ProgressBar",
    "Recipe",
    "RunSettings",
    "TensorBoardWriter",
    "TrainState",
    "WorkdirInUseError",
    "accumulate",
    "average_precision",
    "binary",
    "capsule",
    "classification",
    "collect",
    "compile_steps",
    "create_state",
    "detection",
    "deterministic",
    "draw_samples",
    "eval_batch_size",
    "eval_step",
    "evaluate",
    "fit",
    "fit_in_workdir",
    "initialize",
    "jit_step",
    "learning_rate_range",
    "make_mesh",
    "multilabel",
    "open_workdir",
    "optimizer",
    "pmap_step",
    "prefetch",
    "print_once",
    "read_records",
    "regression",
    "run_experiment",
    "run_info",
    "schedule",
    "segmentation",
    "state_sharding",
    "stopping",
    "train_step",
    "versions",
]
