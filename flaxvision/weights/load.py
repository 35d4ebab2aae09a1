"""Weights for a model: from a file or a published tag, with another head or another number of channels if asked."""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxvision.registry import create_model
from flaxvision.weights.bundle import is_bundle, read_bundle
from flaxvision.weights.convert import (
    Shape,
    Variables,
    adapted,
    check,
    filled,
    flat,
    images_of,
    layout_of,
    nested,
    shapes_of,
    sources,
)
from flaxvision.weights.download import fetch
from flaxvision.weights.files import read
from flaxvision.weights.layout import Layout
from flaxvision.weights.slots import slots_of
from flaxvision.weights.tags import tag_of, tags

_log = logging.getLogger(__name__)

_ENDINGS = (".safetensors", ".npz", ".h5", ".hdf5", ".pth", ".pt", ".th", ".bin")


def load(
    name: str,
    weights: str | os.PathLike[str],
    *,
    source: str | None = None,
    num_classes: int | None = None,
    channels: int | None = None,
    input_size: Shape | None = None,
    rng: jax.Array | None = None,
    **overrides: Any,
) -> Variables:
    """Loads weights for a registered model.

    The variables are those of the source's network: `load_model` builds it, and so does `create_model(name,
    **fields(name, source))`. Weights are never fitted quietly: a tensor that is missing, superfluous or of another
    shape is an error. Two things may differ, if asked for, and what is done is logged (logger
    `flaxvision.weights.load`; what starts fresh as a warning):

    * With another `num_classes` the layers that depend on it start fresh, from the model's own initializers, and all
      else is kept; 0 leaves them out.
    * With other `channels` the kernel that sees the image is folded: summed over its input channels for 1; for more
      (or 2 of 3), repeated in turn and scaled by the old number over the new, which keeps the response to a grey image
      where the new number is a multiple of the old.

    Values that are not finite are loaded and named in a warning: torchvision's `IMAGENET1K_FEATURES` has such.

    Args:
        name: A registry name.
        weights: A tag of `weights.tags(name)`, such as `"torchvision/IMAGENET1K_V1"`, which is fetched into the cache
            (`weights.cache_dir()`) unless it is there; or the path of a file that `weights.read` reads, or of a bundle
            that `weights.save` wrote.
        source: For a file that is no bundle: the library whose names its tensors have.
        num_classes: Outputs; None for those of the weights.
        channels: Of the images; None for those of the weights.
        input_size: Height and width of the images, for models that flatten; None for the model's own.
        rng: Key of the fresh values; None for `jax.random.key(0)`.
        **overrides: Fields of the module, over those of the source or the bundle.

    Returns:
        A nested dict of NumPy arrays, for `model.apply`.

    Raises:
        ValueError: There is no such model, tag or source; the tensors do not fit (all are named); the file is damaged,
            or the fetched one is not what was published; `num_classes` is negative or `channels` not positive.
        FileNotFoundError: There is no such file.
        ConnectionError: The tag could not be fetched.
        ImportError: The file is torch's and torch, of the extra `reference`, is not installed.
        TypeError: The model has no such field, or `num_classes` or `channels` is no integer.
    """
    return _load(name, weights, source, num_classes, channels, input_size, rng, overrides)[1]


def load_model(name: str, weights: str | os.PathLike[str], **options: Any) -> tuple[nn.Module, Variables]:
    """Loads weights and builds the network that they belong to.

    Args:
        name: A registry name.
        weights: A tag or a path.
        **options: As of `load`.

    Returns:
        The model, with the fields of the source or the bundle, and its variables.

    Raises:
        ValueError, FileNotFoundError, ConnectionError, ImportError, TypeError: As `load`.
    """
    known = {key: options.pop(key, None) for key in ("source", "num_classes", "channels", "input_size", "rng")}
    fields, variables = _load(name, weights, **known, overrides=options)
    return create_model(name, **fields), variables


def _load(
    name: str,
    weights: str | os.PathLike[str],
    source: str | None,
    num_classes: int | None,
    channels: int | None,
    input_size: Shape | None,
    rng: jax.Array | None,
    overrides: dict[str, Any],
) -> tuple[dict[str, Any], Variables]:
    """The fields of the model and its variables."""
    create_model(name, **overrides)  # wrong names are an error before anything is fetched
    for option, value, least in (("num_classes", num_classes, 0), ("channels", channels, 1)):
        if value is not None and operator.index(value) < least:
            raise ValueError(f"{option} must be {least} or more, got {value}")
    path, source = _find(name, weights, source)
    if source is None:
        stored, card = read_bundle(path)
        if card["model"] != name:
            raise ValueError(f"{path} holds {card['model']}, not {name}")
        fields = {**card["overrides"], **overrides}
        size = input_size or card["input_size"]
        network = _Network(name, fields, size)
        leaves, classes, depth = (
            flat(stored),
            network.classes,
            card["channels"] or images_of(name, None, size).shape[-1],
        )
        shapes = {key: leaf.shape for key, leaf in network.shapes(classes, depth).items()}
        check(f"{path} does not fit {name} with {overrides}", leaves, shapes)
    else:
        layout = layout_of(name, source)
        fields = {**layout.fields, **overrides}
        network = _Network(name, fields, input_size)
        tensors = adapted(name, read(path), layout, network.shapes(None, None))
        classes, depth = network.read_off(layout, tensors)
        # Without a head, that of the file is left at once, of whatever size it is.
        classes = 0 if num_classes == 0 else classes
        leaves = filled(name, tensors, layout, network.shapes(classes, depth))
    wanted = classes if num_classes is None else num_classes
    if channels is not None and channels != depth:
        leaves = network.folded(leaves, depth, channels, classes)
        depth = channels
    if wanted != classes:
        leaves = network.with_head(leaves, wanted, depth, rng)
    if broken := [key for key, leaf in leaves.items() if not np.isfinite(leaf).all()]:
        _log.warning("%s: %s of %s hold what is not finite", name, ", ".join(broken), weights)
    return network.fields_with(wanted), nested(leaves)


def _find(name: str, weights: str | os.PathLike[str], source: str | None) -> tuple[Path, str | None]:
    """The file, and the library whose names it has; None for a bundle."""
    path = Path(weights)
    if isinstance(weights, str) and weights in tags(name):
        if source is not None:
            raise ValueError(f"source={source!r} is for files; {weights} is a tag and says its own")
        info = tag_of(name, weights)
        return fetch(info.url, info.digest, revision=info.revision), info.source
    if not path.is_file():
        if path.suffix.lower() in _ENDINGS:
            raise FileNotFoundError(f"there is no file {path}")
        tag_of(name, str(weights))
    if source is not None:
        return path, source
    if path.suffix == ".safetensors" and is_bundle(path):
        return path, None
    raise ValueError(
        f"{path} is no bundle of flaxvision; give source=, the library whose names its tensors have,"
        f" one of {', '.join(sources(name)) or 'none known'}"
    )


class _Network:
    """A model at several numbers of classes and channels."""

    def __init__(self, name: str, fields: dict[str, Any], input_size: Shape | None):
        self.name, self.fields, self.input_size = name, fields, input_size
        self.classes: int = getattr(create_model(name, **fields), "num_classes", 0)

    def fields_with(self, classes: int) -> dict[str, Any]:
        return self.fields if classes == self.classes else {**self.fields, "num_classes": classes}

    def shapes(self, classes: int | None, channels: int | None) -> dict[str, jax.ShapeDtypeStruct]:
        classes = self.classes if classes is None else classes
        model = create_model(self.name, **self.fields_with(classes))
        return shapes_of(self.name, model, channels=channels, input_size=self.input_size)

    def read_off(self, layout: Layout, tensors: Mapping[str, np.ndarray]) -> tuple[int, int]:
        """The numbers of classes and of channels that a library's tensors have; the model's own where they say none."""
        depth = images_of(self.name, None, self.input_size).shape[-1]
        usual = _shapes_there(layout, self.shapes(None, None))
        if all(key not in tensors or tensors[key].shape == shape for key, shape in usual.items()):
            return self.classes, depth
        found = []
        for count, more in (
            (self.classes, self.shapes(self.classes + 1, None) if self.classes else {}),
            (depth, self.shapes(None, depth + 1)),
        ):
            there, said = _shapes_there(layout, more), {count}
            for key in sorted(usual.keys() & there.keys() & tensors.keys()):
                for axis, (one, other) in enumerate(zip(usual[key], there[key], strict=True)):
                    if one != other and tensors[key].ndim > axis:
                        said.add(count + (tensors[key].shape[axis] - one) // (other - one))
            said.discard(count)
            found.append(said.pop() if len(said) == 1 and min(said) > 0 else count)
        return found[0], found[1]

    def folded(self, leaves: dict[str, np.ndarray], old: int, new: int, classes: int) -> dict[str, np.ndarray]:
        wanted = self.shapes(classes, new)
        changed = [path for path, leaf in wanted.items() if leaf.shape != leaves[path].shape]
        folded = {}
        for path in changed:
            kernel = leaves[path]
            if kernel.ndim < 3 or kernel.shape[-2] != old or wanted[path].shape[-2] != new:
                raise ValueError(f"{path} {list(kernel.shape)} cannot be folded from {old} to {new} channels")
            folded[path] = fold(kernel, new)
        _log.info("%s: folded %s from %d to %d channels", self.name, ", ".join(changed), old, new)
        return {**leaves, **folded}

    def with_head(
        self, leaves: dict[str, np.ndarray], classes: int, channels: int, rng: jax.Array | None
    ) -> dict[str, np.ndarray]:
        wanted = self.shapes(classes, channels)
        fresh = [path for path, leaf in wanted.items() if path not in leaves or leaf.shape != leaves[path].shape]
        dropped = [path for path in leaves if path not in wanted]
        if fresh:
            _log.warning("%s: %s start fresh for %d classes", self.name, ", ".join(fresh), classes)
        if dropped:
            _log.info("%s: %s are left out", self.name, ", ".join(dropped))
        model = create_model(self.name, **self.fields_with(classes))
        image = images_of(self.name, channels, self.input_size)

        @jax.jit
        def init(key: jax.Array) -> dict[str, jax.Array]:
            variables = flat(model.init(key, jnp.zeros(image.shape, image.dtype)))
            return {path: variables[path] for path in fresh}  # the compiler drops what the others would cost

        new = init(jax.random.key(0) if rng is None else rng) if fresh else {}
        return {path: np.asarray(new[path]) if path in new else leaves[path] for path in wanted}


def _shapes_there(layout: Layout, shapes: Mapping[str, Any]) -> dict[str, Shape]:
    return {slot.name: slot.shape for slot in slots_of(layout, shapes) if slot.constant is None}


def fold(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Makes a kernel see another number of channels.

    Args:
        kernel: `[*window, C, F]`.
        channels: The new number; 1 takes the sum over the old ones, others repeat them in turn, scaled by the old
            number over the new.

    Returns:
        `[*window, channels, F]`.
    """
    old = kernel.shape[-2]
    if channels == 1:
        return kernel.sum(axis=-2, keepdims=True)
    return kernel[..., np.arange(channels) % old, :] * kernel.dtype.type(old / channels)
