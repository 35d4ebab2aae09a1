"""Which evaluation transform belongs to which weights."""

from __future__ import annotations

import os
from typing import Any

from flaxvision.data.preprocessing import DetectionPreprocessing, Preprocessing
from flaxvision.registry import model_info
from flaxvision.weights.bundle import is_bundle, read_card
from flaxvision.weights.convert import layout_of, sources
from flaxvision.weights.tags import tag_of, tags

Transform = Preprocessing | DetectionPreprocessing


def preprocessing_for(name: str, weights: str | os.PathLike[str] | None = None) -> Any:
    """Returns the evaluation transform of published weights or of a bundle.

    Where the weights do not state a transform, the result is a guess from `model_info`: its input size, mean and
    standard deviation (for a bundle, the bundle's own input size), with the usual margin. The shorter side becomes
    1 / 0.875 of the crop; up to 64 pixels it becomes the crop itself.

    Args:
        name: A registry name.
        weights: One of

            * a tag of `model_info(name).weights`, such as `"torchvision/IMAGENET1K_V1"`;
            * a source, such as `"akamaster"` (CIFAR ResNets), `"deep_compression"` (SqueezeNet), `"coral"`
              (MobileNetV2), or a library whose tags for the model agree on a transform;
            * the path of a bundle, whose card may hold a transform;
            * None, for the first tag.

    Returns:
        A callable that maps a PIL image or a uint8 array to float32 `[H, W, C]`; for weights of detectors that state a
        `DetectionPreprocessing`, to that and the size of the valid part.

    Raises:
        ValueError: There is no such model, tag, source or bundle, or the model does not take images.
    """
    if weights is None and tags(name):
        weights = tags(name)[0]
    known = None if weights is None else known_preprocessing(name, weights)
    return usual_preprocessing(name) if known is None else known


def known_preprocessing(name: str, weights: str | os.PathLike[str]) -> Transform | None:
    """Returns the transform that a tag, a source or a bundle states; None if it states none.

    Args:
        name: A registry name.
        weights: A tag, a source or the path of a bundle, as for `preprocessing_for`.

    Returns:
        The transform, or None.

    Raises:
        ValueError: There is no such model, tag, source or bundle, or the card holds an invalid transform.
    """
    if weights in tags(name):
        return tag_of(name, str(weights)).preprocessing
    if weights in sources(name):
        if (own := layout_of(name, str(weights)).preprocessing) is not None:
            return own
        found = {tag_of(name, tag).preprocessing for tag in tags(name) if tag.startswith(f"{weights}/")}
        return found.pop() if len(found) == 1 else None
    if is_bundle(weights):
        card = read_card(weights)
        if (stored := card["metadata"].get("preprocessing")) is not None:
            return _from_card(weights, stored)
        own_input = card["input_size"] or card["channels"]
        return usual_preprocessing(name, card["input_size"], card["channels"]) if own_input else None
    return tag_of(name, str(weights)).preprocessing  # raises the error that lists the tags


def usual_preprocessing(
    name: str, input_size: tuple[int, ...] | None = None, channels: int | None = None
) -> Preprocessing:
    """Returns the transform that `preprocessing_for` falls back on.

    Args:
        name: A registry name.
        input_size: Height and width of the network's input; None for the published input.
        channels: Number of image channels; None for the published number.

    Returns:
        The transform.

    Raises:
        ValueError: There is no such model, or it takes feature vectors.
    """
    info = model_info(name)
    size = tuple(input_size or info.input_size)
    if len(size) != 2:
        raise ValueError(
            f"name must be a model that takes images; got {name!r}, which takes vectors of {size[0]} numbers"
        )
    side = min(size)
    grey = (channels or info.channels) == 1
    return Preprocessing(
        crop=size if size[0] != size[1] else side,
        resize=side if side <= 64 else round(side / 0.875),
        mean=info.mean[:1] if grey else info.mean,
        std=info.std[:1] if grey else info.std,
        order="L" if grey else "RGB",
    )


def _from_card(path: str | os.PathLike[str], stored: dict[str, Any]) -> Transform:
    try:
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()}
        return (DetectionPreprocessing if "min_size" in values else Preprocessing)(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"the card of {path} holds an invalid evaluation transform: {error}; convert the weights again"
        ) from error
