"""Mixup and CutMix: batch transforms ``(rng, batch) -> batch`` with soft targets.

Both mix row i with row ``partner[i]`` of one random permutation of the real rows (``mask`` 1), with one mixing weight
for the whole batch, as in the authors' implementations. Padded rows are neither mixed nor used as partners. The weight
depends on the key of the batch only and the permutation runs over the global batch, so under ``jit`` over a mesh the
results do not depend on the number of devices; the rows are exchanged by one gather between devices.

``label`` becomes float32 [N, K]: integer classes [N] are first converted to one-hot rows of `num_classes` numbers, soft
targets [N, K] are mixed as they are. A class outside [0, K) becomes a row of NaN. Batches with boxes, masks or key
points are refused. Pass these transforms to `flaxvision.data.augment.make_transform`.
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
        alpha: Parameter of the symmetric Beta distribution of the weight; 0 mixes nothing.
        num_classes: K; required for integer labels.
        probability: Share of the batches that are mixed.

    Returns:
        The batch with mixed ``image`` and soft ``label`` [N, K].

    Raises:
        ValueError: `alpha` is negative, images or labels are of another kind, `num_classes` is missing or wrong, or the
            batch has boxes, masks or key points.
    """
    weight, partner, targets, _ = _prepare("mixup", rng, batch, alpha, num_classes, probability)
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
    """Replaces one rectangle, the same in every image, by that of the partner (Yun 2019, algorithm 1).

    Before it is clipped at the border, the rectangle has the aspect ratio of the image and the share ``1 - weight`` of
    its area. The targets are weighted by the share of the pixels that are kept.

    Args:
        rng: Key of this batch.
        batch: ``image`` float [N, H, W, C], ``label`` [N] or [N, K], optionally ``mask`` [N].
        alpha: Parameter of the symmetric Beta distribution of the weight; 0 mixes nothing.
        num_classes: K; required for integer labels.
        probability: Share of the batches that are mixed (in the paper 0.5 for CIFAR and 1 for ImageNet).

    Returns:
        The batch with mixed ``image`` and soft ``label`` [N, K].

    Raises:
        ValueError: See `mixup`.
    """
    weight, partner, targets, key = _prepare("cutmix", rng, batch, alpha, num_classes, probability)
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
    """Makes a transform of mixup, of cutmix, or of both, which then take turns at random.

    Args:
        num_classes: K.
        mixup_alpha: The `alpha` of `mixup`; 0 leaves mixup out.
        cutmix_alpha: The `alpha` of `cutmix`; 0 leaves cutmix out.

    Returns:
        The transform, or None if both are left out.
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


def _prepare(name, rng, batch, alpha, num_classes, probability):
    """Checks the arguments and returns the weight, the partners, the soft targets and a fresh key."""
    if alpha < 0:
        raise ValueError(f"alpha must be at least 0; got {alpha}")
    for key in ("boxes", "masks", "keypoints"):
        if key in batch:
            shape = list(jnp.shape(batch[key]))
            raise ValueError(
                f"batch must hold no {key} for {name}; got {key!r} of the shape {shape}; remove the key or {name}"
            )
    image = batch["image"]
    if image.ndim != 4 or not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"batch['image'] must be floats [N, H, W, C]; got {image.dtype}{list(image.shape)}")
    label = jnp.asarray(batch["label"])
    integers = label.ndim == 1 and jnp.issubdtype(label.dtype, jnp.integer)
    if not integers and not (label.ndim == 2 and jnp.issubdtype(label.dtype, jnp.floating)):
        raise ValueError(
            f"batch['label'] must be integers [N] or floats [N, K] for {name}; got {label.dtype}{list(label.shape)}"
        )
    if integers and num_classes is None:
        raise ValueError("num_classes must be given for integer labels [N]; got None")
    if not integers and num_classes not in (None, label.shape[1]):
        raise ValueError(f"num_classes must be {label.shape[1]}, the number of label columns; got {num_classes}")
    if num_classes and integers:  # a label outside of the classes must not become a row of zeros
        known = (label >= 0) & (label < num_classes)
        targets = jnp.where(known[:, None], jax.nn.one_hot(label, num_classes), jnp.nan)
    else:
        targets = label.astype(jnp.float32)

    key_weight, key_partner, key_rest = jax.random.split(rng, 3)
    weight = jnp.ones(())
    if alpha > 0:
        key_beta, key_apply = jax.random.split(key_weight)
        weight = jax.random.beta(key_beta, alpha, alpha)
        weight = jnp.where(jax.random.bernoulli(key_apply, probability), weight, 1.0)
    mask = batch.get("mask")
    rows = jnp.arange(image.shape[0])
    real = jnp.ones(rows.shape, bool) if mask is None else jnp.asarray(mask) > 0
    # The real rows come first in `shuffled`, in random order; the partner of the r-th real row is the r-th of them.
    shuffled = jnp.argsort(jnp.where(real, jax.random.uniform(key_partner, rows.shape), 2.0))
    partner = jnp.where(real, shuffled[jnp.cumsum(real) - 1], rows)
    return weight, partner, targets, key_rest
