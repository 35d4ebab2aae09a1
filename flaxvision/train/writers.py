"""Where a run's records go: a file of JSON lines, TensorBoard, a progress bar.

A writer has `start(step)`, called once before the first step with the step that the run goes on from, `write(record)`
and `close()`. A record is a dict with `step`, `split` and metrics by name. A writer that wants to see every step, such
as a progress bar, also has `advance(examples)`.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from flaxvision import atomic

Record = dict[str, Any]


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Reads a file of JSON lines; a last line that a kill cut short is left out."""
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
    """Writes one JSON object a line, and forgets on a restart what came after the step that it goes on from.

    Args:
        path: The file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file: Any = None

    def start(self, step: int) -> None:
        """Keeps the records up to `step`, replacing the file in one move."""
        kept = [r for r in read_records(self.path) if r["step"] <= step]
        with atomic.replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self._file = self.path.open("a", buffering=1)

    def write(self, record: Record) -> None:
        """Appends one record."""
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


class TensorBoardWriter:
    """Writes TensorBoard event files, one folder per split.

    Args:
        directory: The folder above the splits'.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self._writers: dict[str, Any] = {}
        self._purge: int | None = None

    def start(self, step: int) -> None:
        """Tells TensorBoard to drop what came after `step`."""
        self._purge = step + 1 if step else None

    def write(self, record: Record) -> None:
        """Writes the record's numbers as scalars."""
        from tensorboardX import SummaryWriter

        split = record["split"]
        if split not in self._writers:
            self._writers[split] = SummaryWriter(str(self.directory / split), purge_step=self._purge)
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "step":
                self._writers[split].add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flushes and closes the files."""
        for writer in self._writers.values():
            writer.close()


class ProgressBar:
    """Shows images/s, loss, accuracy and the time left.

    Args:
        num_steps: The run's steps.
        batch_size: Images a step.
        **options: More of `tqdm`'s options.
    """

    def __init__(self, num_steps: int, batch_size: int, **options: Any):
        self.num_steps, self.batch_size, self.options = num_steps, batch_size, options
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
        """Shows the loss and the accuracy of the record, the training's and the evaluation's side by side."""
        prefix = "" if record["split"] == "train" else "val "
        for name, short in (("loss", "loss"), ("accuracy", "acc")):
            value = record.get(name)
            if isinstance(value, float) and not math.isnan(value):
                self._shown[prefix + short] = f"{value:.4f}"
        self._bar.set_postfix(self._shown, refresh=False)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()
