"""Writers of the records of a run: a file of JSON lines, TensorBoard, a progress bar.

A writer has the methods `start(step)`, called once before the first step with the step at which the run resumes,
`write(record)` and `close()`. A record is a dict with `step`, `split` and the values of the metrics by name. A writer
with a method `advance(examples)`, such as a progress bar, is called at every step too. A run that was killed between an
evaluation and its checkpoint repeats the evaluation, and may write its record a second time.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxvision import atomic

Record = dict[str, Any]

# The keys of a record that are no metrics.
NOT_METRICS = ("step", "split", "learning_rate", "images_per_second")


def metric_names(record: Mapping[str, Any]) -> list[str]:
    """Returns the names of the metrics in a record: `loss` first, then the others in their order."""
    names = [name for name, value in record.items() if name not in NOT_METRICS and isinstance(value, (int, float))]
    return sorted(names, key=lambda name: name != "loss")


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Reads a file of JSON lines, up to the first line that is not complete.

    Args:
        path: The file; if there is none, the result is empty.

    Returns:
        The records.
    """
    records = []
    path = Path(path)
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


class JsonlWriter:
    """Writes one JSON object per line. When a run resumes, it drops the records after that step.

    A record that the resumed run writes again, with the same step and split, is left out.

    Args:
        path: The file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file: Any = None
        self._kept: set[tuple[int, str | None]] = set()

    def start(self, step: int) -> None:
        """Drops the records after `step` and opens the file."""
        kept = [r for r in read_records(self.path) if r["step"] <= step]
        self._kept = {(r["step"], r.get("split")) for r in kept}
        with atomic.replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self._file = self.path.open("a", buffering=1)

    def write(self, record: Record) -> None:
        """Appends one record.

        Raises:
            OSError: The file cannot be written, for example because the disk is full. The error names the file.
        """
        if (record["step"], record.get("split")) not in self._kept:
            with _naming(self.path):
                self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            with _naming(self.path):
                self._file.close()


class TensorBoardWriter:
    """Writes TensorBoard event files, one directory per split.

    Args:
        directory: The parent of these directories.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self._writers: dict[str, Any] = {}
        self._purge: int | None = None

    def start(self, step: int) -> None:
        """Makes TensorBoard drop the records after `step`."""
        self._purge = step + 1 if step else None

    def write(self, record: Record) -> None:
        """Writes the numbers of the record as scalars."""
        from tensorboardX import SummaryWriter

        split = record["split"]
        if split not in self._writers:
            with _naming(self.directory):
                self._writers[split] = SummaryWriter(str(self.directory / split), purge_step=self._purge)
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "step":
                with _naming(self.directory):
                    self._writers[split].add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flushes and closes the files."""
        with _naming(self.directory):
            for writer in self._writers.values():
                writer.close()


class ProgressBar:
    """Shows the images per second, the metrics of the records and the time left.

    Args:
        num_steps: Number of steps of the run.
        batch_size: Images per step.
        metrics: Names of the metrics to show, in this order; None shows the first three of each record.
        **options: Further options of `tqdm`.
    """

    def __init__(self, num_steps: int, batch_size: int, metrics: Sequence[str] | None = None, **options: Any):
        self.num_steps, self.batch_size, self.metrics, self.options = num_steps, batch_size, metrics, options
        self._bar: Any = None
        self._shown: dict[str, str] = {}

    def start(self, step: int) -> None:
        """Opens the bar at `step`."""
        from tqdm import tqdm

        defaults = {"unit": "img", "unit_scale": True, "dynamic_ncols": True, "smoothing": 0.1, "mininterval": 0.2}
        self._bar = tqdm(
            total=self.num_steps * self.batch_size, initial=step * self.batch_size, **{**defaults, **self.options}
        )

    def advance(self, examples: int) -> None:
        """Moves the bar on."""
        self._bar.update(examples)

    def write(self, record: Record) -> None:
        """Shows the metrics of the record; those of the last training and evaluation records stand side by side."""
        prefix = "" if record["split"] == "train" else "val "
        for name in metric_names(record)[:3] if self.metrics is None else self.metrics:
            value = record.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._shown[prefix + name] = f"{value:.4f}"
        self._bar.set_postfix(self._shown, refresh=False)

    def close(self) -> None:
        """Closes the bar and leaves it on the screen."""
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the path to an error that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, f"record cannot be written: {error.strerror}", str(path)) from error
