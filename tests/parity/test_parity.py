"""The same weights give the same logits as in other libraries, which this run does not need.

`python -m parity.references` stored the libraries' outputs. The weights are drawn again from their names.
"""

import numpy as np
import pytest

from flaxvision.weights.convert import layout_of, shapes_of, slots_of
from parity import comparison, drawing, ledger
from parity.references import CASES, FILE

# Large networks with a relative among the other cases, and second libraries.
SLOW = (
    "torchvision/googlenet_bn/aux",
    "torchvision/inception_v3/aux",
    "torchvision/deeplabv3_resnet50",
    "torchvision/fcn_resnet50",
    "timm/inception_v4",
    "timm/inception_resnet_v2",
    "timm/xception",
    "keras/resnet50",
    "keras/inception_v3",
)

FC_BIAS = [1.2571606636047363, 1.404362678527832, 1.0963860750198364, 0.6162813901901245, 0.7030323147773743]


@pytest.fixture(scope="module")
def references():
    with np.load(FILE) as file:
        return {name: file[name] for name in file.files}


def shapes_there(pair):
    """Returns the names and shapes of the library's tensors."""
    layout = layout_of(pair.model, pair.source)
    slots = slots_of(layout, shapes_of(pair.model, pair.ours()))
    tensors = {s.name: np.broadcast_to(np.float32(0), s.shape) for s in slots if s.constant is None}
    return {name: value.shape for name, value in (layout.restore or dict)(tensors).items()}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_same_weights_same_logits(references, case):
    pair, stored = CASES[case], {k.rpartition("/")[2]: v for k, v in references.items() if k.rpartition("/")[0] == case}
    shapes = shapes_there(pair)
    names = sorted(drawing.norms(shapes))
    assert len(names) == len(stored["statistics"])
    variables = pair.variables(drawing.draw(shapes, dict(zip(names, stored["statistics"].tolist(), strict=True))))
    images = pair.images("images")
    assert comparison.error(comparison.outputs(pair.ours(), variables, images).logits, stored["eval"]) <= 1e-4
    assert ("train" in stored) == (pair.aux or pair.model == "resnet18")
    if "train" not in stored:
        return
    trained = comparison.outputs(pair.ours(), variables, images, train=True)
    assert comparison.error(trained.logits, stored["train"]) <= 1e-4
    assert set(trained.aux) == set(comparison.libraries.AUX_HEADS[pair.model] if pair.aux else ())
    for name, logits in trained.aux.items():
        assert comparison.error(logits, stored[name]) <= 1e-4, name


def test_slow_cases_exist():
    assert set(SLOW) < set(CASES)


def test_references_are_small():
    assert FILE.stat().st_size < 300_000


def test_every_family_has_a_case():
    assert {type(pair.ours()) for pair in ledger.pairs()} == {type(pair.ours()) for pair in CASES.values()}


def test_drawing_depends_on_the_name_alone():
    shapes = {"bn.weight": (8,), "bn.bias": (8,), "bn.running_mean": (8,), "bn.running_var": (8,)}
    shapes |= {"bn.num_batches_tracked": (), "conv.weight": (8, 3, 3, 3), "fc.weight": (5, 8), "fc.bias": (5,)}
    drawn = drawing.draw(shapes, {"bn": (2.0, 4.0)})
    again = drawing.draw(dict(reversed(shapes.items())), {"bn": (2.0, 4.0)})
    assert {name: value.shape for name, value in drawn.items()} == shapes
    assert all(np.array_equal(again[name], value) for name, value in drawn.items())
    assert not np.array_equal(drawn["bn.bias"][:5], drawn["fc.bias"])
    np.testing.assert_allclose(drawn["conv.weight"].sum((1, 2, 3)), 0, atol=1e-5)
    assert np.all(np.abs(drawn["bn.bias"] - 1) <= 0.5)
    assert np.all(np.abs(drawn["bn.running_mean"] - 2) <= 1)
    assert np.all((drawn["bn.running_var"] >= 4 / 1.5) & (drawn["bn.running_var"] <= 4 / 0.5))
    # references.npz depends on these numbers.
    np.testing.assert_allclose(drawn["fc.bias"], FC_BIAS, rtol=1e-6)


def test_drawing_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"got 'conv\.mystery' with shape \(3,\)"):
        drawing.draw({"conv.mystery": (3,)})


def test_statistics_of_layers():
    means, variances = {"bn": np.array([1.0, 3.0])}, {"bn": np.array([4.0, 6.0])}
    assert drawing.statistics_of(means, variances) == {"bn": (2.0, 6.0)}


def test_relative_error():
    assert comparison.error([np.array([3.0, 4.5])], [np.array([3.0, 4.0])]) == pytest.approx(0.1)


def test_the_ledger_is_within_its_tolerances_and_the_table_is_its():
    lines = ledger.read(ledger.RESULTS)
    assert set(lines) == {(pair.model, pair.source, pair.aux) for pair in ledger.pairs()}
    assert {key: bad for key, line in lines.items() if (bad := ledger.failures(line))} == {}
    assert ledger.report(lines.values()) == ledger.RESULTS.with_suffix(".md").read_text()


def test_the_ledger_knows_what_is_not_within_its_tolerances():
    line = {"aux": False, "forward_eval": 2e-4, "forward_train": 1e-5, "gradient": float("nan"), "drift_loss": 1e-7}
    line |= {"params_ours": 10, "params_theirs": 12, "params_folded": 1, "gradient_worst": 1e-8}
    missing = "no drift_params"
    assert ledger.failures(line) == ["forward, eval 2.0e-04", "gradient nan", missing, "10 parameters, theirs 12"]
    line = dict.fromkeys(("forward_eval", "forward_train", "gradient", "gradient_worst", "forward_aux"), 1e-8)
    line |= {"params_ours": 10, "params_theirs": 10, "params_folded": 0, "aux": True, "drift_first_loss": 0.5}
    assert ledger.failures(line) == ["first loss 5.0e-01"]


def test_arrays_of_other_shapes_are_not_compared():
    with pytest.raises(AssertionError):
        comparison.error(np.ones((1, 5)), np.ones((4, 5)))


def test_pairs_that_do_not_exist():
    with pytest.raises(ValueError, match=r"models must match .* got 'nosuch"):
        ledger.pairs("nosuch*")
    with pytest.raises(ValueError, match=r"sources must be among torchvision, timm.* got tochvision"):
        ledger.pairs("*", ("tochvision",))
