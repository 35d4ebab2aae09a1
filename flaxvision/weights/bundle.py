"""Bundles: variables in a `.safetensors` file, described by a JSON card beside it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from flaxvision import atomic
from flaxvision.manifest import json_value
from flaxvision.registry import create_model
from flaxvision.weights.convert import Variables, check, flat, labels_of, nested, shapes_of
from flaxvision.weights.files import read, sha256_of

FORMAT = 1


def save(
    path: str | os.PathLike[str],
    variables: Mapping[str, Any],
    *,
    name: str,
    channels: int | None = None,
    input_size: tuple[int, ...] | None = None,
    class_names: Sequence[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Writes a bundle: `PATH.safetensors` with the variables by slash path, and its card `PATH.json`.

    Both files are written atomically. `load_model(name, path)` reads a bundle, and so does any safetensors reader.

    Args:
        path: The `.safetensors` file.
        variables: Variables of `create_model(name, **overrides)`.
        name: A registry name.
        channels: Number of image channels; None for the model's own.
        input_size: Height and width of the images, for models that flatten; None for the model's own.
        class_names: One name per class in the order of the outputs; None if the classes have no names.
        metadata: Further entries of the card: preprocessing, accuracy, licence, ...
        **overrides: Fields of the module.

    Returns:
        The path of the card.

    Raises:
        ValueError: `path` has another ending, the variables do not fit the model (all that do not are listed), or the
            number of class names is not the number of classes.
        TypeError: The model has no such field, a class name is not a string, or JSON cannot hold a value of the
            overrides or the metadata.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors; got {path}")
    from safetensors.numpy import save_file

    model = create_model(name, **overrides)
    shapes = shapes_of(name, model, channels=channels, input_size=input_size)
    leaves = {key: np.ascontiguousarray(leaf) for key, leaf in flat(variables).items()}
    check(f"variables do not fit {name}", leaves, {key: leaf.shape for key, leaf in shapes.items()})
    if class_names is not None:
        class_names = list(class_names)
        if odd := [one for one in class_names if not isinstance(one, str)]:
            raise TypeError(f"class_names must be strings; got {odd[0]!r}")
        if len(class_names) != (classes := labels_of(model)):
            raise ValueError(f"class_names must have one name for each of {classes} classes; got {len(class_names)}")
    from flaxvision import __version__

    card = {
        "format": FORMAT,
        "model": name,
        "overrides": {key: _dtype_name(value) if "dtype" in key else value for key, value in overrides.items()},
        "channels": channels,
        "input_size": input_size,
        "class_names": class_names,
        "parameters": sum(leaf.size for key, leaf in leaves.items() if key.startswith("params/")),
        "versions": {
            "flaxvision": __version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "metadata": dict(metadata or {}),
    }
    card = json_value(card, "card")
    # Both files are complete on the disk before the first one is moved to its place. A crash between the two moves
    # leaves a card whose hash does not match, so reading fails safely.
    with atomic.replacing(card_of(path)) as card_partial, atomic.replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # safetensors restricts the file to its owner
        save_file(leaves, partial, metadata={"format": "flaxvision", "model": name})
        partial.chmod(mode)
        card["sha256"] = sha256_of(partial)
        card_partial.write_text(json.dumps(card, indent=2) + "\n")
    return card_of(path)


def _dtype_name(value: Any) -> str | None:
    return None if value is None else jnp.dtype(value).name


def card_of(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a bundle's card."""
    return Path(path).with_suffix(".json")


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Tells whether `save` wrote this file. A damaged safetensors file counts as a bundle if it has a card."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("format") == "flaxvision"
    except SafetensorError:
        return card_of(path).is_file()
    except (OSError, ValueError):
        return False


# Fields that models had once. They changed no parameters, so bundles that name them are read without them.
_REMOVED = frozenset({"taps"})


def read_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the card of a bundle.

    Args:
        path: The `.safetensors` file.

    Returns:
        `model`, `overrides` (as `create_model` accepts them), `channels`, `input_size`, `class_names` (None if the
        classes have no names), `parameters`, `sha256`, `versions` and `metadata`.

    Raises:
        ValueError: The card is missing, damaged or of another format.
    """
    card_path = card_of(path)
    try:
        card = json.loads(card_path.read_text())
        stored = {key: card[key] for key in ("format", "model", "overrides", "channels", "input_size", "sha256")}
        overrides = {
            key: jnp.dtype(value) if "dtype" in key and value is not None else _hashable(value)
            for key, value in stored["overrides"].items()
            if key not in _REMOVED
        }
        names = card.get("class_names")  # older bundles have none
        if names is not None and not (isinstance(names, list) and all(isinstance(one, str) for one in names)):
            raise TypeError("class_names is not a list of strings")
    except FileNotFoundError as error:
        raise ValueError(f"{path} has no card: {card_path} is missing; copy both files") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{card_path} is damaged: {type(error).__name__} {error}; copy the bundle again") from error
    if stored["format"] != FORMAT:
        raise ValueError(f"format of {card_path} must be {FORMAT}; got {stored['format']!r}")
    own = {"overrides": overrides, "input_size": _hashable(stored["input_size"]), "class_names": _hashable(names)}
    return {"metadata": {}} | card | own


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def read_bundle(path: str | os.PathLike[str]) -> tuple[Variables, dict[str, Any]]:
    """Reads a bundle.

    Args:
        path: The `.safetensors` file.

    Returns:
        The variables, a nested dict of NumPy arrays, and the card as `read_card` returns it.

    Raises:
        ValueError: The tensors or the card are damaged, they do not belong together, or they do not fit the model.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be an existing file; got {path}")
    card = read_card(path)
    if (found := sha256_of(path)) != card["sha256"]:
        raise ValueError(f"{path} or its card is damaged: its sha256 is {found}, not {card['sha256']}; copy both")
    leaves = read(path)
    try:
        model = create_model(card["model"], **card["overrides"])
        shapes = shapes_of(card["model"], model, channels=card["channels"], input_size=card["input_size"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{card_of(path)} describes a model that this version does not have: {error}") from error
    check(f"{path} does not fit {card['model']}", leaves, {key: leaf.shape for key, leaf in shapes.items()})
    return nested(leaves), card
