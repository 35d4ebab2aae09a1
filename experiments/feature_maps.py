"""Draws the results of convolution and pooling on two photos, with handmade filters.

    python experiments/feature_maps.py

It takes five seconds on 2 CPU cores and needs no download: the photos, a Chinese temple and a dahlia, come with
scikit-learn. The filters are those of figure 14-5 in A. Géron's "Hands-On Machine Learning" (2nd edition): zeros, and a
vertical or horizontal line of ones through the middle. The work directory gets:

    filters.png        the two filters
    feature_maps.png   photos and feature maps: the vertical filter keeps vertical lines sharp and blurs the rest
    details.png        the same for a part of each photo, enlarged
    pooling.png        max and average pooling of these parts
    depthwise.png      pooling over the depth: over the three colours, and over the two feature maps

It prints the global averages of the colours of the photos and of the feature maps.
"""

from __future__ import annotations

import dataclasses
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
    """Height and width of the filters in pixels, an odd number from 3 to 63."""
    pool: int = 2
    """Height and width of the pooling windows in pixels, from 1 to 16."""
    workdir: str = "runs/feature_maps"
    """Directory for the pictures."""


def main(config: Config) -> int:
    """Runs the experiment and returns the exit status of the process."""
    if config.kernel_size not in range(3, 64, 2):
        raise ValueError(f"--kernel-size must be an odd number from 3 to 63; got {config.kernel_size}")
    if not 1 <= config.pool <= 16:
        raise ValueError(f"--pool must be from 1 to 16; got {config.pool}")
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
    """Makes filters `[size, size, channels, 2]` with a vertical and a horizontal line of ones through the middle."""
    filters = np.zeros((size, size, channels, 2), np.float32)
    filters[:, size // 2, :, 0] = 1
    filters[size // 2, :, :, 1] = 1
    return filters


def line_maps(images: np.ndarray, filters: np.ndarray) -> jax.Array:
    """Convolves images `[N, H, W, C]` with filters `[size, size, C, K]` to feature maps `[N, H, W, K]`."""
    layer = fv.layers.Conv(filters.shape[-1], filters.shape[:2], padding="SAME", use_bias=False)
    return jax.jit(layer.apply)({"params": {"kernel": filters}}, images)


def grey(maps: np.ndarray) -> np.ndarray:
    """Turns feature maps `[H, W, K]` into images `[K, H, W, 3]`, from black for the lowest value to white."""
    maps = (maps - maps.min()) / (maps.max() - maps.min())
    return np.repeat(np.moveaxis(maps, -1, 0)[..., None], 3, axis=-1)


def enlarged(image: np.ndarray | jax.Array, times: int) -> np.ndarray:
    """Enlarges every pixel of an image `[H, W, C]` to `times x times` pixels."""
    return np.repeat(np.repeat(image, times, axis=0), times, axis=1)


def drawn(kernel: np.ndarray, side: int = 12) -> np.ndarray:
    """Draws a kernel `[H, W]` as squares of `side` pixels with lines between them."""
    image = np.pad(enlarged(kernel, side), ((0, 1), (0, 1)))
    image[::side] = image[:, ::side] = 0.5
    return image


def draw(rows, titles, path: Path) -> None:
    """Draws rows of images of the same size."""
    images = np.stack([np.asarray(image) for row in rows for image in row])
    fv.plot.image_grid(images, titles, columns=len(rows[0]), path=path)


if __name__ == "__main__":
    fv.train.run_experiment(main, lambda: tyro.cli(Config, description=__doc__))
