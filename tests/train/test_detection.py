"""The objective of detection: losses, keys of rows, padding, and average precision in evaluation."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

import flaxvision as fv
from flaxvision.layers import batch_context
from flaxvision.layers.batch_context import current_batch
from flaxvision.train.objectives.detection import average_precision
from tests.train.toy_detector import ToyDetector

ROWS = 16


@struct.dataclass
class Keys(fv.metrics.Accumulator):
    """Carries the keys out of the step."""

    data: object


def batch(rows=ROWS, seed=0, masked=()):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 20, (rows, 3, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(4, 12, (rows, 3, 2))], -1).astype(np.float32)
    mask = np.ones(rows, np.float32)
    mask[list(masked)] = 0
    return {
        "image": rng.normal(size=(rows, 32, 32, 3)).astype(np.float32),
        "boxes": boxes,
        "labels": rng.integers(0, 2, (rows, 3)).astype(np.int32),
        "valid": rng.uniform(size=(rows, 3)) < 0.7,
        "crowd": np.zeros((rows, 3), bool),
        "difficult": np.zeros((rows, 3), bool),
        "size": np.full((rows, 2), 32, np.int32),
        "index": np.arange(rows, dtype=np.int32),
        "mask": mask,
    }


@pytest.fixture(scope="module")
def model():
    return ToyDetector()


def state_of(model, tx=None):
    sample = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return fv.train.create_state(model, tx or optax.sgd(0.05, 0.9), jax.random.key(0), sample)


def steps(model, compile_step, data, count=3, **options):
    step = compile_step(partial(fv.train.train_step, objective=fv.train.detection(), **options))
    state, records = state_of(model), []
    for _ in range(count):
        state, metrics = step(state, data, jax.random.key(7))
        records.append(fv.metrics.compute(metrics))
    return jax.device_get(state.params), records


def test_the_loss_is_the_sum_of_the_named_losses(model):
    state = state_of(model)

    def losses(weights):
        objective = fv.train.detection(weights=weights)
        loss, (metrics, _) = objective(model.apply, state.params, state.collections, batch(), None, False)
        assert float(loss) == pytest.approx(fv.metrics.compute(metrics)["loss"], rel=1e-6)
        return fv.metrics.compute(metrics)

    plain = losses(None)
    assert set(plain) == {"loss", "class", "box"}
    assert plain["loss"] == pytest.approx(plain["class"] + plain["box"], rel=1e-6)
    assert losses({"box": 3.0})["loss"] == pytest.approx(plain["class"] + 3 * plain["box"], rel=1e-6)
    with pytest.raises(ValueError, match="weights must be for the losses box, class; got 'cls'"):
        losses({"cls": 1.0})
    less = {k: v for k, v in batch().items() if k != "valid"}
    with pytest.raises(ValueError, match=r"batch must hold image, boxes, labels and valid; got .* without valid"):
        fv.train.detection()(model.apply, {}, {}, less, None, False)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [(), (3, 15)], ids=["full", "padded"])
def test_the_devices_do_not_matter(model, masked):
    """The samples are drawn by the row of the global batch: jit on 1 and 8 devices and pmap take the same steps."""
    data = batch(masked=masked)
    one = steps(model, partial(fv.train.jit_step, mesh=fv.train.make_mesh(jax.devices()[:1])), data)
    others = {
        "jit on 8": steps(model, fv.train.jit_step, data),
        "pmap on 8": steps(model, fv.train.pmap_step, data),
    }
    for params, records in others.values():
        for mine, theirs in zip(records, one[1], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, one[0])


def test_the_samples_differ_from_step_to_step_and_from_row_to_row():
    def objective(apply_fn, params, collections, batch, rng, train):
        loss = jnp.sum(params["w"]) * 0
        data = jax.random.key_data(current_batch().row_keys)
        return loss, ({"loss": fv.metrics.Mean.of(jnp.zeros(ROWS)), "keys": Keys(data)}, collections)

    state = fv.train.TrainState(
        jnp.zeros((), jnp.int32),
        {"w": jnp.ones(2)},
        {},
        optax.sgd(0.1).init({"w": jnp.ones(2)}),
        None,
        None,
        optax.sgd(0.1),
    )
    step = fv.train.jit_step(partial(fv.train.train_step, objective=objective))
    seen = []
    for _ in range(2):
        state, metrics = step(state, {"image": np.zeros((ROWS, 1))}, jax.random.key(7))
        seen.append(np.asarray(metrics["keys"].data))
    assert len({tuple(row) for data in seen for row in data}) == 2 * ROWS
    with batch_context(row_keys=None):
        assert current_batch().row_keys is None


def test_padded_rows_may_hold_anything(model):
    clean, dirty = batch(masked=(2, 9)), batch(masked=(2, 9))
    for row in (2, 9):
        for key in ("image", "boxes"):
            dirty[key][row] = np.nan
        dirty["valid"][row] = True
        dirty["labels"][row] = 77
    a, b = (steps(model, fv.train.jit_step, data) for data in (clean, dirty))
    assert a[1] == b[1]
    jax.tree.map(np.testing.assert_array_equal, a[0], b[0])


def test_accumulated_parts_take_the_keys_of_their_rows(model):
    data = batch()
    whole = steps(model, partial(fv.train.jit_step, mesh=fv.train.make_mesh(jax.devices()[:1])), data, 1, accumulate=2)
    again = steps(model, fv.train.pmap_step, data, 1, accumulate=2)
    assert again[1][0] == pytest.approx(whole[1][0], rel=1e-5)


def evaluate(model, state, data, size, compile_step):
    objective = fv.train.detection(measure=average_precision(model, 2, score_threshold=0.01, max_detections=20))
    step = compile_step(partial(fv.train.eval_step, objective=objective))
    parts = []
    for start in range(0, len(data["image"]), size):
        part = {key: value[start : start + size] for key, value in data.items()}
        missing = size - len(part["image"])
        part = {k: np.concatenate([v, np.repeat(v[:1], missing, 0)]) for k, v in part.items()}
        part["mask"] = part["mask"] * (np.arange(size) < size - missing)
        parts.append(part)
    return fv.train.evaluate(state, step, parts)


def test_evaluation_depends_neither_on_batches_nor_on_devices(model):
    data, state = batch(20, seed=1), state_of(model)
    values = evaluate(model, state, data, 20, partial(fv.train.jit_step, mesh=fv.train.make_mesh(jax.devices()[:1])))
    assert {"loss", "class", "box", "coco_ap", "coco_ap50", "coco_ar100"} <= set(values)
    assert values["coco_ar100"] > 0
    for size, compile_step in ((8, fv.train.jit_step), (24, fv.train.pmap_step)):
        found = evaluate(model, state, data, size, compile_step)
        # A loss that is divided by a count over the batch depends on the batches; the average precision does not.
        same = values.keys() if size == 24 else {key for key in values if "coco" in key}
        assert {key: found[key] for key in same} == pytest.approx({key: values[key] for key in same}, rel=1e-5)


def test_difficult_objects_count_for_coco_and_not_for_voc():
    """A detector that finds the difficult object first, and one that does not find it."""

    class Fixed:
        def apply(self, variables, images, sizes):
            return variables["scores"]

        def candidates(self, outputs, sizes):
            boxes = jnp.asarray([[[0.0, 0, 9, 9], [20, 20, 30, 30]]])
            return fv.Candidates(boxes, outputs, jnp.ones((1, 2), bool))

    data = {
        "image": jnp.zeros((1, 32, 32, 3)),
        "boxes": jnp.asarray([[[0.0, 0, 9, 9], [20, 20, 30, 30]]]),
        "labels": jnp.zeros((1, 2), jnp.int32),
        "valid": jnp.ones((1, 2), bool),
        "difficult": jnp.asarray([[False, True]]),
    }
    measure = average_precision(Fixed(), 1, metrics={"coco": fv.metrics.CocoAP, "voc": fv.metrics.VocAP})
    both = fv.metrics.compute(measure(Fixed().apply, {"scores": jnp.asarray([[[0.5], [0.9]]])}, data))
    one = fv.metrics.compute(measure(Fixed().apply, {"scores": jnp.asarray([[[0.5], [0.0]]])}, data))
    assert both["voc_map50"] == one["voc_map50"] == 1
    assert both["coco_ap50"] == pytest.approx(1)
    assert one["coco_ap50"] == pytest.approx(51 / 101)


@pytest.mark.slow
def test_a_detector_learns(model):
    """Four images by heart: the losses fall and the boxes are found."""
    data = batch(8, seed=3)
    data["valid"][:] = [True, False, False]
    step = fv.train.jit_step(partial(fv.train.train_step, objective=fv.train.detection()))
    state = state_of(ToyDetector(features=24, sampled=16), fv.train.optimizer("adam", 0.01))
    first = last = None
    for _ in range(120):
        state, metrics = step(state, data, jax.random.key(0))
        last = fv.metrics.compute(metrics)["loss"]
        first = first or last
    assert last < 0.3 * first
    found = evaluate(ToyDetector(features=24, sampled=16), state, data, 8, fv.train.jit_step)
    assert found["coco_ap50"] > 0.5


@pytest.mark.slow
def test_a_step_compiles_once_for_each_canvas(model):
    """Fifty photographs of fifty sizes: as many traces as canvases, in training and in evaluation."""

    class Photos:
        name, classes, fingerprint = "photos", ("a", "b"), "photos"
        sizes = np.array([[20 + i, 20 + (7 * i) % 50] for i in range(50)])
        counts = np.arange(50) % 3

        def __len__(self):
            return 50

        def __getitem__(self, index, /):
            height, width = self.sizes[index]
            count = self.counts[index]
            objects = {"labels": np.zeros(count, np.int32), "valid": np.ones(count, bool)}
            boxes = np.tile(np.array([[1, 2, width - 3, height - 4]], np.float32), (count, 1))
            return {"image": np.full((height, width, 3), index, np.uint8), "boxes": boxes, **objects}

    source = fv.data.on_canvases(Photos(), ((32, 48), (48, 32), (48, 48)))
    assert len({tuple(size) for size in Photos.sizes}) == 50
    assert set(source.canvas) == {0, 1, 2}
    transform = fv.data.augment.make_transform(fv.data.augment.random_flip)
    measure = average_precision(model, 2, score_threshold=0.01, max_detections=5)
    options = {"objective": fv.train.detection(measure=measure)}
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(fv.train.train_step, n=3)
    train = fv.train.jit_step(partial(traced, transform=transform, **options))
    traced = chex.assert_max_traces(fv.train.eval_step, n=3)
    standardized = fv.data.augment.make_transform()
    evaluate = fv.train.jit_step(partial(traced, transform=standardized, **options))
    state, found = state_of(model), set()
    with fv.data.train_batches(source, 8, seed=0).from_step(0) as batches:
        for _ in range(20):
            batch = next(batches)
            found.add(batch["image"].shape)
            state, _ = train(state, batch, jax.random.key(0))
    assert len(found) == 3
    records = fv.train.accumulate(state, evaluate, fv.data.eval_batches(source, 8))["coco"].records
    assert [record["index"] for record in records] == list(range(50))
    for record, size in zip(records, Photos.sizes, strict=True):
        np.testing.assert_allclose(
            record["boxes"][:, 2:], np.tile(size[None, ::-1] - [3, 4], (len(record["boxes"]), 1)), atol=1e-3
        )


def test_frozen_parameters_stay(model):
    tx = fv.train.optimizer("momentum", 0.1, weight_decay=0.1, clip_norm=1.0, frozen=("conv0/*", "norm0/*"))
    step = fv.train.jit_step(partial(fv.train.train_step, objective=fv.train.detection()))
    before = jax.device_get(state_of(model).params)
    state, _ = step(state_of(model, tx), batch(), jax.random.key(0))
    after = jax.device_get(state.params)
    for name in before:
        same = jax.tree.map(np.array_equal, before[name], after[name])
        assert all(jax.tree.leaves(same)) == (name in ("conv0", "norm0")), name
    assert len(jax.tree.leaves(state.opt_state)) < 2 * len(jax.tree.leaves(before))
    for patterns, message in (
        (("backbone/*",), r"frozen must match a parameter, such as .*; got 'backbone/\*'"),
        (("*",), r"frozen must leave a parameter to train; got \('\*',\)"),
    ):
        with pytest.raises(ValueError, match=message):
            state_of(model, fv.train.optimizer("sgd", 0.1, frozen=patterns))
