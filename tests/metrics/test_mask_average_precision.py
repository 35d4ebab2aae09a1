"""COCO's average precision of masks against pycocotools' own use, from files."""

import contextlib
import io
import json

import jax
import numpy as np
import pytest

from flaxvision import Detections, ops
from flaxvision import metrics as fm

K, SIDE = 2, 64


def draw(seed, images=6, objects=5, detections=9, *, ties=True):
    """A batch with discs and boxes as masks, and detections whose masks are near them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    shape = (images, objects)
    corner, side = rng.uniform(0, 40, (*shape, 2)), rng.uniform(8, 24, (*shape, 2))
    boxes = np.round(np.concatenate([corner, corner + side], -1)).astype(np.float32)
    low, high = boxes[..., None, None, :2], boxes[..., None, None, 2:]
    place = (np.stack([x, y], -1) - (low + high) / 2) / ((high - low) / 2)
    disc = rng.uniform(size=shape)[..., None, None] < 0.5
    masks = np.where(disc, (place**2).sum(-1) < 1, (np.abs(place) < 1).all(-1))
    batch = {
        "image": np.zeros((images, SIDE, SIDE, 3), np.float32),
        "boxes": boxes,
        "labels": rng.integers(0, K, shape).astype(np.int32),
        "valid": rng.uniform(size=shape) < 0.8,
        "crowd": rng.uniform(size=shape) < 0.2,
        "difficult": np.zeros(shape, bool),
        "masks": masks.astype(np.uint8),
        "index": np.arange(images, dtype=np.int32),
    }
    of = rng.integers(0, objects, (images, detections))
    found_boxes = np.take_along_axis(boxes, of[..., None], 1) + rng.normal(0, 2, (images, detections, 4))
    found_boxes[..., 2:] = np.maximum(found_boxes[..., 2:], found_boxes[..., :2] + 2)
    v, u = np.mgrid[:14, :14] / 6.5 - 1
    soft = 1 / (1 + np.exp(6 * (u**2 + v**2 - rng.uniform(0.5, 2.2, (images, detections, 1, 1)))))
    scores = rng.uniform(size=(images, detections))
    labels = np.take_along_axis(batch["labels"], of, 1)
    labels = np.where(rng.uniform(size=labels.shape) < 0.85, labels, 1 - labels)
    found = Detections(
        boxes=found_boxes.astype(np.float32),
        scores=(np.round(scores * 5) / 5 if ties else scores).astype(np.float32),
        labels=labels.astype(np.int32),
        valid=rng.uniform(size=labels.shape) < 0.9,
        masks=soft.astype(np.float32),
    )
    return batch, found


def theirs(batch, found, folder, size=(SIDE, SIDE), factor=1):
    """pycocotools as its authors use it, with masks resized by `factor` in the files."""
    from pycocotools import mask as coder
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def encoded(mask):
        made = coder.encode(np.asfortranarray(mask, np.uint8))
        return {"size": made["size"], "counts": made["counts"].decode()}

    truth, results = [], []
    for i in range(len(batch["boxes"])):
        for m in np.flatnonzero(batch["valid"][i]):
            mask = np.kron(batch["masks"][i, m], np.ones((factor, factor), np.uint8))
            kind = {"image_id": 1 + i, "category_id": 1 + int(batch["labels"][i, m]), "area": int(mask.sum())}
            kind |= {"id": 1 + len(truth), "iscrowd": int(batch["crowd"][i, m])}
            truth.append({**kind, "segmentation": encoded(mask)})
        kept = np.flatnonzero(found.valid[i])
        pasted = ops.iter_masks(found.masks[i][kept], factor * found.boxes[i][kept], size)
        for d, mask in zip(kept, pasted, strict=True):
            kind = {"image_id": 1 + i, "category_id": 1 + int(found.labels[i, d]), "score": float(found.scores[i, d])}
            results.append({**kind, "segmentation": encoded(mask)})
    images = [{"id": 1 + i, "height": size[0], "width": size[1]} for i in range(len(batch["boxes"]))]
    categories = [{"id": 1 + k, "name": str(k)} for k in range(K)]
    (folder / "truth.json").write_text(json.dumps({"images": images, "annotations": truth, "categories": categories}))
    (folder / "found.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(folder / "truth.json")
        loaded = coco.loadRes(str(folder / "found.json")) if results else COCO()
        evaluation = COCOeval(coco, loaded, "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def cases():
    for seed in range(4):
        yield pytest.param(*draw(seed, ties=seed % 2 == 0), id=f"random {seed}")
    batch, found = draw(5)
    nothing = np.zeros_like(batch["valid"])
    yield pytest.param(batch, found.replace(valid=np.zeros_like(found.valid)), id="no detections")
    yield pytest.param({**batch, "valid": nothing}, found, id="no truth")
    yield pytest.param({**batch, "crowd": ~nothing}, found, id="only crowds")
    yield pytest.param(batch, found.replace(scores=np.full_like(found.scores, 0.5)), id="one score")
    empty = found.replace(masks=np.zeros_like(found.masks))
    yield pytest.param(batch, empty, id="empty masks")


@pytest.mark.parametrize(("batch", "found"), [*cases()])
def test_masks_equal_pycocotools(batch, found, tmp_path):
    values = fm.CocoMaskAP.of(batch, found, K).compute()
    np.testing.assert_allclose([*values.values()], theirs(batch, found, tmp_path), rtol=0, atol=1e-12)


def test_the_cases_are_not_trivial():
    values = [fm.CocoMaskAP.of(*draw(seed), K).compute() for seed in range(3)]
    boxes = [fm.CocoAP.of(*draw(seed), K).compute() for seed in range(3)]
    assert all(0.1 < each["ap50"] < 0.9 for each in values)
    assert all(abs(a["ap"] - b["ap"]) > 0.01 for a, b in zip(values, boxes, strict=True))


def test_a_resized_image_is_compared_at_its_original_size(tmp_path):
    batch, found = draw(1)
    small = batch | {"scale": np.full((6, 2), 0.5, np.float32), "size": np.full((6, 2), SIDE, np.int32)}
    values = fm.CocoMaskAP.of(small, found, K).compute()
    wanted = theirs(batch, found, tmp_path, (2 * SIDE, 2 * SIDE), 2)
    np.testing.assert_allclose([*values.values()], wanted, rtol=0, atol=1e-12)


def test_the_truth_of_the_data_set_replaces_that_of_the_canvas():
    batch, found = draw(2)
    coarse = batch | {"masks": np.repeat(np.repeat(batch["masks"][:, :, ::4, ::4], 4, 2), 4, 3)}

    class Source:
        def objects(self, index):
            keys = ("boxes", "labels", "valid", "crowd", "difficult", "masks")
            return {key: batch[key][index] for key in keys}

    records = fm.CocoMaskAP.of(coarse, found, K).to_host()
    exact = fm.CocoMaskAP.of(batch, found, K).to_host()
    assert records.compute() != exact.compute()
    assert records.with_truth(Source()).compute() == exact.compute()
    boxes = fm.CocoAP.of(batch | {"boxes": batch["boxes"] + 1}, found, K).to_host()
    assert boxes.with_truth(Source()).compute() == fm.CocoAP.of(batch, found, K).compute()
    unknown = fm.CocoMaskAP.of({**coarse, "index": np.full(6, -1)}, found, K).to_host()
    with pytest.raises(ValueError, match="index must be in the batches"):
        unknown.with_truth(Source())
    halved = batch | {"scale": np.full((6, 2), 0.5, np.float32)}
    with pytest.raises(ValueError, match=r"masks of image 0 must be \(128, 128\); got \(64, 64\)"):
        fm.CocoMaskAP.of(halved, found, K).to_host().with_truth(Source())


def test_the_order_of_the_batches_does_not_matter():
    batch, found = draw(3)
    rows = lambda tree, chosen: jax.tree.map(lambda x: x[chosen], tree)
    parts = [fm.CocoMaskAP.of(rows(batch, part), rows(found, part), K).to_host() for part in ([4, 0, 5], [3, 1, 2])]
    whole = fm.CocoMaskAP.of(batch, found, K).to_host()
    merged = parts[0].merge(parts[1])
    assert merged.compute() == whole.compute()
    assert merged.per_class() == whole.per_class()
    assert merged.bootstrap(resamples=20) == whole.bootstrap(resamples=20)
    assert set(whole.per_class(["a", "b"])[0]) == {"name", "objects", "ap", "ap50"}
    low, high = whole.bootstrap(resamples=50)
    assert low < whole.compute()["ap50"] < high


def test_padding_does_not_count():
    batch, found = draw(4)
    padded = {key: np.concatenate([value, value[:2]]) for key, value in batch.items()}
    more = jax.tree.map(lambda x: np.concatenate([x, x[:2]]), found)
    padded |= {"mask": np.array([1] * 6 + [0] * 2, np.float32)}
    assert fm.CocoMaskAP.of(padded, more, K).compute() == fm.CocoMaskAP.of(batch, found, K).compute()


def test_masks_that_are_missing_or_of_another_size():
    batch, found = draw(0)
    with pytest.raises(ValueError, match=r"and found must have masks; got .* and none"):
        fm.CocoMaskAP.of(batch, found.replace(masks=None), K)
    with pytest.raises(ValueError, match=r"batch must hold masks \[6, 5, 64, 64\]"):
        fm.CocoMaskAP.of({**batch, "masks": batch["masks"][:, :, ::2]}, found, K)
    with pytest.raises(ValueError, match="got none"):
        fm.CocoMaskAP.of({key: value for key, value in batch.items() if key != "masks"}, found, K)
