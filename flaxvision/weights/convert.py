"""Other libraries' tensors to flaxvision's variables and back: strict, by name, without their libraries."""

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

from flaxvision.registry import create_model, model_info
from flaxvision.weights.layout import Layout
from flaxvision.weights.names import layouts
from flaxvision.weights.slots import Shape, canonical, matches, slots_of

Variables = dict[str, Any]


def fields(name: str, source: str) -> dict[str, Any]:
    """The fields that make a model the network of another library, but for dropout, which is the training's choice.

    Args:
        name: A registry name.
        source: The library: "torchvision", "timm", "keras", ...

    Returns:
        Fields of our module, as `create_model` takes them.

    Raises:
        ValueError: There is no such model, or the library's names for it are not known.
    """
    return dict(layout_of(name, source).fields)


def sources(name: str) -> list[str]:
    """The libraries whose tensors of a model `convert` and `export` know.

    Raises:
        ValueError: There is no such model.
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
    """Turns a library's tensors into the variables of one of our models.

    Args:
        name: A registry name.
        tensors: Arrays by the library's names: a torch `state_dict`, or the weights of a Keras model by their paths.
        source: The library; its `fields(name, source)` are set, so that the variables belong to
            `create_model(name, **fields(name, source), **overrides)`.
        channels: Of the images; None for the model's own.
        input_size: Height and width of the images, for models that flatten; None for the model's own.
        **overrides: Fields of our module, such as `num_classes`. With `num_classes=0` the tensors of the head are left.

    Returns:
        A nested dict of NumPy arrays; half precision comes as float32.

    Raises:
        ValueError: Tensors are missing, superfluous, of another shape or not of floating point; all of them are named.
            Or there is no such model or source, or `channels` is not positive.
        TypeError: The model has no such field, or `channels` is no integer.
    """
    layout = layout_of(name, source)
    model = create_model(name, **{**layout.fields, **overrides})
    if channels is not None and operator.index(channels) < 1:
        raise ValueError(f"channels must be 1 or more, got {channels}")
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
    """Turns the variables of one of our models into a library's tensors: the inverse of `convert`.

    Args:
        name: A registry name.
        variables: As `convert`, `load` or `init` return them.
        source: The library.
        channels: Of the images; None for the model's own.
        input_size: Height and width of the images, for models that flatten; None for the model's own.
        **overrides: Fields that the variables were made with.

    Returns:
        Arrays by the library's names, without torch's `num_batches_tracked`.

    Raises:
        ValueError: Variables are missing, superfluous or of another shape; or the library lacks one of them, as Keras'
            Inceptions lack the scale of BatchNorm, and its value is not the library's. All are named.
        TypeError: The model has no such field.
    """
    layout = layout_of(name, source)
    model = create_model(name, **{**layout.fields, **overrides})
    shapes = shapes_of(name, model, channels=channels, input_size=input_size)
    check(f"the variables do not fit {name}", flat(variables), {path: leaf.shape for path, leaf in shapes.items()})
    given, tensors, lost = flat(variables), {}, []
    for slot in slots_of(layout, shapes):
        array = np.asarray(given[slot.path])
        if slot.constant is None:
            tensors[slot.name] = np.ascontiguousarray(slot.backward(array))
        elif not np.all(array == slot.constant):
            lost.append(f"{slot.path} is not {slot.constant}")
    if lost:
        raise ValueError(f"{source} has no place for some variables of {name}: {'; '.join(lost)}")
    return layout.restore(tensors) if layout.restore else tensors


def layout_of(name: str, source: str) -> Layout:
    """The layout of a model in a library; ValueError where it is not known."""
    for layout in layouts():
        if layout.source == source and name in layout.models:
            return layout
    raise ValueError(f"source={source!r} has no {name}; its tensors are known of {', '.join(sources(name)) or 'none'}")


def flat(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Nested variables by their slash paths, the collection included."""
    return flatten_dict(dict(variables), sep="/")


def nested(leaves: Mapping[str, Any]) -> Variables:
    """Undoes `flat`."""
    return unflatten_dict(dict(leaves), sep="/")


def images_of(name: str, channels: int | None = None, input_size: Shape | None = None) -> jax.ShapeDtypeStruct:
    """The shape of a batch of one image, or of one feature vector."""
    info = model_info(name)
    size = tuple(input_size or info.input_size)
    if len(size) == 2:
        size = (*size, info.channels if channels is None else channels)
    return jax.ShapeDtypeStruct((1, *size), jnp.float32)


def shapes_of(
    name: str, model: nn.Module, *, channels: int | None = None, input_size: Shape | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every variable by its slash path, computing none."""
    return _traced(model, images_of(name, channels, input_size).shape)


@functools.lru_cache(maxsize=64)
def _traced(model: nn.Module, shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    return flat(jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image))


def adapted(
    name: str, tensors: Mapping[str, Any], layout: Layout, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
    """The tensors as NumPy arrays under the names that the layout looks up; the shapes are for the error alone."""
    arrays = _named(layout, {key: np.asarray(tensor) for key, tensor in tensors.items()})
    if layout.adapt is None:
        return arrays
    try:
        return _named(layout, layout.adapt(dict(arrays)))
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        if layout.restore:  # which knows all tensors of the library, where `adapt` names the first that it stumbles on
            slots = [slot for slot in slots_of(layout, shapes) if slot.constant is None]
            wanted = layout.restore({slot.name: np.zeros(slot.shape, np.float32) for slot in slots})
            known = {key: a for key, a in arrays.items() if key in wanted or not matches(key, layout.ignore)}
            check(_misfit(name, layout), known, {key: array.shape for key, array in wanted.items()})
        raise ValueError(
            f"{_misfit(name, layout)}: {type(error).__name__} {error}; they are {', '.join(sorted(arrays))}"
        ) from error


def _misfit(name: str, layout: Layout) -> str:
    return f"the tensors do not fit {layout.source}'s {name}"


def _named(layout: Layout, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if layout.style != "keras":
        return arrays
    names = canonical(arrays)
    if len(set(names.values())) < len(names):
        raise ValueError(f"two tensors have the same name among {', '.join(sorted(arrays))}")
    return {names[name]: array for name, array in arrays.items()}


def filled(
    name: str, tensors: Mapping[str, np.ndarray], layout: Layout, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
    """The variables of these shapes by path, from tensors that `adapted` has seen; raises as `convert`."""
    slots = slots_of(layout, shapes)
    wanted = {slot.name: slot.shape for slot in slots if slot.constant is None}
    absent = [head for head in layout.head if not any(_within(path, head) for path in shapes)]
    places = tuple(f"{layout.module(head)}{'.' if layout.style == 'torch' else '/'}" for head in absent)
    # Where the model has one of the tensors that a pattern stands for, as it has with auxiliary heads, all count.
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
        # A copy, so that the variables neither keep the library's memory nor change with it; halves are widened.
        leaves[slot.path] = np.array(array, array.dtype if array.dtype.itemsize >= 4 else np.float32, order="C")
    return leaves


def _within(path: str, module: str) -> bool:
    return f"/{path.partition('/')[2]}".startswith(f"/{module}/")


def check(what: str, given: Mapping[str, Any], wanted: Mapping[str, Shape], unreal: Iterable[str] = ()) -> None:
    """Compares names and shapes.

    Args:
        what: The beginning of the error.
        given: Shapes, or arrays, by name.
        wanted: Shapes by name.
        unreal: Names of what is not of floating point.

    Raises:
        ValueError: They differ; every name that is missing, superfluous or of another shape is in it.
    """
    found = {name: tuple(getattr(value, "shape", value)) for name, value in given.items()}
    missing = [f"{name} {list(shape)}" for name, shape in wanted.items() if name not in found]
    superfluous = [f"{name} {list(shape)}" for name, shape in found.items() if name not in wanted]
    misshapen = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != tuple(shape)
    ]
    faults = {"missing": missing, "superfluous": superfluous, "of another shape": misshapen, "not of floats": [*unreal]}
    if said := [f"{len(names)} {fault}: {', '.join(names)}" for fault, names in faults.items() if names]:
        raise ValueError(f"{what}; {'; '.join(said)}")
