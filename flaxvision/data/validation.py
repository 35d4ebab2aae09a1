"""Checks data sources before training: a clear error instead of a failure inside a compiled step."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from flaxvision.data.arrays import ArraySource, Source

Task = Literal["classification", "multilabel", "regression", "detection", "segmentation"]

_CHUNK = 1024
_SAMPLES = 64


def validate(
    source: Source,
    *,
    task: Task = "classification",
    channels: int | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    verify: bool = True,
) -> None:
    """Checks that a source can be trained on.

    Every example must hold `image` [H, W, C], and the targets of the task:

    * `classification`: `label`, an integer in [0, K).
    * `multilabel`: `label` [K], zeros and ones.
    * `regression`: `label`, a finite number or a vector [D] with the same D in every example.
    * `segmentation`: `label` [H, W], integers in [0, K), or 255 where the class is unknown. Optionally `weight` [H, W],
      finite floats that are not negative.
    * `detection`: `boxes` [M, 4], xyxy within the image with x1 < x2 and y1 < y2, `labels` [M] in [0, K) and `valid`
      [M], zeros and ones. Rows with `valid` 0 are padding and may hold anything. Optionally `crowd` and `difficult`
      [M], zeros and ones; `masks` [M, h, w], zeros and ones with at least one 1; and `size` [2], the height and width
      of the part of the image that holds the boxes.

    An `ArraySource` is checked completely. For other sources, this function checks up to 64 evenly spaced examples. It
    also checks all class indices for classification if the source has an attribute `label`, and all files if the source
    has a method `verify`.

    Args:
        source: The source.
        task: The task that the source is for.
        channels: Number of channels of every image; None for any.
        num_classes: K; None for the number of classes of the source.
        image_size: Height and width of every image, in pixels; None for any.
        verify: Whether to call the source's `verify`. Decoding ImageNet once takes an hour or more. With several
            processes, all of them must call it.

    Raises:
        ValueError: The source is empty, an image or a target is not as described, a pixel is not finite, or a file
            cannot be decoded. The message describes the first fault.
        OSError: The file system fails. The files may be valid.
    """
    if task not in _TARGETS:
        raise ValueError(f"task must be one of {', '.join(_TARGETS)}; got {task!r}")
    if len(source) == 0:
        raise ValueError(f"source must hold at least one example; got {source.name!r} with none")
    num_classes = num_classes or len(source.classes)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if isinstance(source, ArraySource):
        batch = {"image": source.image, "label": source.label}
        _check_keys(batch, source.name, task)
        if len(source.label) != len(source):
            raise ValueError(
                f"label must have one row for each of the {len(source)} images of {source.name!r}; got shape "
                f"{list(source.label.shape)}"
            )
        _check_images(source.image, source.name, channels, size)
        _TARGETS[task](batch, source.name, num_classes)
        return
    labels = getattr(source, "label", None)
    if labels is not None and task == "classification":
        _TARGETS[task]({"label": np.asarray(labels)}, source.name, num_classes)
    verify_all = getattr(source, "verify", None)
    if verify and verify_all is not None:
        verify_all()
    shapes: dict[str, tuple[int, ...]] = {}
    for index in np.unique(np.linspace(0, len(source) - 1, _SAMPLES).astype(int)):
        where = f"{source.name}[{index}]"
        example = {k: np.asarray(v)[None] for k, v in source[int(index)].items()}
        _check_keys(example, where, task)
        _check_images(example["image"], where, channels, size)
        _TARGETS[task](example, where, num_classes)
        if task == "regression" and shapes.setdefault("label", example["label"].shape) != example["label"].shape:
            raise ValueError(
                f"label must have shape {list(shapes['label'][1:])} as in the first example; got "
                f"{list(example['label'].shape[1:])} in {where!r}"
            )


def _check_keys(example: Mapping[str, np.ndarray], name: str, task: Task) -> None:
    for key in ("image", *_KEYS.get(task, ("label",))):
        if key not in example:
            raise ValueError(f"an example must hold {key!r} for {task}; got {sorted(example)} in {name!r}")


def _check_images(image: np.ndarray, name: str, channels: int | None, size: tuple[int, int] | None) -> None:
    if image.ndim != 4:
        raise ValueError(f"image must be [H, W, C]; got shape {list(image.shape[1:])} in {name!r}")
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"image must be uint8 or floating point; got {image.dtype} in {name!r}")
    if 0 in image.shape:
        raise ValueError(f"image must not be empty; got shape {list(image.shape[1:])} in {name!r}")
    if channels is not None and image.shape[3] != channels:
        raise ValueError(f"image must have {channels} channels; got {image.shape[3]} channels in {name!r}")
    if size is not None and image.shape[1:3] != tuple(size):
        received = "x".join(map(str, image.shape[1:3]))
        raise ValueError(f"image must have {size[0]}x{size[1]} pixels; got {received} in {name!r}")
    if np.issubdtype(image.dtype, np.floating):
        if image.min() >= 0 and image.max() > 2:  # standardized pixels have negative values too
            raise ValueError(
                f"image must have floats in [0, 1] or uint8 in [0, 255]; got floats from {image.min():g} to "
                f"{image.max():g} in {name!r}"
            )
        _check_finite("image", image, name)


def _check_finite(key: str, values: np.ndarray, name: str) -> None:
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK]
        finite = np.isfinite(chunk).reshape(len(chunk), -1).all(axis=1)
        if not finite.all():
            at = int(np.argmin(finite))
            value = np.ravel(chunk[at])[~np.isfinite(np.ravel(chunk[at]))][0]
            raise ValueError(f"{key} must be finite; got {value} in {name!r} at index {start + at}")


def _check_range(key: str, values: np.ndarray, name: str, num_classes: int, ignored: int | None = None) -> None:
    """Checks class indices with any number of dimensions."""
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{key} must be integer class indices; got {values.dtype} in {name!r}")
    wrong = (values < 0) | (values >= num_classes)
    if ignored is not None:
        wrong &= values != ignored
    if wrong.any():
        at = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        also = "" if ignored is None else f" or be {ignored}"
        raise ValueError(
            f"{key} must lie between 0 and {num_classes - 1} ({num_classes} classes){also}; got {values[at]} in "
            f"{name!r} at index {at[0]}"
        )


def _check_zeros_and_ones(key: str, values: np.ndarray, name: str) -> None:
    wrong = (values != 0) & (values != 1)
    if wrong.any():
        at = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        raise ValueError(f"{key} must be 0 or 1; got {values[at]} in {name!r} at index {at[0]}")


def _check_classification(batch: Mapping[str, np.ndarray], name: str, num_classes: int) -> None:
    label = batch["label"]
    if label.ndim != 1:
        raise ValueError(f"label must be one integer class index; got shape {list(label.shape[1:])} in {name!r}")
    _check_range("label", label, name, num_classes)


def _check_multilabel(batch: Mapping[str, np.ndarray], name: str, num_classes: int) -> None:
    label = batch["label"]
    if label.shape[1:] != (num_classes,):
        raise ValueError(f"label must have shape [{num_classes}]; got {list(label.shape[1:])} in {name!r}")
    _check_zeros_and_ones("label", label, name)


def _check_regression(batch: Mapping[str, np.ndarray], name: str, num_classes: int) -> None:
    label = batch["label"]
    if label.ndim > 2 or not (np.issubdtype(label.dtype, np.number) or label.dtype == bool):
        raise ValueError(
            f"label must be a number or a vector [D]; got {label.dtype} of shape {list(label.shape[1:])} in {name!r}"
        )
    _check_finite("label", label, name)


def _check_segmentation(batch: Mapping[str, np.ndarray], name: str, num_classes: int) -> None:
    label, size = batch["label"], batch["image"].shape[1:3]
    if label.shape[1:] != size:
        raise ValueError(f"label must have the image's size {list(size)}; got {list(label.shape[1:])} in {name!r}")
    _check_range("label", label, name, num_classes, ignored=255)
    if "weight" not in batch:
        return
    weight = batch["weight"]
    if weight.shape[1:] != size:
        raise ValueError(f"weight must have the image's size {list(size)}; got {list(weight.shape[1:])} in {name!r}")
    if not np.issubdtype(weight.dtype, np.floating):
        raise ValueError(f"weight must be floating point; got {weight.dtype} in {name!r}")
    _check_finite("weight", weight, name)
    if (weight < 0).any():
        raise ValueError(f"weight must not be negative; got {weight[weight < 0][0]} in {name!r}")


def _check_detection(batch: Mapping[str, np.ndarray], name: str, num_classes: int) -> None:
    (height, width), boxes = batch["image"].shape[1:3], batch["boxes"]
    if "size" in batch:
        size = batch["size"][0]
        if size.shape != (2,) or not (1 <= size[0] <= height and 1 <= size[1] <= width):
            raise ValueError(
                f"size must be a height and a width of at most {height}x{width}; got {size.tolist()} in {name!r}"
            )
        height, width = size.tolist()
    if boxes.ndim != 3 or boxes.shape[2] != 4:
        raise ValueError(f"boxes must be [M, 4]; got shape {list(boxes.shape[1:])} in {name!r}")
    for key in ("labels", "valid", "crowd", "difficult"):
        if key in batch and batch[key].shape != boxes.shape[:2]:
            raise ValueError(
                f"{key} must have one entry for each of the {boxes.shape[1]} boxes; got shape "
                f"{list(batch[key].shape[1:])} in {name!r}"
            )
    for key in ("valid", "crowd", "difficult"):
        if key in batch:
            _check_zeros_and_ones(key, batch[key], name)
    real = batch["valid"].astype(bool)
    _check_range("labels", np.where(real, batch["labels"], batch["labels"].dtype.type(0)), name, num_classes)
    for box in boxes[real]:
        x1, y1, x2, y2 = box
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):  # also for NaN
            raise ValueError(
                f"boxes must be xyxy with 0 <= x1 < x2 <= {width} and 0 <= y1 < y2 <= {height}; got {box.tolist()} in "
                f"{name!r}"
            )
    if "masks" in batch:
        _check_masks(batch["masks"], real, name)


def _check_masks(masks: np.ndarray, real: np.ndarray, name: str) -> None:
    if masks.ndim != 4 or masks.shape[:2] != real.shape:
        raise ValueError(
            f"masks must be [M, h, w] with one for each of the {real.shape[1]} boxes; got shape "
            f"{list(masks.shape[1:])} in {name!r}"
        )
    _check_zeros_and_ones("masks", masks, name)
    empty = real & ~masks.astype(bool).any(axis=(2, 3))
    if empty.any():
        raise ValueError(
            f"masks must have at least one pixel of each object; got none for object {int(np.argmax(empty[0]))} in "
            f"{name!r}"
        )


_KEYS = {"detection": ("boxes", "labels", "valid")}
_TARGETS: dict[str, Callable[[Mapping[str, Any], str, int], None]] = {
    "classification": _check_classification,
    "multilabel": _check_multilabel,
    "regression": _check_regression,
    "detection": _check_detection,
    "segmentation": _check_segmentation,
}
