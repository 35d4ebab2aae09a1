"""Every model beside every library that has it: `pytest -m reference tests/parity`. It takes hours on one core."""

import pytest

from parity import comparison, ledger

pytestmark = pytest.mark.reference


def label(pair):
    return f"{pair.source}-{pair.model}{'-aux' if pair.aux else ''}"


@pytest.mark.parametrize("pair", ledger.pairs(), ids=label)
def test_forward(pair):
    result = comparison.forward(pair)
    assert result["params_ours"] + result["params_folded"] == result["params_theirs"]
    assert result["forward_eval"] <= comparison.FORWARD_TOLERANCE
    assert result["forward_train"] <= comparison.FORWARD_TOLERANCE
    assert result.get("forward_aux", 0) <= comparison.FORWARD_TOLERANCE


@pytest.mark.parametrize("pair", ledger.pairs(), ids=label)
def test_training(pair):
    result = comparison.training(pair, trajectory=not pair.aux)
    errors = {name: value for name, value in result.items() if name.startswith(("gradient", "drift"))}
    assert all(value <= comparison.TRAINING_TOLERANCE for value in errors.values()), errors
