"""Converts the tensors of other libraries to flaxvision variables and back, without importing those libraries."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxvision.registry import create_model, model_fields, model_info
from flaxvision.weights.layout import Layout
from flaxvision.weights.names import layouts
from flaxvision.weights.slots import Shape, canonical, matches, slots_of

Variables = dict[str, Any]


def fields(name: str, source: str) -> dict[str, Any]:
    """Returns the fields that make a model the network of another library.

    Dropout rates are not among them, since they are a choice of the training.

    Args:
        name: A registry name.
        source: The library: "torchvision", "timm", "keras", ...

    Returns:
        Fields of the flaxvision module, as `create_model` accepts them.

    Raises:
        ValueError: There is no such model, or no known layout of it in the library.

    Example:
        >>> fields("xception", "timm")
        {'pool_padding': ((1, 1), (1, 1)), 'epsilon': 1e-05, 'momentum': 0.9}
    """
    return dict(layout_of(name, source).fields)


def sources(name: str) -> list[str]:
    """Lists the libraries that `convert` and `export` know for a model.

    Args:
        name: A registry name.

    Returns:
        Sorted names of sources; empty if there are none.

    Raises:
        ValueError: There is no such model.

    Example:
        >>> sources("squeezenet1_0")
        ['deep_compression', 'torchvision']
    """
    return sorted({layout.source for layout in layouts() if model_info(name).name in layout.models})


def convert(
    name: str,
    tensors: Mapping[str, Any],
    *,
    source: str,
    channels: int | None = None,
    input_size: Shape | None = None,
    **overrides: Any,
) -> Variables:
    """Converts the tensors of a library to the variables of a model.

    Args:
        name: A registry name.
        tensors: Arrays by the library's names: a torch `state_dict`, or the weights of a Keras model by their paths.
        source: The library.
        channels: Number of image channels; None for the model's own.
        input_size: Height and width of the images, for models that flatten; None for the model's own.
        **overrides: Fields of the flaxvision module. They must include `fields(name, source)` where these differ from
            the model's own. With `num_classes=0` the tensors of the head are ignored.

    Returns:
        A nested dict of NumPy arrays for `create_model(name, **overrides)`. Half precision becomes float32.

    Raises:
        ValueError: Tensors are missing, unexpected, of the wrong shape or not floating point (all are listed); the
            overrides lack fields of the source; there is no such model or source; or `channels` is not positive.
        TypeError: The model has no such field, or `channels` is not an integer.
    """
    layout = layout_of(name, source)
    require_fields(name, layout.fields, overrides, f"{source}'s {name}")
    model = create_model(name, **overrides)
    if channels is not None and operator.index(channels) < 1:
        raise ValueError(f"channels must be at least 1; got {channels}")
    shapes = shapes_of(name, model, channels=channels, input_size=input_size)
    return nested(filled(name, adapted(name, tensors, layout, shapes), layout, shapes))


def export(
    name: str,
    variables: Mapping[str, Any],
    *,
    source: str,
    channels: int | None = None,
    input_size: Shape | None = None,
    **overrides: Any,
) -> dict[str, np.ndarray]:
    """Converts the variables of a model to the tensors of a library; the inverse of `convert`.

    Args:
        name: A registry name.
        variables: Variables as `convert`, `load` or `init` return them.
        source: The library.
        channels: Number of image channels; None for the model's own.
        input_size: Height and width of the images, for models that flatten; None for the model's own.
        **overrides: Fields of the module that the variables belong to. They must include `fields(name, source)` where
            these differ from the model's own.

    Returns:
        Arrays by the library's names, without torch's `num_batches_tracked`.

    Raises:
        ValueError: Variables are missing, unexpected or of the wrong shape; the overrides lack fields of the source; or
            the library has no place for a variable and its value is not the library's constant. (Example: the
            Inceptions of Keras have no BatchNorm scale.) All are listed.
        TypeError: The model has no such field.
    """
    layout = layout_of(name, source)
    require_fields(name, layout.fields, overrides, f"{source}'s {name}")
    model = create_model(name, **overrides)
    shapes = shapes_of(name, model, channels=channels, input_size=input_size)
    given, tensors, lost = flat(variables), {}, []
    check(f"variables do not fit {name}", given, {path: leaf.shape for path, leaf in shapes.items()})
    for slot in slots_of(layout, shapes):
        array = np.asarray(given[slot.path])
        if slot.constant is None:
            tensors[slot.name] = np.ascontiguousarray(slot.backward(array))
        elif not np.all(array == slot.constant):
            lost.append(f"{slot.path} must be {slot.constant}")
    if lost:
        raise ValueError(f"{source} cannot store some variables of {name}: {'; '.join(lost)}")
    return layout.restore(tensors) if layout.restore else tensors


def require_fields(name: str, wanted: Mapping[str, Any], overrides: Mapping[str, Any], network: str) -> None:
    """Checks that the caller's model has the definition that weights were made for.

    Weights of one definition run in a model of another one without an error and give other logits. A field is
    satisfied by the model's own value or by any override: an override is the caller's decision.

    Args:
        name: A registry name.
        wanted: The fields of the weights' network.
        overrides: The caller's fields.
        network: What the weights belong to, for the error message.

    Raises:
        ValueError: Fields are neither the model's own nor overridden; all are listed with their values.
        TypeError: The model has no such field.
    """
    own = model_fields(create_model(name))
    left = {key: value for key, value in wanted.items() if key not in overrides and own[key] != value}
    if left:
        values = ", ".join(f"{key}={value!r}" for key, value in left.items())
        given = ", ".join(f"{key}={value!r}" for key, value in overrides.items())
        raise ValueError(
            f"overrides must include {values} for {network}; got {given or 'none'}; flaxvision.weights.fields returns"
            " the fields of a source, and flaxvision.weights.load_model sets them"
        )


def labels_of(model: nn.Module) -> int:
    """Returns how many classes have names: those of a classifier, or those of a detector without the background."""
    return getattr(model, "num_labels", getattr(model, "num_classes", 0))


def layout_of(name: str, source: str) -> Layout:
    """Returns the layout of a model in a library; raises ValueError if there is none."""
    for layout in layouts():
        if layout.source == source and name in layout.models:
            return layout
    known = ", ".join(sources(name))
    if not known:
        raise ValueError(f"name must be a model with a known source; got {name!r}, which has none")
    raise ValueError(f"source must be a library that has {name} ({known}); got {source!r}")


def flat(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens variables to a dict by slash path, with the collection first."""
    return flatten_dict(dict(variables), sep="/")


def nested(leaves: Mapping[str, Any]) -> Variables:
    """Inverts `flat`."""
    return unflatten_dict(dict(leaves), sep="/")


def images_of(name: str, channels: int | None = None, input_size: Shape | None = None) -> jax.ShapeDtypeStruct:
    """Returns the shape of a batch of one image or of one feature vector."""
    info = model_info(name)
    size = tuple(input_size or info.input_size)
    if len(size) == 2:
        size = (*size, info.channels if channels is None else channels)
    return jax.ShapeDtypeStruct((1, *size), jnp.float32)


def shapes_of(
    name: str, model: nn.Module, *, channels: int | None = None, input_size: Shape | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape and dtype of every variable by slash path without computing any."""
    return _traced(model, images_of(name, channels, input_size).shape)


@functools.lru_cache(maxsize=64)
def _traced(model: nn.Module, shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    return flat(jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image))


def adapted(
    name: str, tensors: Mapping[str, Any], layout: Layout, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
    """Returns the tensors as NumPy arrays by the names that the layout looks up; `shapes` only serve error messages."""
    arrays = _named(layout, {key: np.asarray(tensor) for key, tensor in tensors.items()})
    if layout.adapt is None:
        return arrays
    try:
        return _named(layout, layout.adapt(dict(arrays)))
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        # `restore` names all tensors of the library; `adapt` stops at the first one that it misses.
        if layout.restore:
            slots = [slot for slot in slots_of(layout, shapes) if slot.constant is None]
            wanted = layout.restore({slot.name: np.zeros(slot.shape, np.float32) for slot in slots})
            known = {key: a for key, a in arrays.items() if key in wanted or not matches(key, layout.ignore)}
            check(_misfit(name, layout), known, {key: array.shape for key, array in wanted.items()})
        raise ValueError(
            f"{_misfit(name, layout)}: {type(error).__name__} {error}; got {', '.join(sorted(arrays))}"
        ) from error


def _misfit(name: str, layout: Layout) -> str:
    return f"tensors do not fit {layout.source}'s {name}"


def _named(layout: Layout, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if layout.style != "keras":
        return arrays
    names = canonical(arrays)
    if len(set(names.values())) < len(names):
        raise ValueError(f"names of tensors must differ; got {', '.join(sorted(arrays))}")
    return {names[name]: array for name, array in arrays.items()}


def filled(
    name: str, tensors: Mapping[str, np.ndarray], layout: Layout, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
    """Builds the variables of these shapes by path from the result of `adapted`; raises like `convert`."""
    slots = slots_of(layout, shapes)
    wanted = {slot.name: slot.shape for slot in slots if slot.constant is None}
    absent = [head for head in layout.head if not any(_within(path, head) for path in shapes)]
    places = tuple(f"{layout.module(head)}{'.' if layout.style == 'torch' else '/'}" for head in absent)
    # If the model has one of the tensors that a pattern matches (auxiliary heads), all of them must be there.
    ignored = [pattern for pattern in layout.ignore if not any(matches(key, (pattern,)) for key in wanted)]
    given = {
        key: tensor.shape
        for key, tensor in tensors.items()
        if key in wanted or not (matches(key, ("*num_batches_tracked", *ignored)) or key.startswith(places))
    }
    unreal = [key for key in given if key in wanted and not jnp.issubdtype(tensors[key].dtype, jnp.floating)]
    check(_misfit(name, layout), given, wanted, unreal)
    leaves = {}
    for slot in slots:
        dtype = shapes[slot.path].dtype
        if slot.constant is not None:
            leaves[slot.path] = np.full(shapes[slot.path].shape, slot.constant, dtype)
            continue
        array = slot.forward(tensors[slot.name])
        # Copied, so that the variables do not share memory with the library. Half precision is widened.
        leaves[slot.path] = np.array(array, array.dtype if array.dtype.itemsize >= 4 else np.float32, order="C")
    return leaves


def _within(path: str, module: str) -> bool:
    return f"/{path.partition('/')[2]}".startswith(f"/{module}/")


def check(what: str, given: Mapping[str, Any], wanted: Mapping[str, Shape], unreal: Iterable[str] = ()) -> None:
    """Compares names and shapes.

    Args:
        what: The beginning of the error message.
        given: Shapes, or arrays, by name.
        wanted: Shapes by name.
        unreal: Names of the tensors that are not floating point.

    Raises:
        ValueError: They differ; every name that is missing, unexpected or of the wrong shape is listed.
    """
    found = {name: tuple(getattr(value, "shape", value)) for name, value in given.items()}
    missing = [f"{name} {list(shape)}" for name, shape in wanted.items() if name not in found]
    unexpected = [f"{name} {list(shape)}" for name, shape in found.items() if name not in wanted]
    misshapen = [
        f"{name} must be {list(shape)}; got {list(found[name])}"
        for name, shape in wanted.items()
        if name in found and found[name] != tuple(shape)
    ]
    faults = {
        "missing": missing,
        "unexpected": unexpected,
        "of the wrong shape": misshapen,
        "not floating point": [*unreal],
    }
    if said := [f"{len(names)} {fault}: {', '.join(names)}" for fault, names in faults.items() if names]:
        raise ValueError(f"{what}: {'; '.join(said)}")
