"""Reads the tables of published weights in `weights/published/`, which its README.md describes.

Both the registry and `flaxvision.weights` read these tables, so this module imports neither.
"""

from __future__ import annotations

import functools
import tomllib
from importlib import resources
from typing import Any

# One table per library. A model lists its tags in this order.
LIBRARIES = ("torchvision", "timm", "keras", "darknet")

_FOLDER = resources.files("flaxvision").joinpath("weights", "published")
_NOT_MODELS = ("defaults", "normalizations")


@functools.cache
def table() -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the entries of all tables by model and tag, with the defaults of their table filled in.

    Lists become tuples. `preprocessing` holds the fields of `flaxvision.data.Preprocessing`; it may be missing.

    Raises:
        ValueError: A table is not valid TOML, or an entry names a normalization that its table lacks.
    """
    first: dict[str, dict[str, Any]] = {}
    rest: dict[str, dict[str, Any]] = {}
    for library in LIBRARIES:
        for model, tag, entry in _entries(library):
            part = first if entry.pop("first", False) else rest
            part.setdefault(model, {})[tag] = entry
    return {model: first.get(model, {}) | rest.get(model, {}) for model in dict.fromkeys([*rest, *first])}


def _entries(library: str) -> list[tuple[str, str, dict[str, Any]]]:
    path = _FOLDER.joinpath(f"{library}.toml")
    try:
        stored = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    normalizations = stored.get("normalizations", {})
    found = []
    for model, tags in stored.items():
        if model in _NOT_MODELS:
            continue
        for name, given in tags.items():
            entry = {**stored.get("defaults", {}), **given}
            if "preprocessing" not in entry:
                found.append((model, f"{library}/{name}", entry))
                continue
            preprocessing = dict(entry["preprocessing"])
            if (chosen := preprocessing.pop("normalization", None)) is not None:
                if chosen not in normalizations:
                    raise ValueError(
                        f"normalization of {library}/{name} ({model}) must be one of"
                        f" {', '.join(normalizations) or 'none'}; got {chosen!r}"
                    )
                preprocessing |= normalizations[chosen]
            if preprocessing.get("crop") == "none":  # TOML has no null
                preprocessing["crop"] = None
            entry["preprocessing"] = {k: tuple(v) if isinstance(v, list) else v for k, v in preprocessing.items()}
            found.append((model, f"{library}/{name}", entry))
    return found


def tags(model: str) -> tuple[str, ...]:
    """Returns the tags of a model's published weights; empty if there are none."""
    return tuple(table().get(model, ()))


@functools.cache
def class_names(name: str) -> tuple[str, ...]:
    """Returns the class names in `weights/published/class_names/NAME.txt`, in the order of the outputs.

    `"imagenet1001"` stands for the names of `imagenet1k` with `background` first, `"coco80"` for those of `coco90`
    without the ids that have no category.

    Args:
        name: The name of the list.

    Returns:
        One name per class.

    Raises:
        ValueError: There is no such list.
    """
    if name == "imagenet1001":
        return ("background", *class_names("imagenet1k"))
    if name == "coco80":
        return tuple(one for one in class_names("coco90") if one != "N/A")
    path = _FOLDER.joinpath("class_names", f"{name}.txt")
    if not path.is_file():
        known = sorted(one.name.removesuffix(".txt") for one in path.parent.iterdir() if one.name.endswith(".txt"))
        raise ValueError(f"class_names must be one of {', '.join([*known, 'coco80', 'imagenet1001'])}; got {name!r}")
    return tuple(path.read_text(encoding="utf-8").splitlines())
