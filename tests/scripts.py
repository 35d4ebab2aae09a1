"""Imports the files of `experiments/`, which are scripts and not a package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def load_script(name: str) -> ModuleType:
    """Imports `experiments/NAME.py`, which finds the modules beside it."""
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        found = importlib.util.spec_from_file_location(f"{name}_experiment", EXPERIMENTS / f"{name}.py")
        module = importlib.util.module_from_spec(found)
        sys.modules[found.name] = module
        found.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXPERIMENTS))
    return module
