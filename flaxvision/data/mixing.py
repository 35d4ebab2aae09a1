"""Mixup and CutMix: batch transforms ``(rng, batch) -> batch`` with soft targets.

Both mix row i with row ``partner[i]`` of one random permutation of the real rows (``mask`` 1), with one mixing weight
for the whole batch as in the authors' implementations. Padded rows neither give nor take anything. The weight is
drawn from the batch's key alone and the permutation runs over the global batch, so results do not depend on the
number of devices under ``jit`` over a mesh, where the exchange of rows is one gather between devices.

``label`` comes out as float32 [N, K]: integer classes [N] become one-hot rows first (`num_classes` says how many),
soft targets [N, K] are mixed as they are. Use them through `flaxvision.data.augment.make_transform`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def mixup(
    rng: jax.Array,
    batch: Mapping[str, Any],
    *,
    alpha: float = 0.2,
    num_classes: int | None = None,
    probability: float = 1.0,
) -> dict[str, Any]:
    """Blends pairs of images and their targets (Zhang 2018, equation 1).

    Args:
        rng: Key of this batch.
        batch: ``image`` float [N, H, W, C], ``label`` [N] or [N, K], optionally ``mask`` [N].
        alpha: Parameter of the symmetric Beta distribution of the weight; 0 leaves the images alone.
        num_classes: K; needed for integer labels.
        probability: Share of batches that are mixed.

    Returns:
        The batch with mixed ``image`` and soft ``label`` [N, K].

    Raises:
        ValueError: for a negative `alpha`, images or labels of another kind, a missing or wrong `num_classes`.
    """
    weight, partner, targets, _ = _prepare(rng, batch, alpha, num_classes, probability)
    image = jnp.asarray(batch["image"])
    image = weight * image + (1 - weight) * image[partner]
    return {**batch, "image": image, "label": weight * targets + (1 - weight) * targets[partner]}


def cutmix(
    rng: jax.Array,
    batch: Mapping[str, Any],
    *,
    alpha: float = 1.0,
    num_classes: int | None = None,
    probability: float = 1.0,
) -> dict[str, Any]:
    """Replaces one box, the same in every image, by the partner's (Yun 2019, algorithm 1).

    The box has the image's aspect ratio and the share ``1 - weight`` of its area before the border clips it; the
    targets are weighted by the share of pixels really kept.

    Args:
        rng: Key of this batch.
        batch: ``image`` float [N, H, W, C], ``label`` [N] or [N, K], optionally ``mask`` [N].
        alpha: Parameter of the symmetric Beta distribution of the weight; 0 leaves the images alone.
        num_classes: K; needed for integer labels.
        probability: Share of batches that are mixed (the paper takes 0.5 for CIFAR and 1 for ImageNet).

    Returns:
        The batch with mixed ``image`` and soft ``label`` [N, K].

    Raises:
        ValueError: as `mixup`.
    """
    weight, partner, targets, key = _prepare(rng, batch, alpha, num_classes, probability)
    image = jnp.asarray(batch["image"])
    _, height, width, _ = image.shape
    inside = []
    for axis, extent in enumerate((height, width)):
        half = (extent * jnp.sqrt(1 - weight)).astype(jnp.int32) // 2
        middle = jax.random.randint(jax.random.fold_in(key, axis), (), 0, extent)
        position = jnp.arange(extent)
        inside.append((position >= middle - half) & (position < middle + half))
    box = inside[0][:, None] & inside[1][None]
    kept = 1 - jnp.mean(box.astype(jnp.float32))
    image = jnp.where(box[None, :, :, None], image[partner], image)
    return {**batch, "image": image, "label": kept * targets + (1 - kept) * targets[partner]}


def mixing(
    num_classes: int, *, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0
) -> Callable[[jax.Array, Mapping[str, Any]], dict[str, Any]] | None:
    """Mixup, cutmix, or for each batch one of the two with equal chances.

    Args:
        num_classes: K.
        mixup_alpha: Of `mixup`; 0 leaves it out.
        cutmix_alpha: Of `cutmix`; 0 leaves it out.

    Returns:
        The transform, None when both are left out.
    """
    chosen = []
    if mixup_alpha:
        chosen.append(partial(mixup, alpha=mixup_alpha, num_classes=num_classes))
    if cutmix_alpha:
        chosen.append(partial(cutmix, alpha=cutmix_alpha, num_classes=num_classes))
    if len(chosen) < 2:
        return chosen[0] if chosen else None

    def either(rng, batch):
        key_choice, key_mix = jax.random.split(rng)
        return jax.lax.cond(jax.random.bernoulli(key_choice), *chosen, key_mix, dict(batch))

    return either


def _prepare(rng, batch, alpha, num_classes, probability):
    """Checks the arguments; draws the weight and the partners; gives them with the soft targets and a fresh key."""
    if alpha < 0:
        raise ValueError(f"alpha is {alpha}; expected a number of at least 0.")
    image = batch["image"]
    if image.ndim != 4 or not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"batch['image'] is {image.dtype}{list(image.shape)}; expected floats [N, H, W, C].")
    label = jnp.asarray(batch["label"])
    integers = label.ndim == 1 and jnp.issubdtype(label.dtype, jnp.integer)
    if not integers and not (label.ndim == 2 and jnp.issubdtype(label.dtype, jnp.floating)):
        raise ValueError(f"batch['label'] is {label.dtype}{list(label.shape)}; expected integers [N] or floats [N, K].")
    if integers and num_classes is None:
        raise ValueError("num_classes is None; integer labels [N] need it to become soft targets [N, num_classes].")
    if not integers and num_classes not in (None, label.shape[1]):
        raise ValueError(f"num_classes is {num_classes}, but the labels have shape {label.shape}.")
    targets = jax.nn.one_hot(label, num_classes) if num_classes and integers else label.astype(jnp.float32)

    key_weight, key_partner, key_rest = jax.random.split(rng, 3)
    weight = jnp.ones(())
    if alpha > 0:
        key_beta, key_apply = jax.random.split(key_weight)
        weight = jax.random.beta(key_beta, alpha, alpha)
        weight = jnp.where(jax.random.bernoulli(key_apply, probability), weight, 1.0)
    mask = batch.get("mask")
    rows = jnp.arange(image.shape[0])
    real = jnp.ones(rows.shape, bool) if mask is None else jnp.asarray(mask) > 0
    # Real rows in random order come first in `shuffled`; the r-th real row takes the r-th of them.
    shuffled = jnp.argsort(jnp.where(real, jax.random.uniform(key_partner, rows.shape), 2.0))
    partner = jnp.where(real, shuffled[jnp.cumsum(real) - 1], rows)
    return weight, partner, targets, key_rest
