"""The command line: what the package has, what a network says of pictures, other libraries' weights as bundles.

    flaxvision list 'resnet*'
    flaxvision predict resnet50 torchvision/IMAGENET1K_V2 photo.jpg
    flaxvision convert resnet20_cifar resnet20.npz resnet20.safetensors --source akamaster

`flaxvision COMMAND --help` shows a command's flags.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import flax
import jax
import numpy as np
import tyro

import flaxvision as fv
from flaxvision.weights.tags import preprocessing_of

Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Weights = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")]


@dataclasses.dataclass(frozen=True)
class List:
    """The registered models: year, input, parameters and the tags of their published weights."""

    pattern: Annotated[str, tyro.conf.Positional] = "*"
    """A shell pattern of names, in quotes."""
    task: Literal["classification", "detection", "segmentation"] | None = None
    """Those of one task. Default: all."""

    def run(self) -> None:
        """Prints them."""
        names = fv.list_models(self.pattern, task=self.task)
        if not names:
            task = f" of {self.task}" if self.task else ""
            raise ValueError(f"no model{task} has a name like {self.pattern!r}; flaxvision list shows all")
        wide = max(map(len, names))
        for name in names:
            info = fv.model_info(name)
            size = "x".join(map(str, (*info.input_size, info.channels)))
            print(f"{name:{wide}}  {info.year}  {size:>9}  {info.params:>11,}  {' '.join(info.weights)}".rstrip())


@dataclasses.dataclass(frozen=True)
class Predict:
    """The likeliest classes of pictures, by the evaluation transform of the weights."""

    model: Name
    """A name of `flaxvision list`."""
    weights: Weights
    """A published tag of `flaxvision list`, fetched once, or a file: a bundle, .safetensors, .npz, .h5 or .pth."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE [IMAGE ...]")]
    """Pictures that Pillow reads."""
    source: str | None = None
    """For a file that is no bundle: the library whose names its tensors have."""
    preprocessing: str | None = None
    """A tag, or a source, whose transform to take. Default: that of the weights."""
    classes: Path | None = None
    """A text file with a class's name a line. Default: classes are numbers."""
    top: int = 5
    """How many classes."""

    def run(self) -> None:
        """Prints a line for each picture and class."""
        if self.top < 1:
            raise ValueError(f"--top must be at least 1; got {self.top}")
        if not self.images:
            raise ValueError("there is no picture; give the path of at least one")
        from PIL import Image

        model, variables = fv.weights.load_model(self.model, self.weights, source=self.source)
        if not model.num_classes:  # type: ignore[attr-defined]
            raise ValueError(f"{self.weights} has no classes: it gives features")
        expects = self.preprocessing or self.source or self.weights
        transform = fv.data.preprocessing_for(self.model, expects)
        if preprocessing_of(self.model, expects) is None:
            print(f"note: {expects} does not say its transform, so this is a guess: {transform}", file=sys.stderr)
        # Lengths of capsules are no logits.
        probability = (lambda x: x) if isinstance(model, fv.models.CapsNet) else jax.nn.softmax
        apply = jax.jit(model.apply)
        names = self.classes.read_text().splitlines() if self.classes else None
        for path in self.images:
            with Image.open(path) as image:
                pixels = transform(image)
            logits = np.asarray(apply(variables, pixels[None]))[0]
            if names is not None and len(names) != len(logits):
                raise ValueError(f"{self.classes} names {len(names)} classes; the weights have {len(logits)}")
            likely = np.asarray(probability(logits))
            for place in np.argsort(-likely, kind="stable")[: self.top]:
                print(f"{path}  {likely[place]:7.2%}  {names[place] if names else place}")


@dataclasses.dataclass(frozen=True)
class Convert:
    """Writes a bundle of flaxvision, PATH.safetensors with its card PATH.json, from published weights or a file."""

    model: Name
    """A name of `flaxvision list`."""
    weights: Weights
    """A published tag, or a file; see `flaxvision predict`."""
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH.safetensors")]
    """Of the bundle."""
    source: str | None = None
    """For a file that is no bundle: the library whose names its tensors have."""
    num_classes: int | None = None
    """Start the layers that depend on it fresh for so many classes; 0 leaves them out."""
    channels: int | None = None
    """Fold the first kernel for images of so many channels."""
    preprocessing: str | None = None
    """A tag, or a source, whose evaluation transform goes into the card. Default: that of the weights, if they say."""

    def run(self) -> None:
        """Writes the bundle."""
        options = {"source": self.source, "num_classes": self.num_classes, "channels": self.channels}
        model, variables = fv.weights.load_model(self.model, self.weights, **options)
        usual = fv.model_fields(fv.create_model(self.model))
        overrides = {name: value for name, value in fv.model_fields(model).items() if value != usual[name]}
        bundle = self.source is None and self.weights not in fv.weights.tags(self.model)
        old = fv.weights.read_card(self.weights) if bundle else {"metadata": {}, "channels": None, "input_size": None}
        channels = self.channels or old["channels"]
        metadata = old["metadata"] | {"from": self.weights, "source": self.source}
        transform = preprocessing_of(self.model, self.preprocessing or self.source or self.weights)
        if transform and self.channels not in (None, 3):  # it was for other images
            grey = {"order": "L", "mean": (np.mean(transform.mean).item(),), "std": (np.mean(transform.std).item(),)}
            transform = dataclasses.replace(transform, **grey) if self.channels == 1 else None
        metadata["preprocessing"] = dataclasses.asdict(transform) if transform else None
        how: dict[str, Any] = {"channels": channels, "input_size": old["input_size"], "metadata": metadata}
        card = fv.weights.save(self.path, variables, name=self.model, **how, **overrides)
        print(f"{self.path}: {fv.weights.read_card(self.path)['parameters']:,} parameters; its card is {card}")


def main(args: list[str] | None = None) -> int:
    """Runs a command; returns the process's exit status."""
    commands: dict[str, Any] = {"list": List, "predict": Predict, "convert": Convert}
    command = tyro.extras.subcommand_cli_from_dict(commands, prog="flaxvision", description=__doc__, args=args)
    try:
        command.run()
    except (ValueError, OSError, ImportError, flax.errors.FlaxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
