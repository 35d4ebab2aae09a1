"""Everything that is imported is declared in pyproject.toml, and everything that is declared is imported."""

import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("flaxvision", "experiments", "benchmarks", "parity", "tests")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

# Distributions that are imported under other names than their own (with "-" for "_").
MODULES = {
    "huggingface-hub": "huggingface_hub",
    "opencv-python-headless": "cv2",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "tensorboardx": "tensorboardX",
}
# Declared, although neither the package nor the experiments import them, and why.
NOT_IMPORTED = {
    "jaxlib": "excludes the release 0.10.2, which jax alone would allow",
    "importlib-resources": "tensorflow-datasets imports it and does not declare it",
    "pytest-xdist": "pytest runs with -n auto",
    "tensorflow": "tensorflow-datasets needs it to prepare most sets",
    "ruff": "a program",
    "pyright": "a program",
    "pre-commit": "a program",
    "flaxvision": "an extra includes another extra",
}
# Imported, although not declared, and why.
NOT_DECLARED = {
    "torchvision_on_cpu": "a file that makes torchvision importable where torch has no CUDA; optional",
}
# The extras that each folder may import, besides the dependencies.
ALLOWED = {
    "flaxvision": {"reference"},  # torch, in the function that reads its files
    "experiments": set(),
    "benchmarks": {"reference", "test"},
    "parity": {"reference", "test"},
    "tests": {"reference", "test"},
}


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def module_of(distribution):
    return MODULES.get(distribution, distribution.replace("-", "_"))


DECLARED = {name_of(requirement) for requirement in PROJECT["dependencies"]}
DECLARED_BY_EXTRA = {extra: {name_of(r) for r in requirements} for extra, requirements in EXTRAS.items()}


def imports_of(path):
    """Top-level modules that a file imports anywhere, in strings of `importorskip` too; relative imports left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", "") in ("importorskip", "import_module")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(str(node.args[0].value).split(".")[0])
    return found


@functools.cache
def foreign_imports():
    """Folder and module of every import that is neither the standard library's nor this repository's."""
    paths = [(folder, path) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    own = {*FOLDERS, *(path.stem for folder, path in paths if folder == "experiments")}
    used = {(folder, module): path for folder, path in paths for module in imports_of(path)}
    return {key: path for key, path in used.items() if key[1] not in own and key[1] not in sys.stdlib_module_names}


def test_what_is_imported_is_declared():
    faults = []
    for (folder, module), path in sorted(foreign_imports().items()):
        allowed = DECLARED.union(*(DECLARED_BY_EXTRA[extra] for extra in ALLOWED[folder]))
        if module not in {*map(module_of, allowed), *NOT_DECLARED}:
            faults.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not faults, "not declared in pyproject.toml: " + "; ".join(faults)


def test_what_is_declared_is_imported():
    used = foreign_imports()
    for distribution in DECLARED - NOT_IMPORTED.keys():
        assert ("flaxvision", module_of(distribution)) in used or ("experiments", module_of(distribution)) in used, (
            f"{distribution} is a dependency, but only tests or nothing import it"
        )
    everywhere = {module for _, module in used}
    for extra, distributions in DECLARED_BY_EXTRA.items():
        for distribution in distributions - NOT_IMPORTED.keys():
            assert module_of(distribution) in everywhere, f"nothing imports {distribution} of the extra {extra}"


def test_the_exceptions_are_still_needed():
    used = {module for _, module in foreign_imports()}
    by_package = {module for folder, module in foreign_imports() if folder in ("flaxvision", "experiments")}
    declared = DECLARED.union(*DECLARED_BY_EXTRA.values())
    assert NOT_IMPORTED.keys() <= declared
    assert not {module_of(name) for name in NOT_IMPORTED} & by_package
    assert NOT_DECLARED.keys() <= used
    assert MODULES.keys() <= declared


def test_constraints_name_every_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    fixed = {name_of(line) for line in lines if line and not line.startswith("#")}
    missing = (DECLARED | DECLARED_BY_EXTRA["test"]) - fixed
    assert not missing, f"constraints.txt has no version of {sorted(missing)}"


@pytest.mark.parametrize("extra", ["cuda", "tpu"])
def test_the_extras_of_jax_have_its_bounds(extra):
    bounds = [re.sub(r"[\w\[\]-]+", "", r, count=1) for r in (PROJECT["dependencies"][0], *EXTRAS[extra])]
    assert len(set(bounds)) == 1, bounds
