"""The published weights that `load` knows by a tag: where they lie, what they expect, how well they do."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from typing import Any

from flaxvision.data.preprocessing import Preprocessing, usual_preprocessing
from flaxvision.registry import model_info
from flaxvision.weights.bundle import is_bundle, read_card
from flaxvision.weights.convert import sources


@dataclasses.dataclass(frozen=True)
class WeightsInfo:
    """Published weights of one model.

    Attributes:
        tag: `LIBRARY/NAME`; the library is the `source` of `convert`.
        url: The publisher's address, or `hf://OWNER/REPOSITORY/FILE` on the Hugging Face hub.
        digest: `sha256:` or `md5:` and the file's digest or, where the publisher gives just that, its beginning. None
            where the publisher gives none in advance: then what the server says of the file is checked.
        revision: The hub's commit; None for the repository's newest.
        preprocessing: The evaluation transform of the published accuracy.
        classes: Outputs.
        top1: Published accuracy in percent on the validation images of ImageNet (2012); None where there is none.
        top5: Likewise.
        licence: Of the weights, as their publisher states it (SPDX).
        recipe: Where the training is described.
        note: What else to know.
    """

    tag: str
    url: str
    digest: str | None
    preprocessing: Preprocessing
    revision: str | None = None
    classes: int = 1000
    top1: float | None = None
    top5: float | None = None
    licence: str = ""
    recipe: str = ""
    note: str = ""

    @property
    def source(self) -> str:
        """The library whose names the tensors have."""
        return self.tag.partition("/")[0]


# Files that are published in a layout of their own, converted by the user: their evaluation transforms, by source.
_BY_SOURCE = {
    ("squeezenet1_0", "deep_compression"): Preprocessing(
        227, 256, mean=(104.0, 117.0, 123.0), std=(1.0, 1.0, 1.0), divisor=1.0, order="BGR"
    ),
    ("mobilenet_v2", "coral"): Preprocessing(
        224, 256, mean=(127.0, 127.0, 127.0), std=(1 / 0.0078431377,) * 3, divisor=1.0
    ),
} | {(f"resnet{depth}_cifar", "akamaster"): Preprocessing(32, None) for depth in (20, 32, 44, 56, 110)}


def preprocessing_of(name: str, weights: str) -> Preprocessing | None:
    """The evaluation transform of a tag, a source or a bundle; None where these do not tell it; raises as `tag_of`."""
    known = _BY_SOURCE.get((model_info(name).name, weights))
    if known or weights in tags(name):
        return known or tag_of(name, weights).preprocessing
    if weights in sources(name):
        found = [tag_of(name, tag).preprocessing for tag in tags(name) if tag.startswith(f"{weights}/")]
        return found[0] if found and all(one == found[0] for one in found) else None
    if is_bundle(weights):
        card = read_card(weights)
        if (fields := card["metadata"].get("preprocessing")) is not None:
            return _stored(weights, fields)
        own = card["input_size"] or card["channels"]
        return usual_preprocessing(name, card["input_size"], card["channels"]) if own else None
    return tag_of(name, weights).preprocessing  # which says what there is


def _stored(path: str, fields: dict[str, Any]) -> Preprocessing:
    try:
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        return Preprocessing(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the card of {path} holds no evaluation transform: {error}") from error


def tags(name: str) -> tuple[str, ...]:
    """The tags of a model's published weights.

    Args:
        name: A registry name.

    Returns:
        Tags, as `load(name, tag)` takes them.

    Raises:
        ValueError: There is no such model.
    """
    return model_info(name).weights


def tag_of(name: str, tag: str) -> WeightsInfo:
    """What is known of published weights.

    Args:
        name: A registry name.
        tag: One of `tags(name)`.

    Returns:
        Its `WeightsInfo`.

    Raises:
        ValueError: There is no such model, or it has no such tag; the nearest are given.
    """
    known = tags(name)
    if tag not in known:
        near = difflib.get_close_matches(str(tag), known, n=3, cutoff=0.5) or known
        raise ValueError(f"{name} has no weights {tag!r}; there are {', '.join(near) or 'none published for it'}")
    return _table()[name][tag]


@functools.cache
def _table() -> dict[str, dict[str, WeightsInfo]]:
    from flaxvision.weights import tags_keras, tags_timm, tags_torchvision

    table: dict[str, dict[str, WeightsInfo]] = {}
    for library in (tags_torchvision, tags_timm, tags_keras):
        for name, info in library.entries():
            table.setdefault(name, {})[info.tag] = info
    return table
