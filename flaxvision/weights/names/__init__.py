"""What other libraries call the tensors of our models: one module of `LAYOUTS` per file of `flaxvision.models`."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from flaxvision.weights.layout import Layout


@functools.cache
def layouts() -> tuple[Layout, ...]:
    """Every layout of every module of this package."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(
        layout for name in modules for layout in getattr(importlib.import_module(f"{__name__}.{name}"), "LAYOUTS", ())
    )
