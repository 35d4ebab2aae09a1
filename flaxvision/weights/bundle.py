"""flaxvision's own files: one `.safetensors` of variables and a JSON card beside it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from flaxvision import atomic
from flaxvision.manifest import plain
from flaxvision.registry import create_model
from flaxvision.weights.convert import Variables, check, flat, nested, shapes_of
from flaxvision.weights.files import read, sha256_of

FORMAT = 1


def save(
    path: str | os.PathLike[str],
    variables: Mapping[str, Any],
    *,
    name: str,
    channels: int | None = None,
    input_size: tuple[int, int] | None = None,
    metadata: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Writes a bundle: `PATH.safetensors` with the variables under their slash paths, and its card, `PATH.json`.

    Each file appears whole or not at all. `load(name, path)` reads a bundle back, and so does any safetensors reader.

    Args:
        path: Of the `.safetensors` file.
        variables: Of `create_model(name, **overrides)`.
        name: A registry name.
        channels: Of the images; None for the model's own.
        input_size: Height and width of the images, for models that flatten; None for the model's own.
        metadata: What else to write into the card: preprocessing, accuracy, licence, ...
        **overrides: Fields of the module.

    Returns:
        The path of the card.

    Raises:
        ValueError: `path` ends otherwise, or the variables do not fit the model; all that do not are named.
        TypeError: The model has no such field, or JSON cannot hold its value or the metadata.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a bundle's path must end in .safetensors, got {path}")
    from safetensors.numpy import save_file

    shapes = shapes_of(name, create_model(name, **overrides), channels=channels, input_size=input_size)
    leaves = {key: np.ascontiguousarray(leaf) for key, leaf in flat(variables).items()}
    check(f"the variables do not fit {name}", leaves, {key: leaf.shape for key, leaf in shapes.items()})
    from flaxvision import __version__

    card = {
        "format": FORMAT,
        "model": name,
        "overrides": {key: _dtype_name(value) if "dtype" in key else value for key, value in overrides.items()},
        "channels": channels,
        "input_size": input_size,
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
    card = plain(card, "card")
    # Both are whole on the disk before the first takes its place. Stopped between the two, the card is the old one,
    # whose sha256 is not that of the tensors: an error to read, and never another's weights.
    with atomic.replacing(card_of(path)) as card_partial, atomic.replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # safetensors makes a file that only its owner may read
        save_file(leaves, partial, metadata={"format": "flaxvision", "model": name})
        partial.chmod(mode)
        card["sha256"] = sha256_of(partial)
        card_partial.write_text(json.dumps(card, indent=2) + "\n")
    return card_of(path)


def _dtype_name(value: Any) -> str | None:
    return None if value is None else jnp.dtype(value).name


def card_of(path: str | os.PathLike[str]) -> Path:
    """Where the card of a bundle lies."""
    return Path(path).with_suffix(".json")


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Whether `save` wrote this safetensors file, as the file says or, where it is damaged, the card beside it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("format") == "flaxvision"
    except SafetensorError:
        return card_of(path).is_file()
    except (OSError, ValueError):
        return False


def read_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a bundle's card; `overrides` are as `create_model` takes them.

    Args:
        path: Of the `.safetensors` file.

    Returns:
        `model`, `overrides`, `channels`, `input_size`, `parameters`, `sha256`, `versions` and `metadata`.

    Raises:
        ValueError: The card is damaged, of another format, or missing.
    """
    card_path = card_of(path)
    try:
        card = json.loads(card_path.read_text())
        stored = {key: card[key] for key in ("format", "model", "overrides", "channels", "input_size", "sha256")}
        overrides = {
            key: jnp.dtype(value) if "dtype" in key and value is not None else _hashable(value)
            for key, value in stored["overrides"].items()
        }
    except FileNotFoundError as error:
        raise ValueError(f"{path} has no card: {card_path} is missing") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{card_path} is damaged: {type(error).__name__} {error}") from error
    if stored["format"] != FORMAT:
        raise ValueError(f"{card_path} has format {stored['format']}, this flaxvision reads {FORMAT}")
    return card | {"overrides": overrides, "input_size": _hashable(stored["input_size"])}


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def read_bundle(path: str | os.PathLike[str]) -> tuple[Variables, dict[str, Any]]:
    """Reads a bundle.

    Args:
        path: Of the `.safetensors` file.

    Returns:
        The variables, a nested dict of NumPy arrays, and the card, as `read_card` gives it.

    Raises:
        ValueError: The tensors or the card are damaged, do not belong together, or do not fit the card's model.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    card = read_card(path)
    if (found := sha256_of(path)) != card["sha256"]:
        raise ValueError(f"{path} has the sha256 {found}, its card says {card['sha256']}: one of them is damaged")
    leaves = read(path)
    try:
        model = create_model(card["model"], **card["overrides"])
        shapes = shapes_of(card["model"], model, channels=card["channels"], input_size=card["input_size"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{card_of(path)} does not describe a model of this flaxvision: {error}") from error
    check(f"{path} does not fit {card['model']}", leaves, {key: leaf.shape for key, leaf in shapes.items()})
    return nested(leaves), card
