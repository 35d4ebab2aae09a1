"""experiments/mnist.py as a user runs it: killed, terminated, misused.

`FLAXVISION_KILLS=20 pytest -m slow tests/test_experiment_mnist.py` kills more often than the default.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import flaxvision as fv
from tests.conftest import environment

SCRIPT = Path(__file__).parents[1] / "experiments" / "mnist.py"
KILLS = int(os.environ.get("FLAXVISION_KILLS", "5"))
# Five steps between evaluations and saves: a save takes most of the time, so most kills hit one.
RUN = [
    *("--model=mlp", "--hidden=24", f"--epochs={9 + KILLS}", "--batch-size=64", "--eval-every=0.25", "--log-every=3"),
    *("--ema-decay=0.9", "--shift=1", "--no-progress"),
]


def spec():
    found = importlib.util.spec_from_file_location("mnist_experiment", SCRIPT)
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


mnist = spec()


def start(workdir, *flags, **options):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *RUN, "--workdir", str(workdir), *flags],
        env=environment(devices=1),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def newest(workdir):
    steps = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    return max(steps, default=0)


def outcome(workdir):
    """The bits of the last state, as the raw arrays of its checkpoint, and the records without their speed."""
    from orbax.checkpoint import v1

    last = max((p for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
    arrays = v1.load_checkpointables(last)["state"]
    bits = {k: (str(x.dtype), x.shape, np.asarray(x).tobytes()) for k, x in jax.tree_util.tree_leaves_with_path(arrays)}
    records = [
        {k: v for k, v in r.items() if k != "images_per_second"}
        for r in fv.train.read_records(workdir / "metrics.jsonl")
    ]
    return last.name, bits, records


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "uninterrupted"
    process = start(workdir)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "test accuracy" in output
    return workdir


def wait_for_progress(process, workdir, since):
    """Waits until this process has written a checkpoint, so that the kill hits the training."""
    while newest(workdir) <= since and process.poll() is None:
        time.sleep(0.002)


def killed(workdir, random):
    """Starts the run, kills it at a random moment after its next checkpoint, and checks that nothing is lost."""
    since = newest(workdir)
    process = start(workdir)
    wait_for_progress(process, workdir, since)
    time.sleep(random.uniform(0, 0.25))
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert newest(workdir) > since  # no complete checkpoint is lost
    return any(not p.name.isdigit() for p in (workdir / "checkpoints").iterdir())  # whether the kill hit a save


def finished(workdir):
    process = start(workdir)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert all(p.name.isdigit() for p in (workdir / "checkpoints").iterdir())
    return outcome(workdir)


def terminated(workdir):
    """Sends SIGTERM after the next checkpoint, and checks that the last step is saved."""
    since = newest(workdir)
    process = start(workdir)
    wait_for_progress(process, workdir, since)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "stopped by SIGTERM after step" in output
    assert f"step {newest(workdir)};" in output


@pytest.mark.slow
def test_a_run_killed_at_random_moments_and_terminated_ends_in_the_same_bits(tmp_path, uninterrupted):
    random = np.random.default_rng(0)
    in_saves = [killed(tmp_path / "killed", random) for _ in range(KILLS)]
    assert any(in_saves), "no kill hit a save"
    terminated(tmp_path / "killed")
    assert finished(tmp_path / "killed") == outcome(uninterrupted)


@pytest.mark.slow
def test_sigterm_before_the_training_leaves_with_status_0_and_the_run_goes_on(tmp_path, uninterrupted):
    process = start(tmp_path / "early")
    for _ in range(600):  # the handler is set once the imports are done: config.json comes soon after
        time.sleep(0.05)
        if (tmp_path / "early" / "config.json").exists():
            break
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert finished(tmp_path / "early") == outcome(uninterrupted)


def test_a_run_that_never_began_may_change(tmp_path):
    with pytest.raises(ValueError, match="batch size must be a multiple of the 8 devices"):
        mnist.main(config_of(tmp_path, batch_size=12))
    assert mnist.main(config_of(tmp_path, batch_size=64, hidden=(8,))) == 0
    with pytest.raises(ValueError, match="holds another run: batch_size was 64, now 32"):
        mnist.main(config_of(tmp_path, batch_size=32, hidden=(8,)))


@pytest.mark.parametrize(("options", "match"), [
    ({"epochs": -3.0}, "--epochs must be positive; got -3"),
    ({"log_every": 0}, "--log-every must be positive; got 0"),
    ({"model": "lenet5", "hidden": (3,)}, "--hidden must be left out for models other than mlp; got --model lenet5"),
])  # fmt: skip
def test_nonsense_numbers(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        mnist.main(config_of(tmp_path, **options))


def test_the_work_directory_holds_all(uninterrupted):
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["config"]["model"] == "mlp"
    assert set(config) == {"config", "versions", "commit", "command"}
    with Image.open(uninterrupted / "curves.png") as picture:
        assert picture.size[0] > 600
    records = fv.train.read_records(uninterrupted / "metrics.jsonl")
    assert {r["split"] for r in records} == {"train", "validation"}
    assert records[-1]["accuracy"] > 0.8
    assert {p.name for p in (uninterrupted / "tensorboard").iterdir()} == {"train", "validation"}


def test_a_work_directory_of_another_run_is_refused(tmp_path, uninterrupted):
    workdir = tmp_path / "copy"
    shutil.copytree(uninterrupted, workdir)
    for change in ({"model": "lenet_dli"}, {"seed": 3}):
        settings = json.loads((workdir / "config.json").read_text())["config"]
        settings |= {"hidden": (24,) if "seed" in change else None, "workdir": str(workdir)} | change
        with pytest.raises(ValueError, match=f"holds another run: .*{next(iter(change))} was"):
            mnist.main(mnist.Config(**settings))


def config_of(tmp_path, **options):
    return mnist.Config(workdir=str(tmp_path / "run"), progress=False, **{"model": "mlp", "epochs": 1.0} | options)


def npz(path, **arrays):
    rng = np.random.default_rng(0)
    good = {
        "train_image": rng.integers(0, 256, (40, 8, 8, 1), np.uint8),
        "train_label": np.arange(40) % 4,
        "test_image": rng.integers(0, 256, (12, 8, 8, 1), np.uint8),
        "test_label": np.arange(12) % 4,
    }
    np.savez(path, **good | arrays)
    return str(path)


def bad_pixels():
    image = np.zeros((40, 8, 8, 1), np.float32)
    image[17, 2, 3] = np.nan
    return image


BAD = {
    "rank": ({"train_image": np.zeros((40, 64), np.uint8)}, "H, W, C"),
    "channels": ({"test_image": np.zeros((12, 8, 8, 3), np.uint8)}, "channel"),
    "nan": ({"train_image": bad_pixels()}, "17"),
    "label": ({"test_label": np.arange(12) % 4 + 3}, "label"),
    "negative": ({"train_label": np.arange(40) % 4 - 1}, "label"),
    "length": ({"train_label": np.arange(39) % 4}, "39"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_get_one_clear_error_before_any_training(tmp_path, case):
    arrays, match = BAD[case]
    with pytest.raises(ValueError, match=match):
        mnist.main(config_of(tmp_path, dataset=npz(tmp_path / "data.npz", **arrays), batch_size=16))
    assert not (tmp_path / "run").exists()


def test_bad_folders(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty"):
        mnist.main(config_of(tmp_path, dataset=str(empty)))
    photos = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (photos / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(photos / name / f"{i}.jpg")
    broken = photos / "dog" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"dog/3\.jpg"):
        mnist.main(config_of(tmp_path, dataset=str(photos), batch_size=4))
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_devices_do_not_divide(tmp_path):
    with pytest.raises(ValueError, match="multiple of the 8 devices, such as 8; got 12"):
        mnist.main(config_of(tmp_path, dataset=npz(tmp_path / "data.npz"), batch_size=12))


def test_names_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"nearest: digits.*got 'digit'"):
        mnist.main(config_of(tmp_path, dataset="digit"))
    with pytest.raises(ValueError, match=r"similar: lenet5.*got 'lenet55'"):
        mnist.main(config_of(tmp_path, model="lenet55"))
    with pytest.raises(ValueError, match="--validation must be above 0 with --early-stopping"):
        mnist.main(config_of(tmp_path, early_stopping=2))
    process = start(tmp_path / "run", "--epoch", "3")
    output, _ = process.communicate()
    assert process.returncode == 2
    assert "--epochs" in output


@pytest.mark.slow
def test_a_folder_of_photographs_trains(tmp_path):
    photos = tmp_path / "photos"
    for name, level in (("dark", 40), ("light", 210)):
        (photos / name).mkdir(parents=True)
        for i in range(20):
            noise = np.random.default_rng(i).integers(0, 30, (9, 11, 3), np.uint8)
            Image.fromarray(noise + np.uint8(level)).save(photos / name / f"{i}.png")
    assert mnist.main(config_of(tmp_path, dataset=str(photos), batch_size=8, epochs=4.0, hidden=(8,))) == 0
    assert fv.train.read_records(tmp_path / "run" / "metrics.jsonl")[-1]["accuracy"] == 1


@pytest.mark.parametrize("parallel", [pytest.param("jit", marks=pytest.mark.slow), "pmap"])
def test_validation_early_stopping_and_eight_devices(tmp_path, parallel, capsys):
    config = config_of(
        tmp_path, hidden=(24,), epochs=40.0, validation=0.2, early_stopping=1, learning_rate=0.3, schedule="constant",
        parallel=parallel, mixup=0.2, label_smoothing=0.1, optimizer="nesterov", clip_norm=1.0, weight_decay=1e-4,
    )  # fmt: skip
    assert mnist.main(config) == 0
    output = capsys.readouterr().out
    assert "on 359 images" in output
    losses = [
        r["loss"] for r in fv.train.read_records(tmp_path / "run" / "metrics.jsonl") if r["split"] == "validation"
    ]
    assert 2 <= len(losses) < 40
    assert losses[-1] >= min(losses[:-1]) == losses[-2]
    steps = {r["loss"]: r["step"] for r in fv.train.read_records(tmp_path / "run" / "metrics.jsonl")}
    assert f"the best evaluation was at step {steps[losses[-2]]}" in output


def test_range_test_draws_a_picture(tmp_path, capsys):
    assert mnist.main(config_of(tmp_path, range_test=True, hidden=(24,))) == 0
    assert "--learning-rate" in capsys.readouterr().out
    with Image.open(tmp_path / "run" / "lr_range.png") as picture:
        assert picture.size[0] > 300
