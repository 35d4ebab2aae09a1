"""Which class names belong to which weights."""

from __future__ import annotations

import os

from flaxvision import published
from flaxvision.weights.bundle import is_bundle, read_card
from flaxvision.weights.convert import layout_of, sources
from flaxvision.weights.tags import tag_of, tags


def class_names_for(name: str, weights: str | os.PathLike[str]) -> tuple[str, ...] | None:
    """Returns the class names of published weights or of a bundle.

    Args:
        name: A registry name.
        weights: A tag, the path of a bundle, or a source. A source stands for the data set that its published weights
            were trained on: `"coral"` and `"torchvision"` for ImageNet, `"akamaster"` for CIFAR-10.

    Returns:
        One name per class in the order of the outputs, or None if the weights do not state any.

    Raises:
        ValueError: There is no such model, tag, source or bundle.
    """
    if weights in tags(name):
        return tag_of(name, str(weights)).class_names
    if weights in sources(name):
        if own := layout_of(name, str(weights)).class_list:
            return published.class_names(own)
        found = {tag_of(name, tag).class_names for tag in tags(name) if tag.startswith(f"{weights}/")}
        return found.pop() if len(found) == 1 else None
    if is_bundle(weights):
        return read_card(weights)["class_names"]
    return tag_of(name, str(weights)).class_names  # raises the error that lists the tags
