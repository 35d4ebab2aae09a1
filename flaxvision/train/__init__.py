"""Training: the state, objectives, steps and their compilation, optimizers and the loop."""

from flaxvision.processes import initialize
from flaxvision.train.loop import EarlyStopping, FitResult, evaluate, fit
from flaxvision.train.objectives import Objective, binary, capsule, classification, multilabel, regression
from flaxvision.train.optim import OPTIMIZERS, SCHEDULES, optimizer, schedule
from flaxvision.train.parallel import CompiledStep, compile_steps, jit_step, make_mesh, pmap_step, prefetch
from flaxvision.train.range_test import LearningRateRange, learning_rate_range
from flaxvision.train.recipe import Recipe
from flaxvision.train.reproducibility import deterministic
from flaxvision.train.sharding import state_sharding
from flaxvision.train.state import TrainState, create_state
from flaxvision.train.step import eval_step, train_step
from flaxvision.train.workdir import draw_samples, fit_in_workdir, open_workdir, run_experiment, versions
from flaxvision.train.writers import JsonlWriter, ProgressBar, TensorBoardWriter, read_records

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "CompiledStep",
    "EarlyStopping",
    "FitResult",
    "JsonlWriter",
    "LearningRateRange",
    "Objective",
    "ProgressBar",
    "Recipe",
    "TensorBoardWriter",
    "TrainState",
    "binary",
    "capsule",
    "classification",
    "compile_steps",
    "create_state",
    "deterministic",
    "draw_samples",
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
    "read_records",
    "regression",
    "run_experiment",
    "schedule",
    "state_sharding",
    "train_step",
    "versions",
]
