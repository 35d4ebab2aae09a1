"""experiments/mnist.py as a user runs it in two processes, and the check of a folder in two processes."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import flaxvision as fv
from tests import multiprocess
from tests.conftest import environment

EXPERIMENT = multiprocess.ROOT / "experiments" / "mnist.py"
LAUNCH = ("experiments/launch.py", "--num-processes", "2")
RUN = ("--model=mlp", "--hidden=8", "--epochs=1", "--batch-size=64", "--log-every=7", "--shift=1", "--no-progress")


def experiment(*flags, launcher=(), devices=1):
    command = [sys.executable, *launcher, str(EXPERIMENT), *RUN, *flags]
    env = environment(devices) | {"PYTHONPATH": str(multiprocess.ROOT)}
    ended = subprocess.run(command, cwd=multiprocess.ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout


@pytest.mark.slow
def test_two_processes_write_the_records_of_one(tmp_path):
    alone = experiment(f"--workdir={tmp_path / 'one'}", devices=2)
    both = experiment(f"--workdir={tmp_path / 'two'}", "--profile-steps=2:3", launcher=LAUNCH)
    one, two = (fv.train.read_records(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [(r["split"], r["step"]) for r in two] == [(r["split"], r["step"]) for r in one]
    for got, want in zip(two, one, strict=True):
        values = {name for name in want if name not in ("split", "step", "images_per_second")}
        assert {name: got[name] for name in values} == pytest.approx({name: want[name] for name in values}, rel=1e-5)
    accuracy = r"test accuracy \d+\.\d\d%, .*on 359 images"
    assert re.findall(accuracy, both) == re.findall(accuracy, alone) != []
    assert (tmp_path / "two" / "curves.png").exists()
    assert sorted(path.name for path in (tmp_path / "two" / "profile").iterdir()) == ["process0", "process1"]
    for folder in (tmp_path / "two" / "profile").iterdir():
        assert list(folder.rglob("*.xplane.pb"))


@pytest.mark.slow
def test_the_range_test_is_printed_and_drawn_once(tmp_path):
    output = experiment(f"--workdir={tmp_path}", "--range-test", launcher=LAUNCH)
    assert output.count("--learning-rate") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["lr_range.png"]


FOLDER = """
from pathlib import Path
import flaxvision as fv
from flaxvision.data import folder
decoded = []
decode = folder.decode_image
folder.decode_image = lambda path, **options: (decoded.append(path), decode(path, **options))[1]
source = fv.data.subset(fv.data.load(sys.argv[1], "all"), [0, 2, 3, 4], "part")
sound, broken = source.without_broken()
try:
    fv.data.validate(source)
except ValueError as error:
    message = str(error)
print(len(decoded), sound.indices.tolist(), len(broken), message)
"""


@pytest.mark.slow
def test_process_0_checks_the_files_for_all(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8)).save(tmp_path / name / f"{i}.png")
    broken = tmp_path / "dog" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    first, second = multiprocess.run(FOLDER, 2, arguments=[tmp_path])
    count, found = first.split(maxsplit=1)
    assert found.startswith("[0, 2, 4] 1 1 of 6 images cannot be decoded: ")
    assert int(count) >= 12
    assert second == f"0 {found}"
