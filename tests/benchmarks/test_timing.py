"""benchmarks/timing.py: turns, ratios and quartiles."""

import pytest

from benchmarks import timing


class Scripted(timing.Contender):
    """A contender that notes its turns; its steps take a given time."""

    def __init__(self, name, seconds, order):
        super().__init__(run=lambda: None)
        self.name, self.seconds, self.order = name, seconds, order

    def measure(self, count):
        self.order += [self.name] * count
        self.times += [self.seconds] * count


def test_turns_and_ratio():
    order = []
    ours, theirs = Scripted("ours", 2.0, order), Scripted("theirs", 3.0, order)
    timing.take_turns([ours, theirs], steps=5, block=2)
    assert order == ["ours"] * 2 + ["theirs"] * 4 + ["ours"] * 3 + ["theirs"]
    assert timing.ratio(ours, theirs, block=2) == {"ratio": 1.5, "q1": 1.5, "q3": 1.5}
    found = timing.summary({"flaxvision": ours, "keras": theirs}, block=2, batch_size=8)
    assert found["flaxvision"]["images_per_s"] == 4.0
    assert found["keras"]["ms"] == 3e3
    assert found["speedup"]["keras"]["ratio"] == 1.5


@pytest.mark.parametrize(("step", "rounds"), [(0.1, 30), (4.0, 3), (6.0, 3), (11.0, 1)])
def test_turns_end_in_time(monkeypatch, step, rounds):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def run():
        clock[0] += step

    contender = timing.Contender(run, wait=lambda result: None)
    timing.take_turns([contender], steps=30, seconds=10)
    assert contender.times == pytest.approx([step] * rounds)


def test_a_chain_is_waited_for_once(monkeypatch):
    calls = []
    contender = timing.Contender(lambda: calls.append("run"), wait=lambda _: calls.append("wait"), chain=3)
    contender.measure(2)
    assert calls == ["run", "run", "run", "wait"] * 2
    assert len(contender.times) == 2
