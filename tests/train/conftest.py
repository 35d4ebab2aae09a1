import pytest

import flaxvision as fv
from tests.train import runs


@pytest.fixture(autouse=True)
def not_terminated():
    yield
    fv.train.stopping.clear()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    data = runs.Seen()
    result = runs.run(folder, data)
    return runs.bits(result.state), runs.records_of(folder), data.rows[:20], result
