"""Names of our tensors in other libraries. Every module of this package with a tuple `LAYOUTS` is found by itself."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from flaxvision.weights.layout import Layout


@functools.cache
def layouts() -> tuple[Layout, ...]:
    """Returns the layouts of all modules of this package."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(
        layout for name in modules for layout in getattr(importlib.import_module(f"{__name__}.{name}"), "LAYOUTS", ())
    )
