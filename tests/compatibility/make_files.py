"""Writes the files that the tests of this folder read, with the flaxvision that is imported.

    JAX_PLATFORMS=cpu PYTHONPATH=. python tests/compatibility/make_files.py

`before.zip`, `parameters.json` and `orders.json` were written by commit f14330c (version 0.1.0.dev0, jax 0.10.1) and
are never written again: they prove that what users have saved still loads. A later change of a format gets files of
its own.

`before.zip` holds:

* `bundle/`: a small `resnet20_cifar` as a bundle.
* `checkpoints/`: a train state of the same network after two steps with momentum and a moving average.
* `run/`: a run of `experiments/mnist.py` that SIGTERM stopped between two training records.
* `expected.npz`: images, the networks' logits, and the parameters of the uninterrupted run.
"""

import hashlib
import itertools
import json
import os
import signal
import sys
import tempfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import flaxvision as fv

FOLDER = Path(__file__).parent
TINY = {"stage_sizes": (1, 1, 1), "features": (4, 4, 4), "num_classes": 3}
RUN = {"model": "mlp", "hidden": (3,), "epochs": 4.0, "batch_size": 128, "log_every": 4, "progress": False}
STOP_AT = 19  # three steps after a record, in the middle of the second epoch


def noise(rng, tree):
    """Values that no initializer gives, positive for variances."""
    return jax.tree.map(lambda leaf: np.float32(rng.uniform(0.2, 1.2, leaf.shape)), tree)


def write_bundle(folder, expected):
    rng = np.random.default_rng(0)
    model = fv.create_model("resnet20_cifar", **TINY)
    images = np.float32(rng.normal(size=(2, 16, 16, 3)))
    variables = noise(rng, jax.eval_shape(model.init, jax.random.key(0), images))
    fv.weights.save(folder / "tiny.safetensors", variables, name="resnet20_cifar", metadata={"accuracy": 0.5}, **TINY)
    expected |= {"images": images, "bundle": np.asarray(model.apply(variables, images))}


def write_checkpoints(folder, expected):
    model = fv.create_model("resnet20_cifar", **TINY)
    tx = fv.train.optimizer("momentum", 0.1)
    images = expected["images"]
    sample = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    state = fv.train.create_state(model, tx, jax.random.key(1), sample, ema_decay=0.5)
    step, _ = fv.train.compile_steps(fv.train.classification(), use_ema=True)
    batch = {"image": images, "label": np.array([0, 2], np.int32)}
    for _ in range(2):
        state, _ = step(state, batch, jax.random.key(2))
    manifest = {"model": "resnet20_cifar", "overrides": TINY}
    with fv.checkpoint.Checkpoints(folder, manifest=manifest) as checkpoints:
        checkpoints.save(2, state, progress={"note": [1, "a"]}, metrics={"accuracy": 0.25}, wait=True)
    variables = {"params": state.params, **state.collections}
    expected["checkpoint"] = np.asarray(model.apply(variables, images))
    expected["checkpoint_ema"] = np.asarray(model.apply(state.ema, images))


def write_run(folder, expected):
    sys.path.insert(0, str(Path(fv.__file__).parents[1] / "experiments"))
    import mnist

    def stopping(step):
        def stopped(state, batch, rng):
            if int(state.step) + 1 == STOP_AT:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(state, batch, rng)

        return stopped

    compile_steps = fv.train.compile_steps
    fv.train.compile_steps = lambda *args, **options: (lambda pair: (stopping(pair[0]), pair[1]))(
        compile_steps(*args, **options)
    )
    config = mnist.Config(workdir=str(folder), **RUN)
    assert mnist.main(config) == 0
    fv.train.compile_steps = compile_steps
    with tempfile.TemporaryDirectory() as whole:
        assert mnist.main(mnist.Config(workdir=whole, **RUN)) == 0
        found = fv.checkpoint.Checkpoints(Path(whole) / "checkpoints")
        _, state = max((entry.step, entry) for entry in found._entries())
        from orbax.checkpoint import v1

        arrays = v1.load_checkpointables(state.path, {"state": None})["state"]
        for name in ("params/hidden1/bias", "params/head/bias", "params/head/kernel"):
            expected[f"run/{name}"] = arrays[name]
        expected["run_records"] = np.array(Path(whole, "metrics.jsonl").read_text())


def digest_of(name, **overrides):
    info, model = fv.model_info(name), fv.create_model(name, **overrides)
    shape = (1, *info.input_size, info.channels) if len(info.input_size) == 2 else (1, *info.input_size)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
    leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
    lines = sorted(f"{jax.tree_util.keystr(p, simple=True, separator='/')} {s.dtype}{list(s.shape)}" for p, s in leaves)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def write_orders():
    """The order of the training examples by seed, and the fingerprints by which a run knows its data."""
    orders = {}
    cases = itertools.product((10, 23, 1438), (0, 7, 2**32 - 1), (True, False), (True, False), ((0, 1), (1, 2)))
    for length, seed, shuffle, drop, (index, count) in cases:
        source = fv.data.ArraySource(np.zeros((length, 1, 1, 1), np.uint8), np.arange(length), name="numbered")
        options = {"seed": seed, "shuffle": shuffle, "drop_remainder": drop}
        batches = fv.data.train_batches(source, 4, process_index=index, process_count=count, **options)
        key = json.dumps([length, seed, shuffle, drop, index, count])
        orders[key] = {"fingerprint": batches.fingerprint, "steps": {}}
        for step in (0, 1, 2, 5, 1000, 10**6):
            with batches.from_step(step) as iterator:
                orders[key]["steps"][step] = next(iterator)["label"].tolist()
    for name, split in (("digits", "train"), ("digits", "test"), ("patterns", "train")):
        orders[f"{name}/{split}"] = fv.data.load(name, split).fingerprint
    (FOLDER / "orders.json").write_text(json.dumps(orders) + "\n")


def main():
    expected = {}
    sys.argv = ["experiments/mnist.py"]  # is recorded
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "bundle").mkdir()
        write_bundle(root / "bundle", expected)
        write_checkpoints(root / "checkpoints", expected)
        write_run(root / "run", expected)
        np.savez_compressed(root / "expected.npz", **expected)
        with zipfile.ZipFile(FOLDER / "before.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for path in sorted(root.rglob("*")):
                if path.is_file() and not {"tensorboard", "000000011"} & {*path.parts} and path.suffix != ".png":
                    archive.write(path, path.relative_to(root))
    print((FOLDER / "before.zip").stat().st_size)
    write_orders()
    digests = {name: digest_of(name) for name in fv.list_models()}
    more = [("googlenet", "aux_heads"), ("googlenet_bn", "aux_heads"), ("inception_v3", "aux_heads")]
    for name, part in [*more, ("capsnet", "decoder")]:
        digests[f"{name} {part}"] = digest_of(name, **{part: True})
    (FOLDER / "parameters.json").write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main()
