"""Canvases: a few fixed sizes to which images of any size are resized and padded. A model compiles once for each.

An image lies at the top left of its canvas. `size` is its height and width there. Dividing `boxes` by `scale`, which is
(y, x), gives the boxes in pixels of the original image::

    canvases = Canvases(((320, 416), (416, 320), (416, 416)))
    train = on_canvases(source, canvases)
    batches = train_batches(train, 16, seed=0)  # all images of a batch lie on canvases of one size
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from flaxvision.data.annotations import pad_objects
from flaxvision.data.arrays import Source, Subset
from flaxvision.data.workers import bounded_map


@dataclasses.dataclass(frozen=True)
class Canvases:
    """Canvas sizes, and the rule by which images are resized before they are padded.

    With `shorter`, the shorter side is resized to that length. If the longer side would then exceed `longer`, the
    longer side is resized to `longer` instead. This is the rule of Fast R-CNN. With `longer` alone, the longer side is
    resized to that length. With neither, an image is resized to fill its canvas as far as its aspect ratio allows
    (letterbox). With `resize=False`, images keep their size.

    The canvas of an image is the smallest one that holds it. With the letterbox rule, it is the canvas of which the
    image fills the largest fraction.

    Attributes:
        sizes: Height and width of each canvas in pixels.
        shorter: Length of the shorter side in pixels.
        longer: Maximum length of the longer side in pixels.
        resize: Whether images are resized.
        larger: What happens to an image that no canvas holds. "resize" shrinks it to fit the canvas of which it fills
            the largest fraction. "refuse" raises an error.
        fill: Pixel value of the padding, 0 to 255.

    Raises:
        ValueError: A number is out of range, or two canvases are equal.
    """

    sizes: tuple[tuple[int, int], ...]
    shorter: int | None = None
    longer: int | None = None
    resize: bool = True
    larger: Literal["resize", "refuse"] = "resize"
    fill: int = 0

    def __post_init__(self) -> None:
        sizes = tuple((int(height), int(width)) for height, width in self.sizes)
        if not sizes or min(map(min, sizes)) < 1 or len(set(sizes)) != len(sizes):
            raise ValueError(f"sizes must be one or more different canvases of at least 1x1; got {self.sizes}")
        object.__setattr__(self, "sizes", sizes)
        for name in ("shorter", "longer"):
            value = getattr(self, name)
            if value is not None and (value < 1 or not self.resize):
                raise ValueError(f"{name} must be at least 1, or None with resize=False; got {value}")
        if self.larger not in ("resize", "refuse"):
            raise ValueError(f"larger must be 'resize' or 'refuse'; got {self.larger!r}")
        if not 0 <= self.fill <= 255:
            raise ValueError(f"fill must be between 0 and 255; got {self.fill}")

    def choose(self, size: tuple[int, int], name: str = "the image") -> int:
        """Returns the index of the canvas for an image.

        Args:
            size: Height and width of the image.
            name: Name of the image, for the error message.

        Raises:
            ValueError: No canvas holds the image, and `larger` is "refuse".
        """
        best = max(range(len(self.sizes)), key=lambda k: (self._share(size, k), -_area(self.sizes[k])))
        if self.resize and self.shorter is None and self.longer is None:
            return best
        height, width = self._wanted(size)
        fitting = [k for k, (h, w) in enumerate(self.sizes) if height <= h and width <= w]
        if fitting:
            return min(fitting, key=lambda k: _area(self.sizes[k]))
        if self.larger == "refuse":
            raise ValueError(
                f"sizes must have a canvas for {name} of {height}x{width} pixels (larger='resize' shrinks it); got "
                f"{', '.join(f'{h}x{w}' for h, w in self.sizes)}"
            )
        return best

    def placement(self, size: tuple[int, int], canvas: int) -> tuple[int, int]:
        """Returns the height and width to which an image is resized on a canvas.

        Args:
            size: Height and width of the image.
            canvas: Index of the canvas.
        """
        height, width = self._wanted(size)
        canvas_height, canvas_width = self.sizes[canvas]
        fit = min(canvas_height / size[0], canvas_width / size[1])
        if (self.resize and self.shorter is None and self.longer is None) or (
            height > canvas_height or width > canvas_width
        ):
            return _rounded(size[0] * fit, canvas_height), _rounded(size[1] * fit, canvas_width)
        return height, width

    def place(self, example: dict[str, Any], canvas: int) -> dict[str, Any]:
        """Resizes and pads an example to a canvas.

        Args:
            example: `image` uint8 [h, w, C] and optionally `boxes` [M, 4] and `masks` [M, h, w].
            canvas: Index of the canvas.

        Returns:
            The example with `image` [H, W, C], `size` int32 [2], `scale` float32 [2] (y, x), and boxes and masks
            resized in the same way. Masks are resized by nearest neighbor.
        """
        image = np.asarray(example["image"])
        size = self.placement((image.shape[0], image.shape[1]), canvas)
        scale = np.array([size[0] / image.shape[0], size[1] / image.shape[1]], np.float32)
        padded = np.full((*self.sizes[canvas], image.shape[2]), self.fill, np.uint8)
        padded[: size[0], : size[1]] = _resized(image, size)
        placed = {**example, "image": padded, "size": np.array(size, np.int32), "scale": scale}
        if "boxes" in example:
            limit = np.array([size[1], size[0]] * 2, np.float32)
            placed["boxes"] = np.minimum(np.asarray(example["boxes"], np.float32) * scale[[1, 0, 1, 0]], limit)
        if "masks" in example:
            masks = np.asarray(example["masks"])
            rows, columns = (
                np.minimum(((np.arange(n) + 0.5) * have / n).astype(int), have - 1)
                for n, have in zip(size, masks.shape[1:], strict=True)
            )
            placed["masks"] = np.zeros((len(masks), *self.sizes[canvas]), masks.dtype)
            placed["masks"][:, : size[0], : size[1]] = masks[:, rows][:, :, columns]
        return placed

    def _wanted(self, size: tuple[int, int]) -> tuple[int, int]:
        short, long = min(size), max(size)
        if self.shorter is not None:
            factor = self.shorter / short
            if self.longer is not None and long * factor > self.longer:
                factor = self.longer / long
        elif self.longer is not None:
            factor = self.longer / long
        else:
            return size
        return _rounded(size[0] * factor), _rounded(size[1] * factor)

    def _share(self, size: tuple[int, int], canvas: int) -> float:
        """Returns the fraction of a canvas that an image can fill."""
        height, width = self.sizes[canvas]
        fit = min(height / size[0], width / size[1])
        return round(size[0] * size[1] * fit * fit / (height * width), 9)


def on_canvases(
    source: Source,
    canvases: Canvases | Sequence[tuple[int, int]] | int,
    *,
    max_objects: int | None = None,
    multiscale: int | None = None,
    cache: bool = False,
) -> "CanvasSource":
    """Resizes and pads the images of a source to canvases, for `train_batches` and `eval_batches`.

    All images of a batch have the same canvas. In training, the number of batches of a canvas is proportional to its
    number of images. The order of the canvases is random and depends only on the seed. Each canvas has its own sequence
    of shuffled epochs.

    Args:
        source: Images of any size, with or without boxes.
        canvases: The canvases, their heights and widths, or the side of one square canvas.
        max_objects: Number of objects M to which the objects of every example are padded, with `valid` False. None uses
            the largest number of objects in an image.
        multiscale: For multi-scale training (YOLO9000, section 2): every `multiscale` steps, a canvas is drawn at
            random, to which all images are then resized. None keeps each image on its own canvas.
        cache: Whether to keep the resized examples in memory once they have been read.

    Returns:
        The source. Its examples also have `size`, `scale`, and `index`, the position in `source`.

    Raises:
        ValueError: A number is out of range, or no canvas holds an image and `larger` is "refuse".
    """
    if isinstance(canvases, int):
        canvases = Canvases(((canvases, canvases),))
    elif not isinstance(canvases, Canvases):
        canvases = Canvases(tuple(canvases))
    return CanvasSource(source, canvases, max_objects=max_objects, multiscale=multiscale, cache=cache)


class CanvasSource:
    """A source whose images lie on canvases, created by `on_canvases`.

    Attributes:
        source: The source of the images.
        canvases: The canvases.
        canvas: Index of the canvas of each image, int [N].
        multiscale: Number of steps for which training keeps a canvas; None if each image has its own canvas.
    """

    def __init__(
        self, source: Source, canvases: Canvases, *, max_objects: int | None, multiscale: int | None, cache: bool
    ):
        if multiscale is not None and multiscale < 1:
            raise ValueError(f"multiscale must be at least 1 or None; got {multiscale}")
        self.source, self.canvases, self.multiscale = source, canvases, multiscale
        self.name, self.classes = source.name, source.classes
        sizes = image_sizes(source)
        self.canvas = np.array(
            [canvases.choose((int(h), int(w)), f"{source.name}[{i}]") for i, (h, w) in enumerate(sizes)], np.int64
        )
        self._objects = _object_count(source, max_objects)
        self._cache: dict[int, dict[str, Any]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        # Index (1 + k) * N + i, which the batches of multi-scale training use, is image i on canvas k.
        on, index_of = divmod(int(index), len(self))
        canvas = int(self.canvas[index_of]) if on == 0 else on - 1
        key = canvas * len(self) + index_of
        placed = None if self._cache is None else self._cache.get(key)
        if placed is None:
            placed = self.canvases.place(self.source[index_of], canvas)
            if self._objects is not None:
                placed = pad_objects(placed, self._objects, f"{self.name}[{index_of}]")
            placed["index"] = np.int32(index_of)
            if self._cache is not None:
                self._cache[key] = placed
        return dict(placed)

    def __repr__(self) -> str:
        counts = np.bincount(self.canvas, minlength=len(self.canvases.sizes))
        each = ", ".join(f"{n} on {h}x{w}" for n, (h, w) in zip(counts, self.canvases.sizes, strict=True))
        return f"CanvasSource({self.name!r}, {each})"

    @property
    def max_objects(self) -> int | None:
        """Number of objects M of every padded example; None for a source without boxes."""
        return self._objects

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the fingerprint of `source`, the canvases and the options."""
        identity = f"{self.source.fingerprint}/{self.canvases}/{self._objects}/{self.multiscale}"
        return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    def verify(self) -> None:
        """Calls `source.verify`, if it exists."""
        verify = getattr(self.source, "verify", None)
        if verify is not None:
            verify()


def image_sizes(source: Source) -> np.ndarray:
    """Returns the height and width of each image, [N, 2]: `source.sizes`, or those of the decoded images."""
    sizes = getattr(source, "sizes", None)
    if sizes is not None:
        return np.asarray(sizes)
    if isinstance(source, Subset):
        return image_sizes(source.source)[source.indices]
    return np.array([*bounded_map(lambda i: np.shape(source[i]["image"])[:2], range(len(source)))]).reshape(-1, 2)


def _object_count(source: Source, wanted: int | None) -> int | None:
    """Returns the number of objects of a padded example; None if the source has no boxes."""
    counts = getattr(source, "counts", None)
    if isinstance(source, Subset) and counts is None and hasattr(source.source, "counts"):
        counts = np.asarray(source.source.counts)[source.indices]
    if counts is None:
        if not len(source) or "boxes" not in source[0]:
            return None
        if wanted is None:
            counts = [*bounded_map(lambda i: len(source[i]["boxes"]), range(len(source)))]
    if wanted is not None and wanted < 1:
        raise ValueError(f"max_objects must be at least 1; got {wanted}")
    return int(max(1, np.max(np.asarray(counts), initial=0)) if wanted is None else wanted)


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes uint8 [h, w, C], bilinear with antialiasing."""
    from PIL import Image

    if image.shape[:2] == size:
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    resized = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return resized.reshape(*size, image.shape[2])


def _rounded(length: float, limit: int | None = None) -> int:
    rounded = max(1, int(length + 0.5))
    return rounded if limit is None else min(rounded, limit)


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]
