"""Shows what convolution and pooling do, on two photos and with filters made by hand.

    python experiments/feature_maps.py

A few seconds on a CPU, without a network: scikit-learn brings the photos, a Chinese temple and a dahlia. The filters
are those of figure 14-5 in A. Géron's "Hands-On Machine Learning" (2nd edition): zeros but for a line of ones down or
across the middle. To expect in the work directory:

    filters.png        the two filters
    feature_maps.png   photos and feature maps: the vertical filter keeps vertical lines sharp and blurs all else
    details.png        the same, cut out and enlarged
    pooling.png        max and average pooling of the cut-outs
    depthwise.png      pooling over the depth: over the three colours, and over the two feature maps

and on the screen the global averages of the photos' colours and of the feature maps.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from sklearn.datasets import load_sample_images

import flaxvision as fv

PHOTOS = ("temple", "dahlia")
DETAILS = (np.s_[150:220, 130:250], np.s_[150:220, 290:410])  # roof tiles; the flower's heart


@dataclasses.dataclass(frozen=True)
class Config:
    """Draw feature maps and pooled images of two photos."""

    kernel_size: int = 7
    """Height and width of the line filters in pixels, an odd number from 3 to 63."""
    pool: int = 2
    """Height and width of the pooling windows in pixels, from 1 to 16."""
    workdir: str = "runs/feature_maps"
    """Folder for the pictures."""


def main(config: Config) -> int:
    """Runs the experiment; returns the process's exit status."""
    if config.kernel_size not in range(3, 64, 2):
        raise ValueError(f"--kernel-size must be an odd number from 3 to 63, got {config.kernel_size}")
    if not 1 <= config.pool <= 16:
        raise ValueError(f"--pool must be from 1 to 16, got {config.pool}")
    workdir = Path(config.workdir)

    photos = jnp.asarray(np.stack(load_sample_images().images)) / 255.0
    filters = line_filters(config.kernel_size, photos.shape[-1])
    maps = line_maps(photos, filters)

    names = ("vertical", "horizontal")
    side = f"{config.kernel_size}x{config.kernel_size}"
    fv.plot.feature_maps(
        filters[:, :, 0].transpose(2, 0, 1), [f"{name} line, {side}" for name in names], workdir / "filters.png"
    )

    rows = [(photo, grey(m[..., 0]), grey(m[..., 1])) for photo, m in zip(photos, maps, strict=True)]
    titles = [text for photo in PHOTOS for text in (photo, *(f"{name} lines" for name in names))]
    draw(rows, titles, workdir / "feature_maps.png")
    cut = [tuple(image[place] for image in row) for row, place in zip(rows, DETAILS, strict=True)]
    draw(cut, titles, workdir / "details.png")

    window, rows = config.pool, []
    for photo, place in zip(photos, DETAILS, strict=True):
        detail = photo[place]
        height, width = (n // window * window for n in detail.shape[:2])
        pooled = fv.layers.max_pool(detail[None], window)[0], fv.layers.avg_pool(detail[None], window)[0]
        rows.append((detail[:height, :width], *(enlarged(image, window) for image in pooled)))
    kinds = (f"max pooling {window}x{window}", f"average pooling {window}x{window}")
    draw(rows, [text for photo in PHOTOS for text in (photo, *kinds)], workdir / "pooling.png")

    rows = []
    for photo, m in zip(photos, maps, strict=True):
        pooled = fv.layers.depthwise_max_pool(photo, 3), fv.layers.depthwise_avg_pool(photo, 3)
        rows.append((photo, *(jnp.broadcast_to(image, photo.shape) for image in pooled)))
        lines = (m[..., 0], m[..., 1], fv.layers.depthwise_max_pool(m, 2)[..., 0])
        rows.append(tuple(grey(image) for image in lines))
    kinds = ("largest of the 3 colours", "mean of the 3 colours")
    lines = ("vertical lines", "horizontal lines", "larger of the 2 maps")
    titles = [text for photo in PHOTOS for text in (photo, *kinds, *lines)]
    draw(rows, titles, workdir / "depthwise.png")

    colours, strengths = fv.layers.global_avg_pool(photos), fv.layers.global_avg_pool(maps)
    print("global average pooling   red  green   blue  vertical  horizontal")
    for photo, (r, g, b), (v, h) in zip(PHOTOS, np.asarray(colours), np.asarray(strengths), strict=True):
        print(f"{photo:22} {r:5.3f}  {g:5.3f}  {b:5.3f}  {v:8.3f}  {h:10.3f}")
    print(f"see {workdir}: " + ", ".join(sorted(path.name for path in workdir.glob("*.png"))))
    return 0


def line_filters(size: int, channels: int) -> jax.Array:
    """A vertical and a horizontal line of ones through the middle: `[size, size, channels, 2]`."""
    filters = jnp.zeros((size, size, channels, 2))
    return filters.at[:, size // 2, :, 0].set(1).at[size // 2, :, :, 1].set(1)


def line_maps(images: jax.Array, filters: jax.Array) -> jax.Array:
    """Feature maps `[N, H, W, K]` of images `[N, H, W, C]`; `filters` `[size, size, C, K]` are the layer's kernel."""
    layer = fv.layers.Conv(filters.shape[-1], filters.shape[:2], padding="SAME", use_bias=False)
    return jax.jit(layer.apply)({"params": {"kernel": filters}}, images)


def grey(feature_map: jax.Array) -> jax.Array:
    """A feature map `[H, W]` as an image `[H, W, 3]` from black (its least number) to white (its largest)."""
    low, high = feature_map.min(), feature_map.max()
    return jnp.repeat(((feature_map - low) / (high - low))[..., None], 3, axis=-1)


def enlarged(image: jax.Array, times: int) -> jax.Array:
    """An image `[H, W, C]` whose pixels became squares of `times x times`."""
    return image.repeat(times, axis=0).repeat(times, axis=1)


def draw(rows, titles, path: Path) -> None:
    """Draws rows of images of one size."""
    images = np.stack([np.asarray(image) for row in rows for image in row])
    fv.plot.image_grid(images, titles, columns=len(rows[0]), path=path)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Config, description=__doc__)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
