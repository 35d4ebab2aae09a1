"""The published weights that `load` knows by tag. The data is in `published/`, one table per library."""

from __future__ import annotations

import dataclasses
import difflib
import functools

from flaxvision import published
from flaxvision.data.preprocessing import DetectionPreprocessing, Preprocessing
from flaxvision.registry import model_info


@dataclasses.dataclass(frozen=True)
class WeightsInfo:
    """Published weights of one model.

    Attributes:
        tag: `LIBRARY/NAME`. The library is the `source` of `convert`.
        url: The publisher's address, or `hf://OWNER/REPOSITORY/FILE` on the Hugging Face hub.
        digest: `sha256:` or `md5:`, then the digest of the file or its beginning. None if the publisher states none in
            advance; then the file is checked against what the server states.
        preprocessing: The evaluation transform of the published accuracy: a `DetectionPreprocessing` for R-CNNs; None
            for detectors whose images fill the published input of the model as far as their aspect ratio allows.
        revision: Commit on the hub; None for the newest one.
        classes: Number of outputs; for R-CNNs with the background.
        class_list: The list that `class_names` reads; empty if the classes have no known names. R-CNNs have no name for
            the background.
        top1: Published accuracy in percent on the ImageNet (2012) validation set; None if there is none.
        top5: Published top-5 accuracy in percent; None if there is none.
        box_ap: Published average precision of boxes in percent on COCO val2017; None if there is none.
        miou: Published mean IoU in percent, of the 21 classes of VOC on COCO val2017; None if there is none.
        mask_ap: Published average precision of masks in percent on COCO val2017; None if there is none.
        licence: Licence of the weights as their publisher states it (SPDX).
        recipe: Page that describes the training.
        note: Anything else that a user must know.
    """

    tag: str
    url: str
    digest: str | None
    preprocessing: Preprocessing | DetectionPreprocessing | None
    revision: str | None = None
    classes: int = 1000
    class_list: str = ""
    top1: float | None = None
    top5: float | None = None
    box_ap: float | None = None
    miou: float | None = None
    mask_ap: float | None = None
    licence: str = ""
    recipe: str = ""
    note: str = ""

    @property
    def source(self) -> str:
        """The library that named the tensors."""
        return self.tag.partition("/")[0]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes in the order of the outputs; None if they have no known names."""
        return published.class_names(self.class_list) if self.class_list else None


def tags(name: str) -> tuple[str, ...]:
    """Lists the tags of a model's published weights.

    Args:
        name: A registry name.

    Returns:
        Tags that `load(name, tag)` accepts. The first one gives the default preprocessing.

    Raises:
        ValueError: There is no such model.
    """
    return model_info(name).weights


def tag_of(name: str, tag: str) -> WeightsInfo:
    """Describes published weights.

    Args:
        name: A registry name.
        tag: One of `tags(name)`.

    Returns:
        The `WeightsInfo` of the tag.

    Raises:
        ValueError: There is no such model, or it has no such tag; the nearest tags are given.
    """
    known = tags(name)
    if tag not in known:
        near = difflib.get_close_matches(str(tag), known, n=3, cutoff=0.5) or known
        if not near:
            raise ValueError(f"weights must be a path, because {name} has no tags; got {str(tag)!r}")
        raise ValueError(f"weights must be a path or a tag of {name} ({', '.join(near)}); got {str(tag)!r}")
    return _info(name, tag)


@functools.cache
def _info(name: str, tag: str) -> WeightsInfo:
    entry = dict(published.table()[name][tag])
    preprocessing = None
    if (values := entry.pop("preprocessing", None)) is not None:
        preprocessing = (DetectionPreprocessing if "min_size" in values else Preprocessing)(**values)
    entry["class_list"] = entry.pop("class_names", "")
    return WeightsInfo(tag=tag, digest=entry.pop("digest", None), preprocessing=preprocessing, **entry)
