"""A run of several processes in one work directory: stopped, resumed by other numbers of them, refused."""

import json

import numpy as np
import pytest

import flaxvision as fv
from tests import multiprocess

PROGRAM = """
import dataclasses, json, os, signal, sys, zlib
from functools import partial
import numpy as np
import flaxvision as fv

folder, stop_at = sys.argv[1], int(sys.argv[2])

@dataclasses.dataclass
class Config:
    seed: int = 0

class Terminate:
    def on_step(self, step, state, metrics):
        if step == stop_at and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

fv.train.open_workdir(folder, Config())
share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
source = fv.data.subset(fv.data.load("digits", "train"), np.arange(203), "part")
transform = fv.data.augment.make_transform(size=(8, 8), mean=(0.3,), std=(0.4,))
train_step, eval_step = fv.train.compile_steps(
    fv.train.classification(), train_transform=transform, eval_transform=transform, use_ema=True
)
state = fv.train.create_state(
    fv.create_model("mlp", num_classes=10, features=(8,)),
    fv.train.optimizer("adam", 0.01),
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 8, 8, 1), "float32"),
    ema_decay=0.9,
)
result = fv.train.fit_in_workdir(
    folder, state, train_step, fv.data.train_batches(source, 16, seed=5, **share), model="mlp", overrides={},
    num_steps=12, rng=jax.random.key(1), eval_every=4, log_every=3, callbacks=[Terminate()],
    evaluate=fv.train.Evaluation(eval_step, fv.data.eval_batches(source, 16, **share)),
)
leaves = jax.device_get(jax.tree.leaves(result.state))
print(json.dumps({
    "step": int(result.state.step),
    "stopped": result.stopped,
    "metrics": result.metrics,
    "bits": [zlib.crc32(np.ascontiguousarray(x).tobytes()) for x in leaves],
    "sums": [float(np.abs(x).sum()) for x in leaves],
}))
"""


def run(folder, count, stop_at=0, devices=1):
    outputs = multiprocess.run(PROGRAM, count, devices, arguments=[folder, stop_at])
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert all(result == results[0] for result in results)
    return results[0], outputs


def records_of(folder):
    records = fv.train.read_records(folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in records]


@pytest.mark.slow
def test_sigterm_on_one_process_stops_all_and_others_go_on(tmp_path):
    whole, _ = run(tmp_path / "whole", 2, devices=2)
    assert (whole["step"], whole["stopped"]) == (12, None)
    first, outputs = run(tmp_path / "stopped", 2, stop_at=5, devices=2)
    assert first["stopped"] == "SIGTERM"
    assert 5 <= first["step"] <= 11
    assert "stopped by SIGTERM after step" in outputs[0]
    assert "stopped by" not in outputs[1]
    again, _ = run(tmp_path / "stopped", 2, devices=2)
    assert again == whole  # bit for bit
    assert records_of(tmp_path / "stopped") == records_of(tmp_path / "whole")
    assert [r["step"] for r in records_of(tmp_path / "whole")] == [3, 4, 4, 6, 8, 8, 9, 12, 12]

    for count, stop_at in ((2, 2), (4, 8)):
        part, _ = run(tmp_path / "changing", count, stop_at, devices=1)
        assert stop_at <= part["step"] < 12
    alone, _ = run(tmp_path / "changing", 1)
    np.testing.assert_allclose(alone["sums"], whole["sums"], rtol=1e-5)
    assert alone["metrics"] == pytest.approx(whole["metrics"], rel=1e-5)
