"""Writers of records: JSON lines, TensorBoard, the progress bar."""

import errno
import os

import numpy as np
import pytest

import flaxvision as fv
from flaxvision.train import JsonlWriter


def test_jsonl_forgets_what_came_later_and_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train"}\n{"step": 2, "split": "train"}\n{"step": 3, "spl')
    writer = JsonlWriter(path)
    writer.start(1)
    writer.write({"step": 2, "split": "train", "loss": 0.5})
    writer.close()
    assert fv.train.read_records(path) == [
        {"step": 1, "split": "train"},
        {"step": 2, "split": "train", "loss": 0.5},
    ]


def test_tensorboard_files(tmp_path):
    writer = fv.train.TensorBoardWriter(tmp_path)
    writer.start(0)
    writer.write({"step": 1, "split": "train", "loss": 0.5})
    writer.write({"step": 1, "split": "validation", "loss": 0.25})
    writer.close()
    for split, value in (("train", 0.5), ("validation", 0.25)):
        (file,) = (tmp_path / split).iterdir()
        content = file.read_bytes()
        assert b"loss" in content
        assert np.float32(value).tobytes() in content


def test_progress_bar_shows_speed_metrics_and_time_left(capsys):
    bar = fv.train.ProgressBar(10, 16, mininterval=0)
    bar.start(5)
    bar.write({"step": 6, "split": "train", "loss": 0.5, "accuracy": 0.75})
    bar.write({"step": 6, "split": "validation", "miou_mean": 0.875, "loss": 0.25, "learning_rate": 0.125})
    bar.advance(16)
    bar.close()
    shown = capsys.readouterr().err.split("\r")[-1]
    for part in ("96.0/160", "img/s", "loss=0.5000", "accuracy=0.7500", "val loss=0.2500", "<"):
        assert part in shown
    assert "val miou_mean=0.8750" in shown
    assert "0.1250" not in shown


def test_a_record_that_a_resumed_run_repeats_stands_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "split": "train"}\n{"step": 2, "split": "validation", "loss": 0.5}\n')
    writer = JsonlWriter(path)
    writer.start(2)
    writer.write({"step": 2, "split": "validation", "loss": 0.5})
    writer.write({"step": 4, "split": "validation", "loss": 0.25})
    writer.close()
    assert [(r["step"], r["split"]) for r in fv.train.read_records(path)] == [
        (2, "train"), (2, "validation"), (4, "validation"),
    ]  # fmt: skip


@pytest.mark.parametrize("full", ["write", "close"])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, full):
    class Full:
        def __getattr__(self, name):
            def call(*args):
                if name == full:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            return call

    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.start(0)
    writer._file.close()
    writer._file = Full()

    def write_and_close():
        writer.write({"step": 1, "split": "train"})
        writer.close()

    with pytest.raises(OSError, match=r"record cannot be written: No space left") as raised:
        write_and_close()
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "metrics.jsonl"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_real_full_disk(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.start(0)
    writer._file.close()
    writer._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    with pytest.raises(OSError, match=r"record cannot be written: .*metrics\.jsonl"):
        writer.write({"step": 1, "split": "train"})
    with pytest.raises(OSError, match=r"metrics\.jsonl"):  # the line is still in the buffer
        writer.close()
