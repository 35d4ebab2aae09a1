"""Loads weights from a file or a published tag, with another head or another number of channels if asked."""

from __future__ import annotations

import dataclasses
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
from flaxvision.weights.class_names import class_names_for
from flaxvision.weights.convert import (
    Shape,
    Variables,
    adapted,
    check,
    filled,
    flat,
    images_of,
    labels_of,
    layout_of,
    nested,
    require_fields,
    shapes_of,
    sources,
)
from flaxvision.weights.darknet import FORK, read_darknet, split, values_of
from flaxvision.weights.download import fetch
from flaxvision.weights.files import read
from flaxvision.weights.layout import Layout
from flaxvision.weights.slots import slots_of
from flaxvision.weights.tags import tag_of, tags

_log = logging.getLogger(__name__)

_ENDINGS = (".safetensors", ".npz", ".h5", ".hdf5", ".pth", ".pt", ".th", ".bin", ".weights")
# Fields of a bundle that a caller may leave out: `load` has an argument for the first one, and the others do not change
# the logits in evaluation.
_OPTIONAL = (
    *("num_classes", "aux_heads", "dropout_rate", "dtype", "param_dtype"),
    *("axis_name", "batch_norm", "ghost_size", "frozen_stages"),
)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Weights, and the facts about the network that they belong to.

    Attributes:
        name: The registry name.
        fields: Fields of the network, for `create_model`.
        variables: The variables, a nested dict of NumPy arrays.
        class_names: One name per class in the order of the outputs; None if the classes have no known names.
        channels: Number of image channels; None for the model's own.
        input_size: Height and width given by the caller or the bundle; None for the model's own.
    """

    name: str
    fields: dict[str, Any]
    variables: Variables
    class_names: tuple[str, ...] | None
    channels: int | None
    input_size: Shape | None

    def model(self) -> nn.Module:
        """Builds the network that the variables belong to."""
        return create_model(self.name, **self.fields)


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
    """Loads variables for `create_model(name, **overrides)`.

    If the network of the weights and this model differ in their fields, an error lists the fields. To set them, use
    `load_model` or pass `**fields(name, source)`. A tensor that is missing, unexpected or of the wrong shape is also an
    error. Two things may differ on request; the logger `flaxvision.weights.load` reports both, with a warning for newly
    initialized layers:

    * With another `num_classes`, the layers that depend on it are initialized anew and all others are kept. 0 leaves
      them out.
    * With other `channels`, the kernel that is applied to the image is folded. For 1 channel it is summed over its
      input channels. For any other number, its input channels are repeated cyclically and scaled by the old number
      divided by the new one. This keeps the response to a grey image if the new number is a multiple of the old one.

    Non-finite values are loaded, and their variables are named in a warning. torchvision's `IMAGENET1K_FEATURES` has
    some.

    Args:
        name: A registry name.
        weights: A tag of `weights.tags(name)`, such as `"torchvision/IMAGENET1K_V1"`; or the path of a file that
            `weights.read` reads, of a `.weights` file of darknet, or of a bundle that `weights.save` wrote. The file of
            a tag is downloaded into the cache (`weights.cache_dir()`) unless it is already there. Networks trained with
            A. Bochkovskiy's fork of darknet have `epsilon=1e-5`.
        source: The library that named the tensors; needed for files that are not bundles.
        num_classes: Number of outputs; None for that of the weights.
        channels: Number of image channels; None for that of the weights.
        input_size: Height and width of the images, for models that flatten feature maps; None for the model's own.
        rng: Key for newly initialized layers; None for `jax.random.key(0)`.
        **overrides: Fields of the module.

    Returns:
        A nested dict of NumPy arrays, for `model.apply`.

    Raises:
        ValueError: There is no such model, tag or source; tensors do not fit (the message lists all of them); the
            overrides lack fields of the weights' network; the file is damaged, or a download has the wrong digest;
            `num_classes` is negative or `channels` is not positive.
        FileNotFoundError: There is no such file.
        ConnectionError: The tag could not be downloaded.
        ImportError: The file needs torch (extra `reference`), which is not installed.
        TypeError: The model has no such field, or `num_classes` or `channels` is not an integer.
    """
    given = {"source": source, "num_classes": num_classes, "channels": channels, "input_size": input_size, "rng": rng}
    return load_weights(name, weights, **given, strict=True, **overrides).variables


def load_model(name: str, weights: str | os.PathLike[str], **options: Any) -> tuple[nn.Module, Variables]:
    """Loads weights and builds the network that they belong to.

    Args:
        name: A registry name.
        weights: A tag or a path, as for `load`.
        **options: The other arguments of `load`. Overrides take precedence over the fields of the source or the bundle.

    Returns:
        The model, with the fields of the source or the bundle, and its variables.

    Raises:
        ValueError, FileNotFoundError, ConnectionError, ImportError, TypeError: As `load`, but the overrides need not
            include the fields of the weights' network.
    """
    loaded = load_weights(name, weights, **options)
    return loaded.model(), loaded.variables


def load_weights(
    name: str,
    weights: str | os.PathLike[str],
    *,
    source: str | None = None,
    num_classes: int | None = None,
    channels: int | None = None,
    input_size: Shape | None = None,
    rng: jax.Array | None = None,
    strict: bool = False,
    **overrides: Any,
) -> Loaded:
    """Loads weights together with the fields of their network and their class names.

    The arguments and errors are those of `load`. With `strict`, it is an error if the
    model and the overrides do not give the fields of the network.
    """
    create_model(name, **overrides)  # reports wrong names before a download
    for option, value, least in (("num_classes", num_classes, 0), ("channels", channels, 1)):
        if value is not None and operator.index(value) < least:
            raise ValueError(f"{option} must be at least {least}; got {value}")
    path, source = _find(name, weights, source)
    if source is None:
        stored, card = read_bundle(path)
        if card["model"] != name:
            raise ValueError(f"name must be {card['model']}, the model of {path}; got {name!r}")
        fields = {**card["overrides"], **overrides}
        input_size = input_size or card["input_size"]
        network = _Network(name, fields, input_size)
        leaves, classes = flat(stored), network.classes
        depth = card["channels"] or network.channels
        shapes = {key: leaf.shape for key, leaf in network.shapes(classes, depth).items()}
        check(f"{path} does not fit {name} with {overrides or 'no overrides'}", leaves, shapes)
        if strict:
            _require_fields_of_bundle(name, path, card["overrides"], overrides, network, classes, depth)
        names = card["class_names"]
    else:
        layout = layout_of(name, source)
        theirs = dict(layout.fields)
        if path.suffix == ".weights" and read_darknet(path).version == FORK:
            theirs["epsilon"] = 1e-5
        numbered = overrides if num_classes is None else {"num_classes": num_classes, **overrides}
        if strict:
            require_fields(name, theirs, numbered, f"{source}'s {name}")
        fields = {**theirs, **overrides}
        network = _Network(name, fields, input_size)
        stored = network.named(path) if path.suffix == ".weights" else read(path)
        tensors = adapted(name, stored, layout, network.shapes(None, None))
        classes, depth = network.read_off(layout, tensors)
        more = layout.fields_by_classes.get(classes, {}) if num_classes in (None, classes) else {}
        if strict:
            require_fields(name, more, numbered, f"{source}'s {name} with {classes} classes")
        network = _Network(name, {**more, **fields}, input_size)
        # Without a head, the head of the file is dropped at once, whatever its size.
        classes = 0 if num_classes == 0 else classes
        leaves = filled(name, tensors, layout, network.shapes(classes, depth))
        names = class_names_for(name, str(weights) if weights in tags(name) else source)
    wanted = classes if num_classes is None else num_classes
    if channels is not None and channels != depth:
        leaves = network.folded(leaves, depth, channels, classes)
        depth = channels
    if wanted != classes:
        leaves = network.with_head(leaves, wanted, depth, rng)
    if broken := [key for key, leaf in leaves.items() if not np.isfinite(leaf).all()]:
        _log.warning("%s: non-finite values in %s (from %s)", name, ", ".join(broken), weights)
    fields = network.fields_with(wanted)
    # A new head has new classes, and a file may have other classes than the published one.
    known = names is not None and wanted == classes and len(names) == labels_of(create_model(name, **fields))
    return Loaded(
        name=name,
        fields=fields,
        variables=nested(leaves),
        class_names=names if known else None,
        channels=None if depth == network.channels else depth,
        input_size=input_size,
    )


def _require_fields_of_bundle(
    name: str,
    path: Path,
    stored: dict[str, Any],
    overrides: dict[str, Any],
    network: _Network,
    classes: int,
    depth: int,
) -> None:
    """Raises ValueError if the variables fit the caller's model although its fields differ from the bundle's."""
    wanted = {key: value for key, value in stored.items() if key not in _OPTIONAL}
    callers = _Network(name, overrides, network.input_size)
    theirs = {key: leaf.shape for key, leaf in network.shapes(classes, depth).items()}
    if all(theirs.get(key) == leaf.shape for key, leaf in callers.shapes(classes, depth).items()):
        require_fields(name, wanted, overrides, f"the network of {path}")


def _find(name: str, weights: str | os.PathLike[str], source: str | None) -> tuple[Path, str | None]:
    """Returns the file and the library that named its tensors; None for a bundle."""
    path = Path(weights)
    if isinstance(weights, str) and weights in tags(name):
        if source is not None:
            raise ValueError(f"source must be None for the tag {weights}; got {source!r}")
        info = tag_of(name, weights)
        return fetch(info.url, info.digest, revision=info.revision), info.source
    if not path.is_file():
        if path.suffix.lower() in _ENDINGS:
            raise FileNotFoundError(f"weights must be an existing file; got {path}")
        tag_of(name, str(weights))  # raises the error that lists the tags
    if source is not None:
        return path, source
    if path.suffix == ".safetensors" and is_bundle(path):
        return path, None
    known = ", ".join(sources(name)) or "none is known for this model"
    raise ValueError(f"source must name the library of {path} ({known}), since the file is not a bundle; got None")


class _Network:
    """The shapes and heads of a model for several numbers of classes and channels."""

    def __init__(self, name: str, fields: dict[str, Any], input_size: Shape | None):
        self.name, self.fields, self.input_size = name, fields, input_size
        self.classes: int = getattr(create_model(name, **fields), "num_classes", 0)
        self.channels: int = images_of(name, None, input_size).shape[-1]

    def fields_with(self, classes: int) -> dict[str, Any]:
        return self.fields if classes == self.classes else {**self.fields, "num_classes": classes}

    def shapes(self, classes: int | None, channels: int | None) -> dict[str, jax.ShapeDtypeStruct]:
        classes = self.classes if classes is None else classes
        model = create_model(self.name, **self.fields_with(classes))
        return shapes_of(self.name, model, channels=channels, input_size=self.input_size)

    def named(self, path: Path) -> dict[str, np.ndarray]:
        """Reads a `.weights` file of darknet, whose length tells the number of classes."""
        values = read_darknet(path).values
        image = images_of(self.name, None, self.input_size).shape[1:]

        def model(classes: int) -> nn.Module:
            return create_model(self.name, **self.fields_with(classes))

        size = values_of(model(self.classes), image)
        more, left = divmod(values.size - size, values_of(model(self.classes + 1), image) - size)
        classes = self.classes if left or self.classes + more < 1 else self.classes + more
        return split(model(classes), values, path, image)

    def read_off(self, layout: Layout, tensors: Mapping[str, np.ndarray]) -> tuple[int, int]:
        """Infers the numbers of classes and channels from the tensors, or returns the model's own if it cannot."""
        depth = self.channels
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
                raise ValueError(
                    f"channels must be {old}, since {path} {list(kernel.shape)} cannot be folded; got {new}"
                )
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
            _log.warning("%s: newly initialized for %d classes: %s", self.name, classes, ", ".join(fresh))
        if dropped:
            _log.info("%s: left out: %s", self.name, ", ".join(dropped))
        model = create_model(self.name, **self.fields_with(classes))
        image = images_of(self.name, channels, self.input_size)

        @jax.jit
        def init(key: jax.Array) -> dict[str, jax.Array]:
            variables = flat(model.init(key, jnp.zeros(image.shape, image.dtype)))
            return {path: variables[path] for path in fresh}  # the compiler removes the computation of the others

        new = init(jax.random.key(0) if rng is None else rng) if fresh else {}
        return {path: np.asarray(new[path]) if path in new else leaves[path] for path in wanted}


def _shapes_there(layout: Layout, shapes: Mapping[str, Any]) -> dict[str, Shape]:
    return {slot.name: slot.shape for slot in slots_of(layout, shapes) if slot.constant is None}


def fold(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Folds a kernel to another number of input channels.

    Args:
        kernel: `[*window, C, F]`.
        channels: The new number. For 1, the old channels are summed. For any other number they are repeated cyclically
            and scaled by the old number divided by the new one.

    Returns:
        `[*window, channels, F]`.
    """
    old = kernel.shape[-2]
    if channels == 1:
        return kernel.sum(axis=-2, keepdims=True)
    return kernel[..., np.arange(channels) % old, :] * kernel.dtype.type(old / channels)
