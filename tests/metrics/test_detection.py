"""Average precision against pycocotools' own use and against an independent loop."""

import contextlib
import io
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision import metrics as fm
from flaxvision.metrics import average_precision as ap

K = 3


class Found(NamedTuple):
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    valid: np.ndarray


def random_boxes(rng, shape, extent=200):
    corner = rng.uniform(0, extent * 0.7, (*shape, 2))
    side = rng.choice([6.0, 30.0, 60.0, 120.0], (*shape, 1)) * rng.uniform(0.5, 1.0, (*shape, 2))
    return np.concatenate([corner, corner + side], -1).astype(np.float32)


def draw(seed, images=12, objects=6, detections=14, *, ties=True, crowds=True):
    """A batch and detections: shifted objects, duplicates, other classes and noise."""
    rng = np.random.default_rng(seed)
    batch = {
        "boxes": random_boxes(rng, (images, objects)),
        "labels": rng.integers(0, K, (images, objects)).astype(np.int32),
        "valid": rng.uniform(size=(images, objects)) < 0.7,
        "crowd": rng.uniform(size=(images, objects)) < (0.15 if crowds else 0),
        "difficult": rng.uniform(size=(images, objects)) < 0.2,
        "index": np.arange(images, dtype=np.int32),
    }
    boxes = random_boxes(rng, (images, detections))
    labels = rng.integers(0, K, (images, detections)).astype(np.int32)
    for i in range(images):
        for d in range(detections):
            if rng.uniform() < 0.7:
                m = rng.integers(objects)
                boxes[i, d] = batch["boxes"][i, m] + rng.normal(0, 4, 4)
                boxes[i, d, 2:] = np.maximum(boxes[i, d, 2:], boxes[i, d, :2] + 1)
                labels[i, d] = batch["labels"][i, m] if rng.uniform() < 0.8 else labels[i, d]
    scores = rng.uniform(size=(images, detections)).astype(np.float32)
    if ties:
        scores = np.round(scores * 4) / 4
    return batch, Found(boxes, scores, labels, rng.uniform(size=(images, detections)) < 0.85)


def nothing(batch, detections=3):
    n = len(batch["boxes"])
    return Found(
        np.zeros((n, detections, 4), np.float32),
        np.zeros((n, detections), np.float32),
        np.zeros((n, detections), np.int32),
        np.zeros((n, detections), bool),
    )


def cases():
    for seed in range(6):
        yield f"random {seed}", *draw(seed, ties=seed % 2 == 0, crowds=seed % 3 != 0)
    batch, found = draw(7)
    yield "no detections", batch, nothing(batch)
    yield "no truth", {**batch, "valid": np.zeros_like(batch["valid"])}, found
    yield "nothing at all", {**batch, "valid": np.zeros_like(batch["valid"])}, nothing(batch)
    yield "only crowds", {**batch, "crowd": np.ones_like(batch["crowd"])}, found
    yield "one score", batch, found._replace(scores=np.full_like(found.scores, 0.5))
    yield "one class", {**batch, "labels": np.zeros_like(batch["labels"])}, found
    yield (
        "the truth",
        batch,
        Found(batch["boxes"], np.ones(batch["labels"].shape, np.float32), batch["labels"], batch["valid"]),
    )
    many = draw(8, images=4, objects=20, detections=130)
    yield "more than 100 detections", *many


CASES = [pytest.param(batch, found, id=name) for name, batch, found in cases()]


def theirs(batch, found, folder):
    """pycocotools as its authors use it: a file of the truth, `loadRes` of a file of results."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, results = [], []
    for i in range(len(batch["boxes"])):
        for box, label, valid, crowd in zip(
            batch["boxes"][i], batch["labels"][i], batch["valid"][i], batch["crowd"][i], strict=True
        ):
            if valid:
                x1, y1, x2, y2 = map(float, box)
                entry = {"image_id": 10 + i, "category_id": 1 + int(label), "bbox": [x1, y1, x2 - x1, y2 - y1]}
                area = float((box[2] - box[0]) * (box[3] - box[1]))
                truth.append({**entry, "id": 100 + len(truth), "area": area, "iscrowd": int(crowd)})
        for box, score, label, valid in zip(*(x[i] for x in found), strict=True):
            if valid:
                x1, y1, x2, y2 = map(float, box)
                entry = {"image_id": 10 + i, "category_id": 1 + int(label), "bbox": [x1, y1, x2 - x1, y2 - y1]}
                results.append({**entry, "score": float(score)})
    images = [{"id": 10 + i, "width": 500, "height": 500} for i in range(len(batch["boxes"]))]
    categories = [{"id": 1 + k, "name": str(k)} for k in range(K)]
    (folder / "truth.json").write_text(json.dumps({"images": images, "annotations": truth, "categories": categories}))
    (folder / "found.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(folder / "truth.json")
        loaded = coco.loadRes(str(folder / "found.json")) if results else COCO()
        evaluation = COCOeval(coco, loaded, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize(("batch", "found"), CASES)
def test_coco_equals_pycocotools(batch, found, tmp_path):
    stats = theirs(batch, found, tmp_path).stats
    values = fm.CocoAP.of(batch, found, K).compute()
    assert list(values) == list(ap.COCO_NAMES)
    np.testing.assert_allclose([*values.values()], stats, rtol=0, atol=1e-12)


def test_the_cases_are_not_trivial(tmp_path):
    """Most figures of the random cases are defined and neither 0 nor 1."""
    values = [list(fm.CocoAP.of(*draw(seed), K).compute().values()) for seed in range(3)]
    assert np.mean((np.array(values) > 0.02) & (np.array(values) < 0.98)) > 0.9


def voc_by_a_loop(batch, found, label, eleven_points):
    """Everingham's algorithm, written without arrays: the devkit's VOCevaldet with continuous boxes."""
    pool, total = [], 0
    taken = set()
    for i in range(len(batch["boxes"])):
        for m in range(batch["boxes"].shape[1]):
            if batch["valid"][i, m] and batch["labels"][i, m] == label and not batch["difficult"][i, m]:
                total += 1
        for d in range(found.boxes.shape[1]):
            if found.valid[i, d] and found.labels[i, d] == label:
                pool.append((-float(found.scores[i, d]), i, d))
    if not total:
        return None
    pool.sort()
    recalls, precisions, tp, fp = [], [], 0, 0
    for _, i, d in pool:
        best, which = -1.0, None
        for m in range(batch["boxes"].shape[1]):
            if not batch["valid"][i, m] or batch["labels"][i, m] != label:
                continue
            a, b = found.boxes[i, d].astype(float), batch["boxes"][i, m].astype(float)
            width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            shared = max(width, 0) * max(height, 0)
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
            if shared / union > best:
                best, which = shared / union, m
        if best >= 0.5:
            if batch["difficult"][i, which]:
                continue
            if (i, which) in taken:
                fp += 1
            else:
                taken.add((i, which))
                tp += 1
        else:
            fp += 1
        recalls.append(tp / total)
        precisions.append(tp / (tp + fp))
    if eleven_points:
        total = 0.0
        for t in range(11):
            total += max([p for r, p in zip(recalls, precisions, strict=True) if r >= t / 10 - 1e-12], default=0.0) / 11
        return total
    area, before = 0.0, 0.0
    for j, recall in enumerate(recalls):
        area += (recall - before) * max(precisions[j:])
        before = recall
    return area


@pytest.mark.parametrize("eleven_points", [False, True], ids=["area", "eleven"])
@pytest.mark.parametrize("seed", range(6))
def test_voc_equals_a_loop(seed, eleven_points):
    batch, found = draw(seed, crowds=False, ties=seed % 2 == 0)
    expected = [voc_by_a_loop(batch, found, label, eleven_points) for label in range(K)]
    metric = fm.VocAP.of(batch, found, K, protocol="voc_11" if eleven_points else "voc_area")
    assert metric.compute() == {"map50": pytest.approx(np.mean(expected), abs=1e-12)}
    assert 0.05 < np.mean(expected) < 0.95


def test_the_figures_of_voc_by_hand():
    """Two objects: found, false, found, by falling score. Precisions 1, 1/2, 2/3 at recalls 1/2, 1/2, 1."""
    boxes = np.array([[[0, 0, 10, 10], [20, 20, 30, 30]]], np.float32)
    batch = {"boxes": boxes, "labels": np.zeros((1, 2), np.int32), "valid": np.ones((1, 2), bool)}
    found = Found(
        np.array([[[0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 30, 30]]], np.float32),
        np.array([[0.9, 0.8, 0.7]], np.float32),
        np.zeros((1, 3), np.int32),
        np.ones((1, 3), bool),
    )
    assert fm.VocAP.of(batch, found, 1).compute()["map50"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    points = fm.VocAP.of(batch, found, 1, protocol="voc_11").compute()["map50"]
    assert points == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert np.isnan(fm.VocAP.of({**batch, "valid": np.zeros((1, 2), bool)}, found, 1).compute()["map50"])


def merged(batch, found, order, size):
    """The metric over batches of a size, padded with rows of nonsense, in an order."""
    total = None
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        padded = np.concatenate([rows, np.zeros(size - len(rows), int)])
        part = {key: value[padded] for key, value in batch.items()}
        part["mask"] = (np.arange(size) < len(rows)).astype(np.float32)
        total = fm.merge(total, fm.to_host({"coco": fm.CocoAP.of(part, Found(*(x[padded] for x in found)), K)}))
    return fm.compute(total)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_batches_do_not_matter(seed):
    batch, found = draw(seed, ties=True)
    whole = fm.compute({"coco": fm.CocoAP.of(batch, found, K)})
    order = np.random.default_rng(0).permutation(12)
    for size, rows in ((12, order), (5, order), (1, np.arange(12)), (16, order)):
        assert merged(batch, found, rows, size) == whole


def test_an_image_that_is_evaluated_twice_is_an_error():
    batch, found = draw(0)
    metric = fm.CocoAP.of(batch, found, K).to_host()
    with pytest.raises(ValueError, match="every image must be evaluated once; got image 0 2 times"):
        metric.merge(metric).compute()


def test_original_pixels():
    """With a scale, the figures are those of the original boxes, and `area` decides what is small."""
    batch, found = draw(3)
    scale = np.random.default_rng(0).uniform(0.3, 2.0, (12, 2)).astype(np.float32)
    xyxy = scale[:, None, [1, 0, 1, 0]]
    moved = {**batch, "boxes": batch["boxes"] * xyxy, "scale": scale}
    values = fm.CocoAP.of(moved, found._replace(boxes=found.boxes * xyxy), K).compute()
    expected = fm.CocoAP.of(batch, found, K).compute()
    assert values == pytest.approx(expected, abs=1e-6)
    small = fm.CocoAP.of({**batch, "area": np.full(batch["labels"].shape, 5.0)}, found, K).compute()
    assert small["ap_large"] == -1 < small["ap_small"]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_any_number_of_devices(devices, parallel):
    """The accumulators of a compiled eval step, on 1 and on 8 devices: the figures of NumPy."""
    import flaxvision as fv

    batch, found = draw(5, images=16)
    rows = {**batch, **{f"found_{k}": v for k, v in found._asdict().items()}, "mask": np.ones(16, np.float32)}
    rows["mask"][11:] = 0

    def step(state, batch, *, axis_name=None):
        found = Found(*(batch[f"found_{k}"] for k in Found._fields))
        metrics = {"coco": fm.CocoAP.of(batch, found, K), "voc": fm.VocAP.of(batch, found, K)}
        return {k: m if axis_name is None else m.all_reduce(axis_name) for k, m in metrics.items()}

    mesh = jax.devices()[:devices]
    compiled = (
        fv.train.jit_step(step, fv.train.make_mesh(mesh)) if parallel == "jit" else fv.train.pmap_step(step, mesh)
    )
    metrics = compiled({"state": jnp.zeros(())}, rows)
    part = {k: v[:11] for k, v in batch.items()}
    few = Found(*(x[:11] for x in found))
    expected = {"coco": fm.CocoAP.of(part, few, K), "voc": fm.VocAP.of(part, few, K)}
    assert fm.compute(metrics) == fm.compute(expected)


@pytest.mark.parametrize("figure", ["ap", "ap50", "map50"])
def test_the_bootstrap_interval(figure):
    batch, found = draw(2, images=40)
    records = fm.CocoAP.of(batch, found, K).to_host()
    point = {**records.coco(), "map50": records.voc(eleven_points=False)}[figure]
    low, high = records.bootstrap(figure, resamples=300)
    assert low < point < high
    assert 0.01 < high - low < 0.4
    assert (low, high) == records.bootstrap(figure, resamples=300)
    # With every image once, the resampled figure is the figure.
    evaluation = ap.coco_evaluation(records.records, K)
    matched = ap.coco_outcomes(evaluation)
    matched = {"ap": matched, "ap50": matched[:1], "map50": [ap.match_classes(records.records, K, 0.5)]}[figure]
    once = ap.weighted_map(matched, np.ones(40, int), figure != "map50")
    assert once == pytest.approx(point, abs=1e-12)
    # Twice is the same as doubling every image.
    twice = ap.weighted_map(matched, np.full(40, 2), figure != "map50")
    assert twice == pytest.approx(point, abs=0.01)


def test_bootstrap_arguments():
    records = fm.CocoAP.of(*draw(0), K).to_host()
    for options, message in (
        ({"figure": "ap75"}, "figure must be 'ap', 'ap50' or 'map50'; got 'ap75'"),
        ({"resamples": 0}, "resamples must be at least 1; got 0"),
        ({"level": 1.0}, "level must be strictly between 0 and 1; got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            records.bootstrap(**options)
    with pytest.raises(ValueError, match="must have seen at least one image; got none"):
        fm.DetectionRecords([], "coco", K).bootstrap()


def test_the_table_of_classes(tmp_path):
    batch, found = draw(4)
    batch["labels"][batch["labels"] == 2] = 1
    records = fm.CocoAP.of(batch, found, K).to_host()
    table = records.per_class(["cat", "dog", "cow"])
    assert [row["name"] for row in table] == ["cat", "dog", "cow"]
    assert table[2]["objects"] == 0
    assert np.isnan([table[2][key] for key in ("ap", "ap50", "voc")]).all()
    values = records.coco()
    assert np.nanmean([row["ap"] for row in table]) == pytest.approx(values["ap"])
    assert np.nanmean([row["ap50"] for row in table]) == pytest.approx(values["ap50"])
    assert np.nanmean([row["voc"] for row in table]) == pytest.approx(records.voc(eleven_points=False))
    assert records.curves()[2] is None
    recall, precision = records.curves()[0]
    assert (np.diff(recall) >= 0).all()
    assert recall.shape == precision.shape


def test_kinds_of_false_positives():
    boxes = [[0, 0, 10, 10], [40, 40, 50, 50], [80, 0, 90, 10], [0, 80, 10, 90], [60, 60, 70, 70], [60, 0, 70, 10]]
    batch = {
        "boxes": np.array([boxes], np.float32),
        "labels": np.array([[0, 1, 0, 0, 0, 0]], np.int32),
        "valid": np.ones((1, 6), bool),
        "difficult": np.array([[False, False, False, True, False, False]]),
    }
    found_boxes = [
        [0, 0, 10, 10],  # correct
        [0, 1, 10, 11],  # duplicate
        [80, 5, 90, 15],  # localization: IoU 1/3
        [0, 80, 10, 90],  # difficult: does not count
        [40, 40, 50, 50],  # confusion with class 1
        [100, 100, 110, 110],  # background, but the class has only 4 objects that count
    ]
    found = Found(
        np.array([found_boxes], np.float32),
        np.array([[0.9, 0.8, 0.7, 0.65, 0.6, 0.5]], np.float32),
        np.zeros((1, 6), np.int32),
        np.ones((1, 6), bool),
    )
    counts = fm.CocoAP.of(batch, found, 2).to_host().false_positives()
    assert {kind: value.tolist() for kind, value in counts.items()} == {
        "correct": [1, 0],
        "localization": [1, 0],
        "duplicate": [1, 0],
        "confusion": [1, 0],
        "background": [0, 0],
    }
    far = found._replace(boxes=found.boxes + 1000)
    assert fm.CocoAP.of(batch, far, 2).to_host().false_positives()["background"].tolist() == [4, 0]


def test_shapes_that_do_not_fit():
    batch, found = draw(0)
    with pytest.raises(ValueError, match=r"found.scores must have the 12 rows of the batch; got shape \(5, 14\)"):
        fm.CocoAP.of(batch, found._replace(scores=found.scores[:5]), K)
