"""Every operator lowers for cpu, cuda and tpu, without the host, and its batch size may be symbolic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import flaxvision as fv
from flaxvision import ops
from parity import operators

A, R = 24, 6
FLOAT, INT, BOOL = jnp.float32, jnp.int32, jnp.bool_


def gradient(f):
    return lambda *args: jax.grad(lambda *args: jnp.sum(f(*args)))(*args)


def select(boxes, scores, valid):
    return fv.select_detections(fv.Candidates(boxes[None], scores[None], valid[None]), max_detections=5).boxes[0]


BOXES, SCORES, VALID, MAP = ((A, 4), FLOAT), ((A,), FLOAT), ((A,), BOOL), ((8, 9, 4), FLOAT)
CASES = {
    "nms": (lambda b, s, v: ops.nms(b, s, v, iou_threshold=0.5, max_outputs=9), BOXES, SCORES, VALID),
    "nms by class": (
        lambda b, s, v, k: ops.nms(b, s, v, iou_threshold=0.5, max_outputs=9, labels=k),
        *(BOXES, SCORES, VALID, ((A,), INT)),
    ),
    "soft_nms": (lambda b, s, v: ops.soft_nms(b, s, v, max_outputs=9), BOXES, SCORES, VALID),
    "top_k": (lambda s, v: ops.top_k(s, v, 5), SCORES, VALID),
    "match": (
        lambda a, b, v: ops.match(ops.box_iou(a, b), v, low=0.3, high=0.7, allow_low_quality=True),
        *(BOXES, BOXES, VALID),
    ),
    "sample": (lambda s: ops.sample(jax.random.key(0), s > 0.5, size=8, positive_fraction=0.5), SCORES),
    "ciou": (gradient(lambda a, b: ops.paired_iou(a, b, "ciou")), BOXES, BOXES),
    "coding": (lambda a, b: ops.decode_boxes(ops.encode_boxes(a, b), b), BOXES, BOXES),
    "roi_align": (gradient(lambda f, r: ops.roi_align(f, r, 3)), MAP, ((R, 4), FLOAT)),
    "multiscale_roi_align": (
        lambda f, r: ops.multiscale_roi_align([f, f[::2, ::2]], (4, 8), r, 3),
        *(MAP, ((R, 4), FLOAT)),
    ),
    "roi_max_pool": (gradient(lambda f, r: ops.roi_max_pool(f, r, 3)), MAP, ((R, 4), FLOAT)),
    "select_detections": (select, BOXES, ((A, 3), FLOAT), VALID),
}


@pytest.mark.parametrize("name", CASES)
def test_platforms(name):
    function, *arguments = CASES[name]
    (n,) = export.symbolic_shape("n")
    like = [jax.ShapeDtypeStruct((n, *shape), dtype) for shape, dtype in arguments]
    program = export.export(jax.jit(jax.vmap(function)), platforms=["cpu", "cuda", "tpu"])(*like)
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert "callback" not in program.mlir_module()


def test_an_exported_program_gives_the_same():
    cases = [operators.nms_case(seed) for seed in range(3)]
    arguments = [np.stack([case[key] for case in cases]) for key in ("boxes", "scores", "valid")]
    run = jax.jit(jax.vmap(lambda b, s, v: ops.nms(b, s, v, iou_threshold=0.5, max_outputs=9)))
    (n,) = export.symbolic_shape("n")
    like = [jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype) for x in arguments]
    found = export.export(run, platforms=["cpu", "cuda", "tpu"])(*like).call(*arguments)
    jax.tree.map(np.testing.assert_array_equal, found, run(*arguments))
