"""The order of training batches, resuming, processes, and evaluations that count every example once."""

import json
import threading
import time

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from flaxvision import data


class Slow:
    """A source that is read example by example, from several threads."""

    name, classes, fingerprint = "slow", ("a", "b"), "slow"

    def __init__(self, length, broken=None):
        self.length, self.broken, self.threads = length, broken, set()

    def __len__(self):
        return self.length

    def __getitem__(self, index, /):
        if index == self.broken:
            raise ValueError(f"photo{index}.jpg is not a readable image")
        self.threads.add(threading.current_thread().name)
        time.sleep(0.001)
        return {"image": np.full((2, 2, 1), index % 256, np.uint8), "label": np.int32(index % 2)}


def numbered(length):
    """A source whose label is the index."""
    image = np.arange(length, dtype=np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 2, 2, 1), np.uint8)
    return data.ArraySource(image, np.arange(length), name="numbered")


def take(batches, count, start=0):
    with batches.from_step(start) as iterator:
        return [next(iterator) for _ in range(count)]


def labels(batches, count, start=0):
    return [batch["label"].tolist() for batch in take(batches, count, start)]


def flaxvision_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("flaxvision")]


def test_batches_hold_matching_rows():
    batches = data.train_batches(numbered(10), 4, seed=0)
    for batch in take(batches, 5):
        assert set(batch) == {"image", "label"}
        chex.assert_shape([batch["image"], batch["label"]], [(4, 2, 2, 1), (4,)])
        chex.assert_type([batch["image"], batch["label"]], [np.uint8, np.int32])
        assert (batch["image"] == batch["label"][:, None, None, None]).all()


@pytest.mark.parametrize("drop_remainder", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_resuming_at_any_step_continues_the_run(shuffle, drop_remainder):
    batches = data.train_batches(numbered(23), 5, seed=7, shuffle=shuffle, drop_remainder=drop_remainder)
    whole = labels(batches, 30)
    for step in (1, 3, 4, 5, 11, 29):
        assert labels(batches, 30 - step, step) == whole[step:]
    again = data.train_batches(numbered(23), 5, seed=7, shuffle=shuffle, drop_remainder=drop_remainder)
    assert labels(again, 30) == whole


def test_every_epoch_has_each_example_at_most_once_in_another_order():
    batches = data.train_batches(numbered(23), 5, seed=1)
    assert batches.steps_per_epoch == 4
    epochs = [np.ravel(labels(batches, 4, 4 * epoch)).tolist() for epoch in range(6)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    # What one epoch drops, another has.
    assert set().union(*epochs) == set(range(23))


def test_without_dropping_every_example_comes_equally_often():
    batches = data.train_batches(numbered(23), 5, seed=1, drop_remainder=False)
    assert batches.steps_per_epoch == 5
    drawn = np.ravel(labels(batches, 23)).tolist()
    assert np.bincount(drawn).tolist() == [5] * 23
    assert all(sorted(drawn[23 * k : 23 * k + 23]) == list(range(23)) for k in range(5))


def test_without_shuffling_the_order_is_the_source_s():
    assert labels(data.train_batches(numbered(7), 3, seed=0, shuffle=False), 4) == [[0, 1, 2], [3, 4, 5]] * 2
    flowing = data.train_batches(numbered(7), 3, seed=0, shuffle=False, drop_remainder=False)
    assert labels(flowing, 3) == [[0, 1, 2], [3, 4, 5], [6, 0, 1]]


def test_the_seed_decides_the_order():
    runs = [labels(data.train_batches(numbered(40), 8, seed=seed), 10) for seed in range(4)]
    assert len({json.dumps(run) for run in runs}) == 4
    # Neighbouring seeds do not share their epochs either.
    epochs = [json.dumps(run[5 * k : 5 * k + 5]) for run in runs for k in range(2)]
    assert len(set(epochs)) == 8


def test_the_order_is_pinned():
    # A version of NumPy that gave another order would break the resuming of older runs.
    assert labels(data.train_batches(numbered(10), 5, seed=0), 2) == [[0, 8, 9, 3, 7], [5, 1, 2, 6, 4]]


@pytest.mark.parametrize("process_count", [2, 4])
@pytest.mark.parametrize("transform", [None, "jitter"])
def test_processes_together_see_the_global_batch(process_count, transform):
    def jitter(example, rng):
        return {**example, "noise": rng.normal(size=2)}

    options = {"seed": 3, "transform": jitter if transform else None}
    source = numbered(37)
    whole = take(data.train_batches(source, 8, **options), 9, start=2)
    parts = [
        take(data.train_batches(source, 8, process_index=p, process_count=process_count, **options), 9, start=2)
        for p in range(process_count)
    ]
    together = [jax.tree.map(lambda *rows: np.concatenate(rows), *batches) for batches in zip(*parts, strict=True)]
    chex.assert_trees_all_equal(together, whole)


def test_the_processes_are_those_of_jax(monkeypatch):
    whole = data.train_batches(numbered(32), 8, seed=0)
    alone = [batch["label"].tolist() for batch in data.eval_batches(numbered(14), 8)]
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    part = data.train_batches(numbered(32), 8, seed=0)
    assert labels(part, 6) == [row[4:6] for row in labels(whole, 6)]
    assert part.fingerprint == whole.fingerprint
    assert [batch["label"].tolist() for batch in data.eval_batches(numbered(14), 8)] == [row[4:6] for row in alone]
    with pytest.raises(ValueError, match="batch_size must be a multiple of process_count=4; got 6"):
        data.eval_batches(numbered(14), 6)
    # Others can be given, as for a loader that all processes share.
    assert labels(data.train_batches(numbered(32), 8, seed=0, process_index=0, process_count=1), 2) == labels(whole, 2)


def test_changes_are_described():
    def fingerprint(*args, **kwargs):
        return data.train_batches(*args, **kwargs).fingerprint

    first = fingerprint(numbered(23), 5, seed=7)
    assert data.describe_changes(first, first) == []
    other = fingerprint(numbered(24), 6, seed=7, shuffle=False)
    assert data.describe_changes(first, other) == [
        "shuffle was True, is False",
        "batch_size was 5, is 6",
        "length was 23, is 24",
        "the examples of the source differ",
    ]


def test_a_transform_draws_anew_for_every_example_and_epoch_and_resumes():
    def draw(example, rng):
        return {**example, "draw": rng.integers(2**62)}

    batches = data.train_batches(numbered(6), 3, seed=3, transform=draw)
    whole = take(batches, 6)
    draws = np.concatenate([batch["draw"] for batch in whole])
    assert len(set(draws.tolist())) == 18
    np.testing.assert_array_equal(np.concatenate([b["draw"] for b in take(batches, 2, start=4)]), draws[12:])
    other = data.train_batches(numbered(6), 3, seed=4, transform=draw)
    assert not set(np.concatenate([b["draw"] for b in take(other, 6)]).tolist()) & set(draws.tolist())
    # The order of the examples is that of the run without a transform.
    assert [b["label"].tolist() for b in whole] == labels(data.train_batches(numbered(6), 3, seed=3), 6)


def test_the_fingerprint_is_json_and_knows_what_changes_the_order():
    first = data.train_batches(numbered(23), 5, seed=7)
    assert json.loads(json.dumps(first.fingerprint)) == first.fingerprint
    same = data.train_batches(numbered(23), 10, seed=7, process_index=1, process_count=5)
    assert {**same.fingerprint, "batch_size": 5} == first.fingerprint
    others = [
        data.train_batches(numbered(24), 5, seed=7),
        data.train_batches(numbered(23), 6, seed=7),
        data.train_batches(numbered(23), 5, seed=8),
        data.train_batches(numbered(23), 5, seed=7, shuffle=False),
        data.train_batches(numbered(23), 5, seed=7, drop_remainder=False),
    ]
    assert all(other.fingerprint != first.fingerprint for other in others)


def test_sources_on_disk_are_read_by_threads():
    source = Slow(40)
    batches = data.train_batches(source, 8, seed=0, num_threads=4)
    assert labels(batches, 5) == [
        [i % 2 for i in row] for row in labels(data.train_batches(numbered(40), 8, seed=0), 5)
    ]
    assert len(source.threads) > 1
    assert all(name.startswith("flaxvision-decode") for name in source.threads)


def test_closing_leaves_no_thread():
    batches = data.train_batches(Slow(40), 8, seed=0, num_threads=3)
    iterator = batches.from_step(0)
    next(iterator)
    assert flaxvision_threads()
    iterator.close()
    iterator.close()
    assert not flaxvision_threads()
    with pytest.raises(StopIteration):
        next(iterator)
    assert len(list(data.eval_batches(Slow(10), 4))) == 3
    assert not flaxvision_threads()


def test_an_abandoned_iterator_leaves_no_thread():
    for _ in data.eval_batches(Slow(40), 4, num_threads=2):
        break
    next(data.train_batches(Slow(40), 8, seed=0, num_threads=2).from_step(0))
    deadline = time.monotonic() + 5
    while flaxvision_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not flaxvision_threads()


def test_reading_ahead_is_bounded():
    read = []

    def note(example, rng):
        read.append(int(example["label"]))
        return example

    with data.train_batches(numbered(100), 1, seed=0, transform=note, num_threads=2).from_step(0) as iterator:
        next(iterator)
        time.sleep(0.1)
        assert len(read) <= 5


def test_errors_of_a_source_arrive_and_close():
    iterator = data.train_batches(Slow(8, broken=5), 8, seed=0).from_step(0)
    with pytest.raises(ValueError, match=r"photo5\.jpg"):
        next(iterator)
    assert not flaxvision_threads()
    with pytest.raises(ValueError, match=r"photo5\.jpg"):
        list(data.eval_batches(Slow(8, broken=5), 2))
    assert not flaxvision_threads()


def test_a_file_that_breaks_during_training_is_named(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("RGB", (30, 20), "red").save(tmp_path / name / f"{i}.png")
    source = data.load(tmp_path, "train", image_size=8)
    batches = data.train_batches(source, 8, seed=0)
    assert take(batches, 1)[0]["image"].shape == (8, 8, 8, 3)
    (tmp_path / source.paths[0]).write_bytes((tmp_path / source.paths[0]).read_bytes()[:50])
    with pytest.raises(ValueError, match=source.paths[0]):
        take(batches, 2)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
@pytest.mark.parametrize("batch_size", [4, 8, 20])
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_an_evaluation_has_every_example_exactly_once(length, batch_size, process_count):
    parts = [
        data.eval_batches(numbered(length), batch_size, process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    seen = []
    for part in parts:
        assert len(part) == -(-length // batch_size)
        batches = list(part)
        assert len(batches) == len(part)
        for batch in batches:
            assert batch["image"].shape == (batch_size // process_count, 2, 2, 1)
            assert batch["mask"].dtype == np.float32
            assert set(batch["mask"].tolist()) <= {0.0, 1.0}
            assert (batch["image"][batch["mask"] == 0] == 0).all()
            seen += batch["label"][batch["mask"] == 1].tolist()
    assert sorted(seen) == list(range(length))


def test_an_evaluation_can_be_repeated_and_keeps_the_order():
    batches = data.eval_batches(numbered(10), 4)
    for _ in range(2):
        rows = [batch["label"].tolist() for batch in batches]
        assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert list(batches)[-1]["mask"].tolist() == [1, 1, 0, 0]
    assert [b["label"].tolist() for b in data.eval_batches(Slow(3), 4)] == [[0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 11}, "batch_size must be at most 10, the number of examples in 'numbered'; got 11"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"seed": -1}, "seed must be between 0 and 2\\*\\*32 - 1; got -1"),
        ({"process_count": 3}, "batch_size must be a multiple of process_count=3; got 4"),
        ({"process_index": 2, "process_count": 2}, "process_index must be between 0 and process_count - 1; got 2"),
        ({"num_threads": 0}, "num_threads must be at least 1; got 0"),
    ],
)
def test_faults_of_the_arguments_are_named(options, message):
    arguments = {"batch_size": 4, "seed": 0, **options}
    with pytest.raises(ValueError, match=message):
        data.train_batches(numbered(10), **arguments)
    arguments.pop("seed")
    if "seed" not in options and options.get("batch_size") != 11:
        with pytest.raises(ValueError, match=message):
            data.eval_batches(numbered(10), **arguments)


def test_empty_sources_and_negative_steps():
    with pytest.raises(ValueError, match="source must have at least one example; got 'numbered'"):
        data.train_batches(numbered(0), 1, seed=0)
    with pytest.raises(ValueError, match="source must have at least one example; got 'numbered'"):
        data.eval_batches(numbered(0), 1)
    with pytest.raises(ValueError, match="step must be at least 0; got -1"):
        data.train_batches(numbered(4), 2, seed=0).from_step(-1)
