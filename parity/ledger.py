"""The parity ledger: every model beside every library that has it, with the same weights.

    python benchmarks/parity.py                                       # all that the ledger lacks; hours on one core
    python benchmarks/parity.py --models 'resnet*' --sources timm     # a part
    python benchmarks/parity.py --report                              # only writes the table anew

Wants `pip install -e ".[reference]" pytorchcv`. Each pair appends a JSON line to benchmarks/results/parity.jsonl as it
finishes, and benchmarks/results/parity.md is written from all lines; a pair that has a line is left out unless --again.
`benchmarks/comparison.py` says what is compared, `benchmarks/drawing.py` where the weights come from.
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

RESULTS = Path(__file__).parent / "results" / "parity.jsonl"
LIBRARIES = ("torchvision", "timm", "keras", "pytorchcv")

# Where the architecture or the library wants other sizes than `comparison.Pair`'s; the first pattern that fits holds.
_SIZES: dict[tuple[str, str], dict[str, Any]] = {
    ("vgg*", "keras"): {"size": (224, 250), "training_size": (224, 225), "batch": 1},  # its VGGs have no adaptive pool
    ("vgg*", "*"): {"size": (67, 81), "training_size": (49, 67)},
    ("alexnet_tv", "*"): {"size": (97, 131), "training_size": (79, 97)},
    ("alexnet*", "*"): {"size": (227, 229), "training_size": (227, 229)},  # the dense layers fix the size
    ("zfnet", "*"): {"size": (224, 225), "training_size": (224, 225)},
    ("bn_inception", "*"): {"size": (223, 224), "training_size": (223, 224)},  # its last pool is 7x7
    ("*inception*", "*"): {"size": (139, 171), "training_size": (107, 139)},  # unpadded: maps shrink fast
    ("xception", "*"): {"training_size": (75, 97)},
}
_AUX_SIZES = {"googlenet_bn": (65, 97), "inception_v3": (299, 315)}

_FAMILIES = ("alexnet", "zfnet", "vgg", "googlenet", "bn_inception", "inception", "resnet", "xception", "se")

# Columns of the table: title, key, tolerance.
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

{models} models beside the libraries that have them, {count} comparisons, written by `benchmarks/parity.py`:

    pip install -e ".[reference]" pytorchcv
    python benchmarks/parity.py

The weights are drawn by the names of the library's tensors, running statistics too (`benchmarks/drawing.py`), loaded
there, and converted by `flaxvision.weights.convert`. Errors are relative, `||ours - theirs|| / ||theirs||`:

| | worst of all | tolerance |
| --- | --- | --- |
{summary}

{failures}{lacking}

* **forward**: logits in float32, with running statistics (eval) and with those of the batch (train).
* **gradient**: of the cross-entropy (auxiliary heads weigh {aux}), all parameters as one vector, batch statistics,
  float64 on both sides. **worst tensor's gradient**: the same of the one tensor that differs most.
* **loss, parameters, statistics**: the drift over {steps} steps of SGD with momentum {momentum} on two batches in turn,
  BatchNorm in training, float64: the worst step's loss; the parameters and the running statistics at the end, as a
  share of the way that they went from their start. The learning rate lessens the loss by 5 % a step to first order.
  torch's running variances are unbiased, ours biased: theirs are multiplied by (n - 1) / n for the comparison.
* Dropout is off on both sides. Images are small, of odd and unequal sides where the architecture permits; every line
  of [parity.jsonl](parity.jsonl) says which. Networks with auxiliary heads are compared once more with them, without a
  trajectory.
* **parameters**: trainable ones, ours and theirs alike. `+ n`: Keras' ResNets have n biases of convolutions in front of
  a BatchNorm more, which change nothing but its mean and are converted into that.
* Where libraries differ under one name, `flaxvision.weights.fields(name, source)` makes our network theirs.

{table}

Against {versions}.

Comparisons by flaxvision's commit, oldest first: {commits}.

Machine: {machine}; {hours:.1f} hours, shared with other work.
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """Write the parity ledger."""

    models: str = "*"
    """A shell pattern of registry names."""
    sources: tuple[str, ...] = LIBRARIES
    """Libraries to compare with."""
    forward_only: bool = False
    """Print the forward errors alone and write nothing."""
    again: bool = False
    """Pairs that the ledger has, too."""
    report: bool = False
    """Compare nothing, only write the table."""
    output: Path = RESULTS
    """File of JSON lines; the table lies beside it, with the ending .md."""


def pairs(models: str = "*", sources: Iterable[str] = LIBRARIES) -> list[comparison.Pair]:
    """Every model with every library that has it, and once more with auxiliary classifiers."""
    if unknown := set(sources) - set(LIBRARIES):
        raise ValueError(f"sources must be among {', '.join(LIBRARIES)}; got {', '.join(sorted(unknown))}")
    found = []
    for model in fv.list_models(models, task="classification"):
        for source in [s for s in fv.weights.sources(model) if s in sources]:
            fits = (
                o for (m, s), o in _SIZES.items() if fnmatch.fnmatchcase(model, m) and fnmatch.fnmatchcase(source, s)
            )
            found.append(comparison.Pair(model, source, **next(fits, {})))
            if source == "torchvision" and (size := _AUX_SIZES.get(model)):
                found.append(comparison.Pair(model, source, size=size, training_size=size, aux=True))
    if not found:
        raise ValueError(f"no model of {', '.join(sources)} has a name like {models!r}")
    return found


def failures(line: dict[str, Any]) -> list[str]:
    """What of a line of the ledger is not within its tolerance."""
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
    """One line of the ledger."""
    start = time.perf_counter()
    line: dict[str, Any] = {"model": pair.model, "source": pair.source, "aux": pair.aux}
    line |= comparison.forward(pair)
    line |= comparison.training(pair, trajectory=not pair.aux)
    line |= {"size": pair.size, "training_size": pair.training_size, "batch": pair.batch, "host_cores": os.cpu_count()}
    return line | {"seconds": round(time.perf_counter() - start)} | machine.describe(jax.devices()[0])


def read(path: Path) -> dict[tuple[str, str, bool], dict[str, Any]]:
    """The newest line of every pair."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {(line["model"], line["source"], line["aux"]): line for line in lines}


def table(lines: Iterable[dict[str, Any]]) -> str:
    """The rows of the ledger as Markdown, by family."""
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
    """The ledger with what one must know to read it."""
    lines = list(lines)
    worst = {key: float(np.max([line[key] for line in lines if key in line])) for _, key, _ in _COLUMNS}
    commits = Counter(line["commit"][:7] for line in sorted(lines, key=lambda line: line["time"]))
    versions = sorted({part for line in lines for part in line["version"].split(", ")})
    versions += sorted({f"{name} {line[name]}" for line in lines for name in ("jax", "flax")})
    summary = [f"| {title} | {worst[key]:.1e} | {limit:.0e} |" for title, key, limit in _COLUMNS]
    bad = [f"* `{line['model']}`, {line['source']}: {'; '.join(f)}" for line in lines if (f := failures(line))]
    have = {(line["model"], line["source"], line["aux"]) for line in lines}
    lacking = [f"`{p.model}` ({p.source})" for p in pairs() if (p.model, p.source, p.aux) not in have]
    return _TEXT.format(
        count=len(lines),
        lacking=f"\n\n**Not measured yet** ({len(lacking)}): {', '.join(lacking)}." if lacking else "",
        models=len({line["model"] for line in lines}),
        summary="\n".join(summary),
        failures="\n".join(["Not within the tolerances:", "", *bad]) if bad else "All are within the tolerances.",
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
    """Compares what the ledger lacks."""
    done = read(config.output)
    if config.report:
        config.output.with_suffix(".md").write_text(report(done.values()))
    if not config.report:
        import torch

        torch.set_num_threads(1)
    for pair in [] if config.report else pairs(config.models, config.sources):
        key = (pair.model, pair.source, pair.aux)
        label = f"{pair.model} {pair.source}{' aux' if pair.aux else ''}"
        if config.forward_only:
            print(label, {k: v for k, v in comparison.forward(pair).items() if k != "version"}, flush=True)
        elif config.again or key not in done:
            line = compare(pair)
            done[key] = line
            config.output.parent.mkdir(parents=True, exist_ok=True)
            with config.output.open("a") as file:
                print(json.dumps(line), file=file)
            config.output.with_suffix(".md").write_text(report(done.values()))
            print(label, f"{line['seconds']} s;", "; ".join(failures(line)) or "within the tolerances", flush=True)


def run() -> None:
    """Reads the command line and writes the ledger."""
    try:
        main(tyro.cli(Config, description=__doc__, prog="python -m parity"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
