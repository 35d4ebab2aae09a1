"""What a family with a feature hierarchy shares: a backbone that returns its stages, and a head on top of it."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import flax.linen as nn
import jax

Module = TypeVar("Module", bound=nn.Module)


class Backbone(nn.Module):
    """A network that maps images `[N, H, W, C]` to a dict of feature maps.

    A family subclasses it with its fields and `__call__(x, *, train=False)`; its classifier subclasses that with
    `num_classes`, makes its trunk with `part_of(self, ...)` and names it `backbone`, so that `params["backbone"]`
    of the classifier is the parameters of the backbone alone.
    """

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image per step of each stage's map, finest first, by the output's keys (which jit sorts)."""
        raise TypeError(f"{type(self).__name__} does not say the strides of its stages")


def check_images(x: jax.Array) -> None:
    """Refuses what is no batch of images: Linen's convolutions would take a single image for one.

    Raises:
        ValueError: `x` is not `[N, H, W, C]`.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be images [N, H, W, C], one image as x[None]; got the shape {x.shape}")


def part_of(module: nn.Module, part: type[Module], name: str | None = "backbone", **fields) -> Module:
    """Builds a `part` from the fields that it has in common with `module`.

    Args:
        module: The classifier.
        part: The class of its backbone.
        name: The submodule's name; None outside of a module.
        **fields: Values for fields that shall differ.

    Returns:
        The part, bound to the module whose compact method calls this, if any.
    """
    shared = [f.name for f in dataclasses.fields(part) if f.init and f.name not in ("parent", "name")]
    return part(**{k: getattr(module, k) for k in shared} | fields, name=name)
