"""Command line: list models, classify images, detect objects, segment images, convert weights.

    flaxvision list 'resnet*'
    flaxvision predict resnet50 torchvision/IMAGENET1K_V2 photo.jpg
    flaxvision predict yolo_v3 darknet/coco street.jpg --out boxes.png
    flaxvision predict deeplabv3_resnet50 torchvision/COCO_WITH_VOC_LABELS_V1 street.jpg --out overlay.png
    flaxvision predict yolov4-tiny.cfg yolov4-tiny.weights street.jpg --classes coco.names --out boxes.png
    flaxvision convert resnet20_cifar resnet20.npz resnet20.safetensors --source akamaster

`flaxvision COMMAND --help` shows the options of a command.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import flax
import jax
import numpy as np
import tyro

import flaxvision as fv
from flaxvision.weights.load import load_weights
from flaxvision.weights.preprocessing import known_preprocessing

Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Weights = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")]


@dataclasses.dataclass(frozen=True)
class List:
    """List the registered models with year, input size, parameters and the tags of their published weights."""

    pattern: Annotated[str, tyro.conf.Positional] = "*"
    """Shell pattern of model names, in quotes."""
    task: Literal["classification", "detection", "segmentation"] | None = None
    """List only the models of one task. Default: all."""

    def run(self) -> None:
        """Prints one line per model."""
        names = fv.list_models(self.pattern, task=self.task)
        if not names:
            task = f" with the task {self.task}" if self.task else ""
            raise ValueError(
                f"pattern must match a model{task}; got {self.pattern!r}; `flaxvision list` shows all names"
            )
        wide = max(map(len, names))
        for name in names:
            info = fv.model_info(name)
            size = "x".join(map(str, (*info.input_size, info.channels)))
            print(f"{name:{wide}}  {info.year}  {size:>9}  {info.params:>11,}  {' '.join(info.weights)}".rstrip())


@dataclasses.dataclass(frozen=True)
class Predict:
    """Print the most probable classes of images, or detect objects in them, or segment them.

    The transform of the images is that of the weights.
    """

    model: Name
    """Name of a model, see `flaxvision list`; or a detector's .cfg file of darknet."""
    weights: Weights
    """Published tag, see `flaxvision list`; or a file: a bundle, .safetensors, .npz, .h5, .pth or darknet's .weights.
    The file of a tag is downloaded once."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE [IMAGE ...]")]
    """Image files in any format that Pillow reads; at least one."""
    source: str | None = None
    """Library that named the tensors; needed for files that are not bundles."""
    preprocessing: str | None = None
    """Tag or source that gives the evaluation transform. Default: the transform of the weights."""
    classes: Path | None = None
    """Text file with one class name per line. Default: the class names of the weights, or numbers if there are none."""
    top: int = 5
    """Number of classes to print; classifiers only."""
    out: Path | None = None
    """Picture of the detections or of the segments, or a folder of pictures for several images; not for classifiers."""
    json: bool = False
    """Print JSON instead of a table; not for classifiers."""
    score: float = 0.3
    """Minimum score of a detection; detectors only."""
    iou: float = 0.5
    """IoU above which a detection suppresses others of its class; detectors only."""
    size: int | None = None
    """Side of the square that images are padded to; detectors only. Default: that of the weights or of the model."""
    tile: int | None = None
    """Side of the tiles in which images are segmented, for large images; segmenters only. Default: whole images."""
    overlap: int = 0
    """Pixels that neighbouring tiles share; segmenters only."""

    def run(self) -> None:
        """Prints one line per image and class, or per detection."""
        if self.top < 1:
            raise ValueError(f"--top must be at least 1; got {self.top}")
        if not self.images:
            raise ValueError("IMAGE must be the path of at least one image; got none")
        described = self.model.endswith(".cfg")
        task = "detection" if described else fv.model_info(self.model).task
        if task != "segmentation" and (self.tile is not None or self.overlap):
            raise ValueError(f"--tile and --overlap must be left out, since they are for segmenters; got {self.model}")
        if task == "classification" and (self.out is not None or self.json):
            raise ValueError(f"--out and --json must be left out for a classifier; got {self.model}")
        if described:
            model, variables = fv.weights.load_cfg(self.model, self.weights)
            if not isinstance(model, fv.models.CfgDetector):
                raise ValueError(f"MODEL must have [yolo] or [region] heads; got {self.model}")
            names = None
        else:
            loaded = load_weights(self.model, self.weights, source=self.source)
            model, variables, names = loaded.model(), loaded.variables, loaded.class_names
        count = getattr(model, "num_labels", None) or getattr(model, "num_classes", 0)
        if not count:
            raise ValueError(f"WEIGHTS must include a classifier head; got {self.weights}, which gives features")
        if self.classes is not None:
            names = tuple(self.classes.read_text().splitlines())
            if len(names) != count:
                raise ValueError(f"--classes must have one name for each of {count} classes; got {len(names)} names")
        if len(self.images) > 1 and self.out is not None and self.out.suffix:
            raise ValueError(f"--out must be a folder for {len(self.images)} images; got the file {self.out}")
        run = {"detection": self._detect, "segmentation": self._segment, "classification": self._classify}[task]
        run(model, variables, names)

    def _detect(self, model: Any, variables: Any, names: Sequence[str] | None) -> None:
        from flaxvision import predict

        if isinstance(model, fv.models.CfgDetector):
            transform = predict.cfg_transform(model, self.size)
        else:
            stated = self.preprocessing or self.source or self.weights
            transform = predict.detector_transform(self.model, stated, self.size)
        options = {"score_threshold": self.score, "iou_threshold": self.iou}
        results = predict.detect_in_files(model, variables, transform, self.images, **options)
        print(predict.to_json(results, names) if self.json else predict.table(results, names))
        for file in predict.draw(results, names, self.out) if self.out is not None else ():
            print(f"see {file}", file=sys.stderr)

    def _segment(self, model: Any, variables: Any, names: Sequence[str] | None) -> None:
        from flaxvision import predict_segments

        transform = self._transform()
        options = {"tile": self.tile, "overlap": self.overlap}
        results = predict_segments.segment_files(model, variables, transform, self.images, **options)
        write = predict_segments.to_json if self.json else predict_segments.table
        print(write(results, names))
        for file in predict_segments.draw(results, names, self.out) if self.out is not None else ():
            print(f"see {file}", file=sys.stderr)

    def _transform(self) -> Any:
        stated = self.preprocessing or self.source or self.weights
        transform = fv.weights.preprocessing_for(self.model, stated)
        if known_preprocessing(self.model, stated) is None:
            print(f"note: {stated} does not state its preprocessing; this is a guess: {transform}", file=sys.stderr)
        return transform

    def _classify(self, model: Any, variables: Any, names: Sequence[str] | None) -> None:
        from PIL import Image

        transform = self._transform()
        # The capsule network gives lengths between 0 and 1, not logits.
        probability = (lambda x: x) if isinstance(model, fv.models.CapsNet) else jax.nn.softmax
        apply = jax.jit(model.apply)
        for path in self.images:
            with Image.open(path) as image:
                pixels = transform(image)
            logits = np.asarray(apply(variables, pixels[None]))[0]
            likely = np.asarray(probability(logits))
            for place in np.argsort(-likely, kind="stable")[: self.top]:
                print(f"{path}  {likely[place]:7.2%}  {names[place] if names else place}")


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert published weights or a file to a flaxvision bundle: PATH.safetensors and its card PATH.json."""

    model: Name
    """Name of a model, see `flaxvision list`."""
    weights: Weights
    """Published tag or a file, as for `flaxvision predict`."""
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH.safetensors")]
    """Path of the bundle."""
    source: str | None = None
    """Library that named the tensors; needed for files that are not bundles."""
    num_classes: int | None = None
    """Initialize the head anew for this number of classes; 0 leaves it out."""
    channels: int | None = None
    """Fold the first kernel for images with this number of channels."""
    preprocessing: str | None = None
    """Tag or source of the evaluation transform to store in the card. Default: that of the weights, if they state
    one."""

    def run(self) -> None:
        """Writes the bundle."""
        options = {"source": self.source, "num_classes": self.num_classes, "channels": self.channels}
        loaded = load_weights(self.model, self.weights, **options)
        from_bundle = self.source is None and self.weights not in fv.weights.tags(self.model)
        metadata = fv.weights.read_card(self.weights)["metadata"] if from_bundle else {}
        transform = known_preprocessing(self.model, self.preprocessing or self.source or self.weights)
        if transform and self.channels not in (None, 3):  # the transform is for colour images
            grey = {"order": "L", "mean": (np.mean(transform.mean).item(),), "std": (np.mean(transform.std).item(),)}
            transform = dataclasses.replace(transform, **grey) if self.channels == 1 else None
        stated = dataclasses.asdict(transform) if transform else None
        card = fv.weights.save(
            self.path,
            loaded.variables,
            name=self.model,
            channels=loaded.channels,
            input_size=loaded.input_size,
            class_names=loaded.class_names,
            metadata=metadata | {"from": self.weights, "source": self.source, "preprocessing": stated},
            **loaded.fields,
        )
        print(f"{self.path}: {fv.weights.read_card(self.path)['parameters']:,} parameters, described by {card}")


def main(args: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        args: The arguments; None for those of the process.

    Returns:
        The exit status: 0, or 1 after an error.
    """
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
