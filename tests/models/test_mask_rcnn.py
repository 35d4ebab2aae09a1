"""Mask R-CNN: counts, the loss of the masks, masks of detections, and independence of the number of devices.

`tests/parity/test_mask_rcnn.py` compares all losses and the masks with torchvision's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import flaxvision as fv
from flaxvision.layers import batch_context
from flaxvision.models import MaskRCNN
from flaxvision.models.faster_rcnn import Regions
from tests.models.smallest import QUICK, filled
from tests.models.test_faster_rcnn import IMAGE, SmallBackbone, batch_of
from tests.models.test_faster_rcnn import tiny as tiny_faster_rcnn

NAME = "mask_rcnn_resnet50_fpn"


def tiny(**fields):
    smaller = tiny_faster_rcnn()
    fields = {"backbone": SmallBackbone(batch_norm="frozen"), **fields}
    names = ("num_classes", "fpn_features", "head_features", "anchor_sizes", "rpn_pre_nms_train", "rpn_pre_nms_eval")
    names += ("rpn_post_nms_train", "rpn_post_nms_eval", "rpn_sample_size", "box_sample_size")
    return MaskRCNN(
        **{name: getattr(smaller, name) for name in names}, mask_pool_size=5, mask_features=(8, 6), **fields
    )


def with_masks(batch):
    """A triangle in each box: the half below its diagonal."""
    height, width = batch["image"].shape[1:3]
    x1, y1, x2, y2 = (batch["boxes"][..., i, None, None] for i in range(4))
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    masks = (x > x1) & (y < y2) & ((x - x1) * (y2 - y1) < (y - y1) * (x2 - x1))
    return batch | {"masks": (masks & batch["valid"][..., None, None]).astype(np.uint8)}


@functools.cache
def variables_of(model):
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), IMAGE))
    for part in ("rpn", "box_head"):
        variables["params"][part]["deltas"] = jax.tree.map(lambda x: x / 20, variables["params"][part]["deltas"])
    return variables


def regions_of(batch, model, rng):
    """Regions of all kinds and sizes as sampled by the second stage, positives first; few in some images."""
    rows, count = len(batch["image"]), model.box_sample_size
    corner, extent = rng.uniform(0, 0.5, (rows, count, 2)), rng.uniform(0.1, 0.5, (rows, count, 2))
    scale = batch["size"][:, None, ::-1]
    boxes = np.concatenate([corner * scale, (corner + extent) * scale], -1).astype(np.float32)
    positives = np.asarray([6, 0, 1, 4, 5, 2, 3, 6])[:rows]
    place = np.arange(count)[None]
    kept = np.broadcast_to(place < 20, (rows, count))
    classes = np.where(place < positives[:, None], rng.integers(1, model.num_classes, (rows, count)), 0)
    truths = rng.integers(0, batch["valid"].shape[1], (rows, count))
    return Regions(boxes, kept, classes.astype(np.int32), truths.astype(np.int32))


def levels_of(rows, rng, channels=8):
    shapes = {"stage1": (16, 24), "stage2": (8, 12), "pool": (4, 6)}
    return {name: rng.normal(size=(rows, *shape, channels)).astype(np.float32) for name, shape in shapes.items()}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def mask_loss(model, variables, batch, levels, regions):
    return model.apply(variables, batch, levels, regions, method="_mask_loss")


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def predict(model, variables, outputs, boxes, labels):
    return model.apply(variables, outputs, boxes, labels, method="masks")


def test_parameters():
    """torchvision counts neither frozen scales and biases nor statistics; the network that it trains has the former."""
    shapes = jax.eval_shape(fv.create_model(NAME).init, jax.random.key(0), IMAGE)
    params = flatten_dict(shapes["params"], sep="/")
    frozen = [path for path in params if path.endswith(("/scale", "/bias")) and ("bn" in path.split("/")[-2])]
    assert sum(leaf.size for path, leaf in params.items() if path not in frozen) == 44_401_393
    assert sum(leaf.size for leaf in params.values()) == 44_454_513
    assert fv.model_info(NAME).params == 44_401_393
    heads = {path.split("/")[1] for path in params if path.startswith("mask_head/")}
    assert heads == {"conv1", "conv2", "conv3", "conv4", "upsample", "logits"}
    smaller = jax.eval_shape(fv.create_model("faster_rcnn_resnet50_fpn").init, jax.random.key(0), IMAGE)
    assert set(params) - set(flatten_dict(smaller["params"], sep="/")) == {p for p in params if "mask_head" in p}


def test_outputs_by_shape():
    model = fv.create_model(NAME, num_classes=5, dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, 96, 128, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    outputs = jax.eval_shape(model.apply, variables, images)
    sizes = {"stage1": (24, 32), "stage2": (12, 16), "stage3": (6, 8), "stage4": (3, 4), "pool": (2, 2)}
    assert {name: x.shape for name, x in outputs["levels"].items()} == {k: (2, *v, 256) for k, v in sizes.items()}
    found = jax.eval_shape(functools.partial(fv.detect, model, max_detections=7), variables, images)
    assert (found.masks.shape, found.masks.dtype) == ((2, 7, 28, 28), jnp.float32)


def test_the_objective_of_detection():
    """It sums the five losses, without knowing of masks."""
    model, batch = tiny(), with_masks(batch_of(rows=2))
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
    params, rest = variables["params"], {name: value for name, value in variables.items() if name != "params"}
    objective = functools.partial(fv.train.detection(weights={"mask": 0.5}), train=True)
    run = lambda params, rest, batch, rng: objective(model.apply, params, rest, batch, rng)
    loss, (metrics, _) = jax.eval_shape(run, params, rest, batch, jax.random.key(0))
    assert loss.shape == ()
    assert set(metrics) == {"loss", "mask", "classes", "box", "objectness", "rpn_box"}


def test_the_loss_is_a_loop():
    """The mean over the pixels of the masks of the true classes of all positives of the batch."""
    model, rng = tiny(), np.random.default_rng(0)
    batch, levels = with_masks(batch_of(rows=8)), levels_of(8, rng)
    regions, variables = regions_of(batch, model, rng), variables_of(model)
    found = mask_loss(model, variables, batch, levels, regions)
    total, count = np.zeros(8), 0
    labels = np.maximum(regions.classes - 1, 0)[:, :6]
    probability = predict(model, variables, {"levels": levels}, regions.boxes[:, :6], labels)
    crop = jax.jit(functools.partial(fv.ops.crop_masks, output_size=10))
    for row, (height, width) in enumerate(batch["size"]):
        targets = crop(batch["masks"][row], regions.boxes[row], regions.truths[row], size=np.asarray([height, width]))
        for p, target, kind in zip(*np.asarray([probability[row], targets[:6]]), regions.classes[row][:6], strict=True):
            total[row] -= np.mean(target * np.log(p) + (1 - target) * np.log1p(-p)) * (kind > 0)
            count += kind > 0
    assert count == 27
    assert float(found[1]) == 0
    np.testing.assert_allclose(found, total / (count / 8), rtol=1e-4)
    # Without positives the loss is 0.
    none = regions._replace(classes=np.zeros_like(regions.classes))
    assert not np.any(mask_loss(model, variables, batch, levels, none))


def test_the_resolution_of_the_masks_is_free():
    """A filled canvas is the same at every resolution, and differs from an empty one."""
    model, rng = tiny(), np.random.default_rng(1)
    batch, levels = batch_of(rows=8), levels_of(8, rng)
    regions, variables = regions_of(batch, model, rng), variables_of(model)
    loss = lambda masks: float(mask_loss(model, variables, batch | {"masks": masks}, levels, regions)[0])
    whole = loss(np.ones((8, 3, 64, 96), np.uint8))
    assert loss(np.ones((8, 3, 33, 50), np.uint8)) == pytest.approx(whole, rel=1e-5)
    assert abs(loss(np.zeros((8, 3, 64, 96), np.uint8)) - whole) > 0.01


@pytest.mark.parametrize("parallel", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_the_number_of_devices_does_not_matter(parallel):
    """1 and 8 devices with 6 to 0 positives and a padded row, whose positives do not count."""
    model, rng = tiny(), np.random.default_rng(2)
    batch, levels = with_masks(batch_of(rows=8)), levels_of(8, rng)
    regions, variables = regions_of(batch, model, rng), variables_of(model)
    every = mask_loss(model, variables, batch, levels, regions)
    batch["mask"] = np.asarray([1, 1, 1, 1, 1, 1, 1, 0], np.float32)
    given = (batch, levels, regions)
    one = mask_loss(model, variables, *given)
    if parallel == "jit":
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        other = mask_loss(model, variables, *jax.device_put(given, split))
    else:

        def mapped(variables, batch, levels, regions):
            with batch_context(mask=batch["mask"], axis_name="data"):
                return model.apply(variables, batch, levels, regions, method="_mask_loss")

        rows = jax.tree.map(lambda x: x.reshape(8, 1, *x.shape[1:]), given)
        other = jax.pmap(mapped, "data", in_axes=(None, 0, 0, 0))(variables, *rows).ravel()
    assert float(one[0]) > 0
    np.testing.assert_allclose(other[:7], one[:7], rtol=1e-5)
    assert float(every[0]) / float(one[0]) == pytest.approx((21 / 7) / (27 / 8), rel=1e-5)


def test_the_mask_head_and_the_pyramid_get_gradients():
    """Regions below 112 pixels use the finest level."""
    model, rng = tiny(), np.random.default_rng(3)
    batch, levels = with_masks(batch_of(rows=2)), levels_of(2, rng)
    regions, variables = regions_of(batch, model, rng), variables_of(model)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradients(head, levels):
        def loss(head, levels):
            given = {**variables, "params": {**variables["params"], "mask_head": head}}
            return model.apply(given, batch, levels, regions, method="_mask_loss").mean()

        return jax.grad(loss, (0, 1))(head, levels)

    head, maps = gradients(variables["params"]["mask_head"], levels)
    used = {**flatten_dict(head, sep="/"), "stage1": maps["stage1"]}
    for path, leaf in used.items():
        assert np.isfinite(leaf).all(), path
        assert float(jnp.abs(leaf).max()) > 0, path


def test_masks_of_detections():
    """They are those of the boxes and labels that were found, and 0 without a detection."""
    model, batch = tiny(), batch_of(rows=2)
    variables = variables_of(model)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(images, sizes):
        found = fv.detect(model, variables, images, sizes, max_detections=30, score_threshold=0.3)
        return found, model.apply(variables, images, sizes)

    found, outputs = run(batch["image"], batch["size"])
    valid = np.asarray(found.valid)
    assert 0 < valid.sum() < valid.size
    assert found.masks.shape == (2, 30, 10, 10)
    assert not np.asarray(found.masks)[~valid].any()
    masks = predict(model, variables, outputs, found.boxes, found.labels)
    np.testing.assert_allclose(np.asarray(found.masks)[valid], np.asarray(masks)[valid], atol=1e-5)
    other = predict(model, variables, outputs, found.boxes, (found.labels + 1) % 3)
    assert np.abs(np.asarray(masks) - np.asarray(other))[valid].max() > 0.01


def test_errors():
    model, batch = tiny(), batch_of(rows=2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
    losses = functools.partial(jax.eval_shape, functools.partial(model.apply, method="losses"), shapes)
    with pytest.raises(ValueError, match=r"batch must hold masks \[2, 3, h, w\], one for each box; got none"):
        losses(batch)
    with pytest.raises(ValueError, match=r"batch must hold masks \[2, 3, h, w\], .*; got \(2, 64, 96\)"):
        losses(batch | {"masks": np.zeros((2, 64, 96), bool)})


def test_names_of_older_files():
    from flaxvision.weights.names.faster_rcnn import current_names

    assert list(current_names({"roi_heads.mask_head.mask_fcn4.bias": np.zeros(1)})) == ["roi_heads.mask_head.3.0.bias"]


def test_published_weights():
    info = fv.weights.tag_of(NAME, "torchvision/COCO_V1")
    assert (info.box_ap, info.mask_ap, info.digest) == (37.9, 34.6, "sha256:bf2d0c1e")
    names = fv.weights.class_names_for(NAME, "torchvision/COCO_V1")
    assert (len(names), names[0], names[89]) == (90, "person", "toothbrush")
    assert fv.weights.preprocessing_for(NAME) == fv.weights.preprocessing_for("faster_rcnn_resnet50_fpn")


def ap50(found, truths):
    """Average precision at an IoU of 0.5 of regions as rows of pixels: the area under precision over recall.

    Args:
        found: For each image, scores [D], classes [D] and regions [D, H, W].
        truths: For each image, classes [M] and regions [M, H, W].
    """
    each = []
    for kind in {int(label) for labels, _ in truths for label in labels}:
        ranked, total = [], 0
        for (scores, labels, regions), (true_labels, true_regions) in zip(found, truths, strict=True):
            mine = true_regions[true_labels == kind].astype(bool)
            free, total = [*range(len(mine))], total + len(mine)
            for k in sorted(np.flatnonzero(labels == kind), key=lambda k: -scores[k]):
                overlaps = [(regions[k] & mine[m]).sum() / (regions[k] | mine[m]).sum() for m in free]
                hit = bool(overlaps) and max(overlaps) >= 0.5
                if hit:
                    free.pop(int(np.argmax(overlaps)))
                ranked.append((-scores[k], not hit, hit))
        hits = np.array([hit for *_, hit in sorted(ranked)], float)
        precision = np.cumsum(hits) / (np.arange(len(hits)) + 1)
        each.append((precision * hits).sum() / total)
    return np.mean(each)


@pytest.mark.slow
def test_it_learns_four_images_by_heart():
    """Every object is found, by its box and by its mask, before anything else of its class."""
    source = fv.data.on_canvases(fv.data.load_detection("shapes", "train", masks=True), 96, max_objects=6)
    examples = [source[i] for i in range(4)]
    batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
    batch["image"] = (batch["image"].astype(np.float32) - 128) / 64
    assert batch["valid"].sum() >= 8
    backbone = fv.create_backbone(
        "resnet18", stage_sizes=(1, 1, 1), features=(16, 32, 64), batch_norm="frozen", epsilon=0.0,
        stages=("stage1", "stage2", "stage3"),
    )  # fmt: skip
    model = MaskRCNN(
        backbone, num_classes=4, fpn_features=32, head_features=128, mask_features=(32, 32),
        anchor_sizes=((12,), (24,), (40,), (64,)), rpn_pre_nms_train=200, rpn_pre_nms_eval=100, rpn_post_nms_train=100,
        rpn_post_nms_eval=50, rpn_sample_size=64, box_sample_size=64,
    )  # fmt: skip
    tx = fv.train.optimizer("adam", fv.train.schedule("cosine", 3e-3, 300, warmup_steps=20), clip_norm=10.0)
    state = fv.train.create_state(model, tx, jax.random.key(0), batch["image"])
    step = jax.jit(functools.partial(fv.train.train_step, objective=fv.train.detection()))
    for _ in range(300):
        state, _ = step(state, batch, jax.random.key(1))
    find = jax.jit(functools.partial(fv.detect, model, max_detections=20))
    found = jax.device_get(find(state.variables, batch["image"], batch["size"]))
    boxes, masks = [], []
    y, x = np.arange(96)[:, None] + 0.5, np.arange(96) + 0.5
    inside = lambda b: (x > b[0]) & (x < b[2]) & (y > b[1]) & (y < b[3])
    for i in range(4):
        valid, real = found.valid[i], batch["valid"][i].astype(bool)
        ranked = (found.scores[i][valid], found.labels[i][valid])
        pasted = np.asarray(fv.ops.paste_masks(found.masks[i][valid], found.boxes[i][valid], (96, 96))) > 0.5
        drawn = [inside(b) for b in found.boxes[i][valid]]
        labels = batch["labels"][i][real]
        boxes.append(((*ranked, drawn), (labels, np.stack([inside(b) for b in batch["boxes"][i][real]]))))
        masks.append(((*ranked, pasted), (labels, batch["masks"][i][real])))
    assert ap50(*zip(*boxes, strict=True)) == pytest.approx(1.0)
    assert ap50(*zip(*masks, strict=True)) == pytest.approx(1.0)
