"""Importing the package is quick and loads nothing heavy."""

import subprocess
import sys

import pytest

import flaxvision as fv

HEAVY = (
    "tensorflow",
    "tensorflow_datasets",
    "torch",
    "keras",
    "grain",
    "matplotlib",
    "orbax",
    "sklearn",
    "skimage",
    "PIL",
    "tqdm",
    "safetensors",
    "huggingface_hub",
    "h5py",
    "pycocotools",
)


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_loads_nothing_heavy():
    loaded = python(
        "import sys, jax, flax.linen, optax; before = set(sys.modules); import flaxvision;"
        f"print([m for m in {HEAVY!r} if m in sys.modules and m not in before])"
    )
    assert loaded == "[]"
    alone = python(f"import sys, flaxvision; print([m for m in {HEAVY[:6]!r} if m in sys.modules])")
    assert alone == "[]"


def test_importing_takes_under_a_second_and_a_half_beyond_jax_and_flax():
    # The process's own time: what else the machine does is not the import's.
    code = "import time, jax, flax.linen; t = time.process_time(); import flaxvision; print(time.process_time() - t)"
    assert min(float(python(code)) for _ in range(3)) < 1.5


def test_importing_starts_no_device():
    assert python("import flaxvision, jax._src.xla_bridge as b; print(b.backends_are_initialized())") == "False"


@pytest.mark.parametrize(
    "module",
    [
        fv,
        fv.data,
        fv.data.augment,
        fv.layers,
        fv.losses,
        fv.metrics,
        fv.models,
        fv.ops,
        fv.plot,
        fv.train,
        fv.checkpoint,
        fv.weights,
    ],
)
def test_every_public_name_exists_and_is_documented(module):
    names = getattr(module, "__all__", None) or [
        n
        for n, v in vars(module).items()
        if not n.startswith("_") and (getattr(v, "__module__", None) or "").startswith(module.__name__)
    ]
    assert names
    for name in names:
        value = getattr(module, name)
        if callable(value):
            assert (value.__doc__ or "").strip(), f"{module.__name__}.{name}"
