"""Errors have one form: an argument must be one thing and got another, or a file is at fault and there is a remedy."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flaxvision"
# Reasons that the caller wraps in an error of its own, which names the file and the remedy.
REASONS = {
    "it holds a single array without a name",
    "{} are not arrays",
    "{} is not an array",
    "{} is stored in another file, which is never read",
    "the attribute layer_names is missing",
    "layer {} has layers of its own, which no supported model has",
    "class_names is not a list of strings",
}


def text_of(node):
    """The message of an exception, with {} for each value; None if it is not written where it is raised."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def raised(path):
    for node in ast.walk(ast.parse(path.read_text())):
        call = node.exc if isinstance(node, ast.Raise) else None
        kind = getattr(getattr(call, "func", None), "id", None)
        text = text_of(call.args[0]) if kind in ("ValueError", "TypeError") and call.args else None
        if text is not None:
            yield node.lineno, text


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_form(path):
    for line, text in raised(path):
        argument = " must " in text and "; got " in text
        state = "; " in text.partition(" must ")[0] or (" must " not in text and ": " in text)
        assert argument or state or text in REASONS, f"{path.name}:{line}: {text}"
        assert " must " in text or ": " in text or "; got " not in text, f"{path.name}:{line}: {text}"
        assert not text.endswith("."), f"{path.name}:{line}: {text}"


def test_the_form_is_found():
    assert sum(1 for path in PACKAGE.rglob("*.py") for _ in raised(path)) > 150
