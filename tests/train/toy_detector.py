"""A small detector of one level that samples: everything an objective of detection has to deal with."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.detection import Candidates
from flaxvision.layers import BatchNorm
from flaxvision.models.detector import Detector, batch_mean, row_keys, valid_sizes

STRIDE = 8


class ToyDetector(Detector):
    """One box for each cell: logits of the classes, and the offsets of its corners from the centre of the cell."""

    num_classes: int = 2
    features: int = 8
    sampled: int = 4  # cells without an object that learn, for each image

    @property
    def num_labels(self):
        return self.num_classes

    @nn.compact
    def __call__(self, images, sizes=None, *, train=False):
        x = images
        for k, stride in enumerate((4, 2)):
            x = nn.Conv(self.features, (5, 5), (stride, stride), use_bias=False, name=f"conv{k}")(x)
            x = nn.relu(BatchNorm(name=f"norm{k}")(x, use_running_average=not train))
        return {
            "logits": nn.Conv(self.num_classes, (1, 1), name="logits", bias_init=nn.initializers.constant(-2.0))(x),
            "corners": nn.Conv(4, (1, 1), name="corners")(x),
        }

    @nn.nowrap
    def boxes(self, outputs):
        height, width = outputs["corners"].shape[1:3]
        y, x = jnp.meshgrid((jnp.arange(height) + 0.5) * STRIDE, (jnp.arange(width) + 0.5) * STRIDE, indexing="ij")
        sides = STRIDE * jnp.exp(jnp.clip(outputs["corners"], -3, 3))
        centre = jnp.stack([x, y], -1)[None]
        return jnp.concatenate([centre - sides[..., :2], centre + sides[..., 2:]], -1)

    @nn.nowrap
    def candidates(self, outputs, sizes=None):
        rows, height, width, classes = outputs["logits"].shape
        if sizes is None:
            sizes = jnp.broadcast_to(jnp.asarray([[height, width]]) * STRIDE, (rows, 2))
        limit = jnp.tile(sizes[:, None, ::-1], (1, 1, 2)).astype(jnp.float32)
        boxes = jnp.clip(self.boxes(outputs).reshape(rows, -1, 4), 0, limit)
        scores = jax.nn.sigmoid(outputs["logits"]).reshape(rows, -1, classes)
        return Candidates(boxes, scores, jnp.ones(scores.shape[:2], bool))

    def losses(self, batch, rng=None, *, train=True):
        sizes = valid_sizes(batch["image"], batch.get("size"))
        outputs = self(batch["image"], sizes, train=train)
        rows, height, width, classes = outputs["logits"].shape
        boxes, real = batch["boxes"], batch["valid"].astype(bool)
        if "crowd" in batch:
            real &= ~batch["crowd"].astype(bool)
        centre = (boxes[..., :2] + boxes[..., 2:]) / 2 / STRIDE
        cell = jnp.clip(centre[..., 1].astype(int), 0, height - 1) * width
        cell = cell + jnp.clip(centre[..., 0].astype(int), 0, width - 1)
        cell = jnp.where(real, cell, height * width)  # beyond the grid: dropped
        at = jnp.arange(rows)[:, None]
        targets = jnp.zeros((rows, height * width + 1, classes)).at[at, cell, batch["labels"]].set(1.0)[:, :-1]
        logits = outputs["logits"].reshape(rows, -1, classes)
        each = jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))
        positive = targets.max(-1) > 0
        ranks = jax.vmap(lambda key: jax.random.uniform(key, (height * width,)))(row_keys(rng, rows))
        chosen = jnp.argsort(jnp.argsort(jnp.where(positive, 2.0, ranks))) < self.sampled
        used = positive | chosen
        scores = jnp.sum(each.sum(-1) * used, -1) / jnp.maximum(batch_mean(used.sum(-1)), 1)
        found = self.boxes(outputs).reshape(rows, -1, 4)
        mine = jnp.take_along_axis(found, jnp.minimum(cell, height * width - 1)[..., None], 1)
        error = jnp.abs(mine - boxes).sum(-1) / STRIDE * real
        return {"class": scores, "box": error.sum(-1) / jnp.maximum(batch_mean(real.sum(-1)), 1)}
