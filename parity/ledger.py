"""The parity ledger: every model beside every library that has it, with the same weights.

    python -m parity                                       # all pairs that the ledger lacks; hours on one core
    python -m parity --models 'resnet*' --sources timm     # some of them
    python -m parity --report                              # only writes the table again

Needs `pip install -e ".[reference]" pytorchcv`; run it from the root of the checkout. Each pair appends a JSON line to
parity/ledger.jsonl as it finishes, and parity/ledger.md is written from all lines. A pair that has a line is skipped
unless `--again` is given. `comparison.py` describes what is compared, and `drawing.py` how the weights are drawn.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import flaxvision as fv
from benchmarks import machine
from parity import comparison, libraries

RESULTS = Path(__file__).with_name("ledger.jsonl")
LIBRARIES = ("torchvision", "timm", "keras", "pytorchcv", "smp")

# Sizes, where the architecture or the library needs others than `comparison.Pair`'s defaults. The first match counts.
_SIZES: dict[tuple[str, str], dict[str, Any]] = {
    ("vgg*", "keras"): {"size": (224, 250), "training_size": (224, 225), "batch": 1},  # no adaptive pool in its VGGs
    ("vgg*", "*"): {"size": (67, 81), "training_size": (49, 67)},
    ("alexnet_tv", "*"): {"size": (97, 131), "training_size": (79, 97)},
    ("alexnet*", "*"): {"size": (227, 229), "training_size": (227, 229)},  # the dense layers fix the size
    ("zfnet", "*"): {"size": (224, 225), "training_size": (224, 225)},
    ("bn_inception", "*"): {"size": (223, 224), "training_size": (223, 224)},  # its last pool is 7x7
    ("*inception*", "*"): {"size": (139, 171), "training_size": (107, 139)},  # no padding: maps shrink fast
    ("xception", "*"): {"training_size": (75, 97)},
    ("unet*", "smp"): {"size": (96, 128), "training_size": (64, 96), "classes": 21},  # multiples of 32
    ("fcn_resnet50", "*"): {"training_size": (65, 81), "classes": 21},
    ("deeplabv3_*", "*"): {"training_size": (65, 81), "classes": 21},
}
_AUX: dict[str, dict[str, Any]] = {
    "deeplabv3_resnet50": {"size": (65, 81), "training_size": (65, 81), "classes": 21},
    "fcn_resnet50": {"size": (65, 81), "training_size": (65, 81), "classes": 21},
    "googlenet_bn": {"size": (65, 97), "training_size": (65, 97)},
    "inception_v3": {"size": (299, 315), "training_size": (299, 315)},
}

_FAMILIES = (
    "alexnet",
    "zfnet",
    "vgg",
    "googlenet",
    "bn_inception",
    "inception",
    "resnet",
    "xception",
    "se",
    "mobilenet",
    "squeezenet",
    "fcn",
    "deeplab",
    "unet",
)

# Columns of the table: title, key and tolerance.
_COLUMNS = (
    ("forward, eval", "forward_eval", comparison.FORWARD_TOLERANCE),
    ("forward, train", "forward_train", comparison.FORWARD_TOLERANCE),
    ("gradient", "gradient", comparison.TRAINING_TOLERANCE),
    ("worst tensor's gradient", "gradient_worst", comparison.TRAINING_TOLERANCE),
    ("loss", "drift_loss", comparison.TRAINING_TOLERANCE),
    ("parameters", "drift_params", comparison.TRAINING_TOLERANCE),
    ("statistics", "drift_statistics", comparison.TRAINING_TOLERANCE),
)


_TEXT = """# Parity: the same weights, the same numbers

{models} models beside the libraries that have them, {count} comparisons. The table is written by

    pip install -e ".[reference]" pytorchcv
    python -m parity

The weights, running statistics included, are drawn from the names of the library's tensors (`parity/drawing.py`),
loaded there, and converted by `flaxvision.weights.convert`. Errors are relative, `||ours - theirs|| / ||theirs||`:

| | largest error | tolerance |
| --- | --- | --- |
{summary}

{failures}{lacking}

* **forward**: logits in float32, with the running statistics (eval) and with those of the batch (train).
* **gradient**: gradient of the cross-entropy in float64 with batch statistics, all parameters as one vector. Auxiliary
  heads have the weight {aux}. **worst tensor's gradient**: the largest error of a single tensor.
* **loss, parameters, statistics**: the drift over {steps} steps of SGD with momentum {momentum} on two alternating
  batches in float64, with BatchNorm in training mode. For the loss it is that of the worst step. For the parameters and
  the running statistics it is the distance at the end, divided by the distance from their start. The learning rate is
  such that, to first order, a step reduces the loss by 5 %. torch's running variances are unbiased and ours are biased:
  theirs are multiplied by (n - 1) / n for the comparison.
* Dropout is off on both sides. Images are small, with odd and unequal sides where the architecture permits; every line
  of [ledger.jsonl](ledger.jsonl) gives the size. Networks with auxiliary heads are compared once more with them,
  without a trajectory.
* **parameters**: the number of trainable parameters, equal on both sides. `+ n`: Keras' ResNets have n more, the
  biases of convolutions followed by a BatchNorm. They only shift its mean, and the conversion folds them into it.
* Where libraries define a network differently under one name, `flaxvision.weights.fields(name, source)` gives the
  fields that make our network equal to theirs.

{table}

Libraries: {versions}.

Comparisons by flaxvision's commit, oldest first: {commits}.

Machine: {machine}; {hours:.1f} hours, shared with other work.
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare models with other libraries and record the errors."""

    models: str = "*"
    """Shell pattern of registry names."""
    sources: tuple[str, ...] = LIBRARIES
    """Libraries to compare with."""
    forward_only: bool = False
    """Only print the errors of the forward pass; write nothing."""
    again: bool = False
    """Compare pairs again that the ledger has already."""
    report: bool = False
    """Only write the table; compare nothing."""
    output: Path = RESULTS
    """File of JSON lines. The table is written beside it, with the suffix .md."""


def pairs(models: str = "*", sources: Iterable[str] = LIBRARIES) -> list[comparison.Pair]:
    """Returns every model with every library that has it, and once more with auxiliary classifiers if it has them."""
    if unknown := set(sources) - set(LIBRARIES):
        raise ValueError(f"sources must be among {', '.join(LIBRARIES)}; got {', '.join(sorted(unknown))}")
    found = []
    compared = {*fv.list_models(models, task="classification"), *fv.list_models(models, task="segmentation")}
    for model in sorted(compared):
        for source in [s for s in fv.weights.sources(model) if s in sources]:
            fits = (
                o for (m, s), o in _SIZES.items() if fnmatch.fnmatchcase(model, m) and fnmatch.fnmatchcase(source, s)
            )
            found.append(comparison.Pair(model, source, **next(fits, {})))
            if source == "torchvision" and model in _AUX:
                found.append(comparison.Pair(model, source, aux=True, **_AUX[model]))
    if not found:
        raise ValueError(f"models must match a network that {' or '.join(sources)} has; got {models!r}")
    return found


def failures(line: dict[str, Any]) -> list[str]:
    """Returns what is missing from a line of the ledger or exceeds its tolerance."""
    checks = [
        *_COLUMNS,
        ("auxiliary logits", "forward_aux", comparison.FORWARD_TOLERANCE),
        ("first loss", "drift_first_loss", comparison.TRAINING_TOLERANCE),
    ]
    found = [f"{title} {line[key]:.1e}" for title, key, limit in checks if key in line and not line[key] <= limit]
    wanted = {"forward_eval", "forward_train", "gradient", "gradient_worst"}
    wanted |= {"forward_aux", "drift_first_loss"} if line["aux"] else {"drift_loss", "drift_params"}
    found += [f"no {key}" for key in sorted(wanted - line.keys())]
    if line["params_ours"] + line["params_folded"] != line["params_theirs"]:
        found.append(f"{line['params_ours']} parameters, theirs {line['params_theirs']}")
    return found


def compare(pair: comparison.Pair) -> dict[str, Any]:
    """Compares one pair and returns its line of the ledger."""
    start = time.perf_counter()
    line: dict[str, Any] = {"model": pair.model, "source": pair.source, "aux": pair.aux}
    line |= comparison.forward(pair)
    line |= comparison.training(pair, trajectory=not pair.aux)
    line |= {"size": pair.size, "training_size": pair.training_size, "batch": pair.batch, "host_cores": os.cpu_count()}
    return line | {"seconds": round(time.perf_counter() - start)} | machine.describe(jax.devices()[0])


def read(path: Path) -> dict[tuple[str, str, bool], dict[str, Any]]:
    """Reads the newest line of every pair."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {(line["model"], line["source"], line["aux"]): line for line in lines}


def table(lines: Iterable[dict[str, Any]]) -> str:
    """Formats the ledger as a Markdown table, by family."""
    rows = sorted(
        lines, key=lambda line: (_family(line["model"]), _natural(line["model"]), line["source"], line["aux"])
    )
    head = ["model", "against", "parameters", *(title for title, _, _ in _COLUMNS)]
    text = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for line in rows:
        name = f"`{line['model']}`" + (" with auxiliary heads" if line["aux"] else "")
        params = f"{line['params_ours']:,}" + (f" + {folded:,}" if (folded := line["params_folded"]) else "")
        cells = [name, line["source"], params, *(_cell(line, key) for _, key, _ in _COLUMNS)]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def report(lines: Iterable[dict[str, Any]]) -> str:
    """Formats the whole report: the table with its explanations."""
    lines = list(lines)
    errors = {key: [line[key] for line in lines if key in line] for _, key, _ in _COLUMNS}
    commits = Counter(line["commit"][:7] for line in sorted(lines, key=lambda line: line["time"]))
    versions = sorted({part for line in lines for part in line["version"].split(", ")})
    versions += sorted({f"{name} {line[name]}" for line in lines for name in ("jax", "flax")})
    summary = [
        f"| {title} | {np.max(errors[key]):.1e} | {limit:.0e} |" for title, key, limit in _COLUMNS if errors[key]
    ]
    bad = [f"* `{line['model']}`, {line['source']}: {'; '.join(f)}" for line in lines if (f := failures(line))]
    have = {(line["model"], line["source"], line["aux"]) for line in lines}
    lacking = [f"`{p.model}` ({p.source})" for p in pairs() if (p.model, p.source, p.aux) not in have]
    return _TEXT.format(
        count=len(lines),
        lacking=f"\n\n**Not measured yet** ({len(lacking)}): {', '.join(lacking)}." if lacking else "",
        models=len({line["model"] for line in lines}),
        summary="\n".join(summary),
        failures="\n".join(["These exceed a tolerance:", "", *bad]) if bad else "All errors are within the tolerances.",
        table=table(lines),
        aux=libraries.AUX_WEIGHT,
        steps=comparison.STEPS,
        momentum=comparison.MOMENTUM,
        versions=", ".join(dict.fromkeys(versions)),
        commits=", ".join(f"{commit} ({count})" for commit, count in commits.items()),
        machine=", ".join(sorted({f"{line['cpu']} of {line['host_cores']} cores, one used" for line in lines})),
        hours=sum(line["seconds"] for line in lines) / 3600,
    )


def _cell(line: dict[str, Any], key: str) -> str:
    if key == "forward_train" and "forward_aux" in line:
        return f"{line[key]:.1e}, heads {line['forward_aux']:.1e}"
    return f"{line[key]:.1e}" if key in line else ""


def _family(model: str) -> int:
    return next((i for i, family in enumerate(_FAMILIES) if model.startswith(family)), len(_FAMILIES))


def _natural(model: str) -> tuple[Any, ...]:
    digits = "".join(c if c.isdigit() else " " for c in model).split()
    return (model.translate(str.maketrans("", "", "0123456789")), *map(int, digits))


def main(config: Config) -> None:
    """Compares the pairs that the ledger lacks.

    Raises:
        ValueError: There are no such pairs, or the output is the recorded ledger and the commit is not clean.
    """
    done = read(config.output)
    if config.report:
        config.output.with_suffix(".md").write_text(report(done.values()))
        return
    if not config.forward_only:
        machine.check_output(config.output)
    chosen = pairs(config.models, config.sources)
    import torch

    torch.set_num_threads(1)
    for pair in chosen:
        key = (pair.model, pair.source, pair.aux)
        label = f"{pair.model} {pair.source}{' aux' if pair.aux else ''}"
        if config.forward_only:
            print(label, {k: v for k, v in comparison.forward(pair).items() if k != "version"}, flush=True)
        elif config.again or key not in done:
            line = compare(pair)
            machine.append(config.output, line)
            done[key] = line
            config.output.with_suffix(".md").write_text(report(done.values()))
            print(label, f"{line['seconds']} s;", "; ".join(failures(line)) or "within the tolerances", flush=True)


def run() -> None:
    """Reads the command line and writes the ledger."""
    try:
        main(tyro.cli(Config, description=__doc__, prog="python -m parity"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
