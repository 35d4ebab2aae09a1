"""Boundary F of semantic segmentation.

G. Csurka, D. Larlus, F. Perronnin, "What is a good evaluation measure for semantic segmentation?", BMVC 2013.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flaxvision.metrics.records import ImageMetrics, ImageRecords, check_label_maps, known_mean


class BoundaryRecords(ImageRecords):
    """The boundary pixels of every image and class, on the host.

    `compute` returns `boundary_f`, the mean over the images of the mean over their classes, as in the paper. If only
    the prediction or only the truth has boundary pixels of a class, the F of the class is 0 in that image. If neither
    has any, the class is left out of the mean. `pooled_boundary_f` is the mean over the classes of the F that is
    computed from the counts of all images together.

    Attributes:
        counts: `[N, K, 4]` int64; see `BoundaryMetrics`.
        index: `[N]`, the position of each image in its data set, -1 if it is not known.
    """

    def _figures(self, counts: np.ndarray) -> dict[str, float]:
        images = np.array([known_mean(row) for row in _f(counts)])
        return {"boundary_f": known_mean(images), "pooled_boundary_f": known_mean(_f(counts.sum(0)))}


@struct.dataclass
class BoundaryMetrics(ImageMetrics):
    """Counts of boundary pixels by image and class: `BoundaryMetrics.of(predictions, labels, num_classes)`.

    A boundary pixel of a class is a pixel of the class with a pixel of another class above, below, left or right of it.
    The border of the image is no boundary, so a class that fills the image has none. Pixels whose label is outside
    [0, K), such as 255, are unknown, in the prediction too: they are no boundary pixels, and their neighbours are none
    because of them.

    Use it in evaluation only: merging on the device appends rows, so the arrays grow.

    Attributes:
        counts: `[N, K, 4]` int32: the boundary pixels of the prediction within the tolerance of the true boundary, all
            of the prediction, those of the truth within the tolerance of the predicted boundary, all of the truth.
        mask: `[N]` bool, False for rows that are padding.
        index: `[N]`, the position of each image in its data set, -1 if it is not known.
    """

    records = BoundaryRecords

    @classmethod
    def of(
        cls,
        predictions: jax.Array,
        labels: jax.Array,
        num_classes: int,
        mask: jax.Array | None = None,
        index: jax.Array | None = None,
        *,
        tolerance: float = 0.0075,
    ) -> BoundaryMetrics:
        """Counts the boundary pixels of a batch.

        Args:
            predictions: Class indices `[N, H, W]`.
            labels: Class indices `[N, H, W]`; a label outside [0, K), such as 255, is unknown.
            num_classes: K.
            mask: `[N]`, above 0 for real rows and 0 for padding; None for real rows only.
            index: `[N]`, the position of each image in its data set; None if it is not known.
            tolerance: The largest Euclidean distance between the centres of two boundary pixels that agree: 0, or a
                number of pixels from 1, or a fraction below 1 of the image's diagonal. The paper has 0.0075.

        Raises:
            ValueError: The shapes do not fit, `num_classes` is below 1, or `tolerance` is negative or not finite.
        """
        check_label_maps(predictions, labels)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1; got {num_classes}")
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance must be a finite number of at least 0; got {tolerance}")
        _, height, width = labels.shape
        radius = tolerance if tolerance >= 1 else tolerance * math.hypot(height, width)
        known = (labels >= 0) & (labels < num_classes)

        def count(k: jax.Array) -> jax.Array:
            found, truth = (_boundary(x == k, known) for x in (predictions, labels))
            sums = [found & _near(truth, radius), found, truth & _near(found, radius), truth]
            return jnp.stack([x.sum((1, 2), dtype=jnp.int32) for x in sums], -1)

        return cls.of_counts(jnp.moveaxis(jax.lax.map(count, jnp.arange(num_classes)), 0, 1), mask, index)


def _f(counts: np.ndarray) -> np.ndarray:
    """Returns F, the harmonic mean of precision and recall, of counts `[..., 4]`; NaN without boundary pixels."""
    near_found, found, near_truth, truth = np.moveaxis(counts, -1, 0)
    precision, recall = near_found / np.maximum(found, 1), near_truth / np.maximum(truth, 1)
    f = 2 * precision * recall / np.where(precision + recall > 0, precision + recall, 1)
    return np.where(found + truth > 0, f, np.nan)


def _boundary(inside: jax.Array, known: jax.Array) -> jax.Array:
    """Returns the boundary pixels of a class `[N, H, W]`."""
    outside = jnp.pad(~inside & known, ((0, 0), (1, 1), (1, 1)))
    near = outside[:, 2:, 1:-1] | outside[:, :-2, 1:-1] | outside[:, 1:-1, 2:] | outside[:, 1:-1, :-2]
    return inside & known & near


def _near(pixels: jax.Array, radius: float) -> jax.Array:
    """Returns where a pixel of `pixels` `[N, H, W]` lies within `radius`: a dilation by a disc.

    The distance in the row comes first, in one pass. The rows within the radius follow one after another.
    """
    _, height, width = pixels.shape
    reach = min(math.floor(radius), height - 1)
    limit = min(math.floor(radius**2), height**2 + width**2)  # squared distances are integers
    far = height + width  # beyond any distance in the image
    x = jnp.arange(width)[None, None]
    left = jax.lax.cummax(jnp.where(pixels, x, -far), axis=2)
    right = jax.lax.cummin(jnp.where(pixels, x, width + far), axis=2, reverse=True)
    distance = jnp.minimum(jnp.minimum(x - left, right - x), far)
    padded = jnp.pad(distance, ((0, 0), (reach, reach), (0, 0)), constant_values=far)

    def look(i: jax.Array, near: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(padded, i, height, axis=1)
        return near | ((row < far) & (row**2 + (i - reach) ** 2 <= limit))

    return jax.lax.fori_loop(0, 2 * reach + 1, look, jnp.zeros_like(pixels))
