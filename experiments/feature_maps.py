"""Shows what convolution and pooling do, on two photos and with filters made by hand.

    python experiments/feature_maps.py

Five seconds on 2 CPU cores, without a network: scikit-learn brings the photos, a Chinese temple and a dahlia. The
filters are those of figure 14-5 in A. Géron's "Hands-On Machine Learning" (2nd edition): zeros but for a line of ones
down or across the middle. To expect in the work directory:

    filters.png        the two filters
    feature_maps.png   photos and feature maps: the vertical filter keeps vertical lines sharp and blurs all else
    details.png        the same of a part of each photo, enlarged
    pooling.png        max and average pooling of these parts
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
    workdir.mkdir(parents=True, exist_ok=True)

    photos = np.stack(load_sample_images().images) / np.float32(255)
    filters = line_filters(config.kernel_size, photos.shape[-1])
    maps = np.asarray(line_maps(photos, filters))

    names = ("vertical lines", "horizontal lines")
    draw([[drawn(filters[:, :, 0, k]) for k in range(2)]], names, workdir / "filters.png")
    whole = [(photo, *grey(m)) for photo, m in zip(photos, maps, strict=True)]
    draw(whole, [text for photo in PHOTOS for text in (photo, *names)], workdir / "feature_maps.png")

    lines, pooling, depthwise = [], [], []
    for photo, m, place in zip(photos, maps, DETAILS, strict=True):
        photo, m = photo[place], m[place]
        lines.append((photo, *grey(m)))
        height, width = (n // config.pool * config.pool for n in photo.shape[:2])
        pooled = (pool(photo[None], config.pool)[0] for pool in (fv.layers.max_pool, fv.layers.avg_pool))
        pooling.append((photo[:height, :width], *(enlarged(image, config.pool) for image in pooled)))
        pooled = (pool(photo, 3) for pool in (fv.layers.depthwise_max_pool, fv.layers.depthwise_avg_pool))
        depthwise.append((photo, *(np.broadcast_to(image, photo.shape) for image in pooled)))
        depthwise.append(grey(np.concatenate([m, fv.layers.depthwise_max_pool(m, 2)], axis=-1)))
    draw(lines, [text for photo in PHOTOS for text in (photo, *names)], workdir / "details.png")
    kinds = [f"{kind} pooling {config.pool}x{config.pool}" for kind in ("max", "average")]
    draw(pooling, [text for photo in PHOTOS for text in (photo, *kinds)], workdir / "pooling.png")
    kinds = ("largest of the 3 colours", "mean of the 3 colours", *names, "larger of the 2 maps")
    draw(depthwise, [text for photo in PHOTOS for text in (photo, *kinds)], workdir / "depthwise.png")

    colours, strengths = (fv.layers.global_avg_pool(jnp.asarray(x)) for x in (photos, maps))
    print("global average pooling   red  green   blue  vertical  horizontal")
    for photo, (r, g, b), (v, h) in zip(PHOTOS, np.asarray(colours), np.asarray(strengths), strict=True):
        print(f"{photo:22} {r:5.3f}  {g:5.3f}  {b:5.3f}  {v:8.3f}  {h:10.3f}")
    print(f"see the five pictures in {workdir}")
    return 0


def line_filters(size: int, channels: int) -> np.ndarray:
    """A vertical and a horizontal line of ones through the middle: `[size, size, channels, 2]`."""
    filters = np.zeros((size, size, channels, 2), np.float32)
    filters[:, size // 2, :, 0] = 1
    filters[size // 2, :, :, 1] = 1
    return filters


def line_maps(images: np.ndarray, filters: np.ndarray) -> jax.Array:
    """Feature maps `[N, H, W, K]` of images `[N, H, W, C]`; `filters` `[size, size, C, K]` are the layer's kernel."""
    layer = fv.layers.Conv(filters.shape[-1], filters.shape[:2], padding="SAME", use_bias=False)
    return jax.jit(layer.apply)({"params": {"kernel": filters}}, images)


def grey(maps: np.ndarray) -> np.ndarray:
    """Feature maps `[H, W, K]` as images `[K, H, W, 3]` from black, their least number, to white, their largest."""
    maps = (maps - maps.min()) / (maps.max() - maps.min())
    return np.repeat(np.moveaxis(maps, -1, 0)[..., None], 3, axis=-1)


def enlarged(image: np.ndarray | jax.Array, times: int) -> np.ndarray:
    """An image `[H, W, C]` whose pixels became squares of `times x times`."""
    return np.repeat(np.repeat(image, times, axis=0), times, axis=1)


def drawn(kernel: np.ndarray, side: int = 12) -> np.ndarray:
    """A kernel `[H, W]` as an image with lines between its numbers, each a square of `side` pixels."""
    image = np.pad(enlarged(kernel, side), ((0, 1), (0, 1)))
    image[::side] = image[:, ::side] = 0.5
    return image


def draw(rows, titles, path: Path) -> None:
    """Draws rows of images of one size."""
    images = np.stack([np.asarray(image) for row in rows for image in row])
    fv.plot.image_grid(images, titles, columns=len(rows[0]), path=path)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Config, description=__doc__)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
