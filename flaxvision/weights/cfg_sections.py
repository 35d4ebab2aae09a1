"""Splits the text of darknet's `.cfg` files into sections and reads their options."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NoReturn

from flaxvision.models.darknet_cfg import ACTIVATIONS

_ALIASES = {"network": "net", "conv": "convolutional", "max": "maxpool", "avg": "avgpool", "conn": "connected"}
_ALIASES |= {"soft": "softmax"}
# Options that change the computation and are not supported, with the value that has no effect.
_NEUTRAL = {
    "convolutional": {
        **dict.fromkeys(("antialiasing", "binary", "xnor", "bin_output", "flipped", "cbn", "coordconv"), "0"),
        **dict.fromkeys(("sway", "rotate", "stretch", "stretch_sway", "reverse", "assisted_excitation", "dot"), "0"),
    },
    "maxpool": {"maxpool_depth": "0", "antialiasing": "0"},
    "shortcut": {"weights_type": "none"},
    "upsample": {},
    "reorg": {"reverse": "0", "flatten": "0", "extra": "0"},
    "dropout": {"dropblock": "0"},
    "yolo": {"new_coords": "0", "focal_loss": "0", "label_smooth_eps": "0", "objectness_smooth": "0"},
    "region": {"coords": "4", "background": "0", "focal_loss": "0", "classfix": "0"},
    "detection": {"coords": "4"},
}
# Options of darknet's training, which are ignored.
_TRAINING = {
    "convolutional": "stopbackward learning_rate dontload train_only_bn angle grad_centr burnin_update stream"
    " wait_stream",
    "maxpool": "stopbackward",
    "shortcut": "weights_normalization stopbackward",
    "route": "stopbackward stream wait_stream",
    "softmax": "groups temperature tree spatial noloss",
    "cost": "type scale ratio",
    "yolo": "jitter random max nms_kind beta_nms resize max_delta show_details iou_thresh_kind delta_normalizer"
    " track_history_size sim_thresh dets_for_track dets_for_show track_ciou_norm",
    "region": "jitter random max absolute log sqrt mask_scale resize",
    "detection": "jitter random max rescore sqrt softmax forced reorg coord_scale object_scale noobject_scale"
    " class_scale resize",
    "connected": "stopbackward learning_rate",
    "local": "stopbackward learning_rate",
}


@dataclasses.dataclass
class Section:
    """A section of a file. Reading an option marks it as used.

    Attributes:
        kind: Name of the section.
        line: Number of the line with its name.
        file: Name of the file.
        options: Value of each option as text, and the number of its line.
        used: Options that have been read.
    """

    kind: str
    line: int
    file: str
    options: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)

    def fail(self, right: str, found: Any, option: str | None = None) -> NoReturn:
        """Raises a ValueError that names the line of the section or of the option."""
        line = self.options[option][1] if option in self.options else self.line
        raise ValueError(f"{self.file}, line {line}, [{self.kind}]: {right}; got {found}")

    def text(self, option: str, default: str) -> str:
        """Returns the value of an option as text, without white space."""
        self.used.add(option)
        return self.options[option][0] if option in self.options else default

    def number(self, option: str, default: float) -> float:
        """Returns the value of an option as a finite number."""
        text = self.text(option, str(default))
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            self.fail(f"{option} must be a number", repr(text), option)
        return value

    def integer(self, option: str, default: int, least: int | None = None) -> int:
        """Returns the value of an option as an integer, which must be at least `least`."""
        value = self.number(option, default)
        if value != int(value) or (least is not None and value < least):
            right = "an integer" if least is None else f"an integer of at least {least}"
            self.fail(f"{option} must be {right}", self.options.get(option, (value, 0))[0], option)
        return int(value)

    def numbers(self, option: str) -> tuple[float, ...]:
        """Returns the value of an option as a list of finite numbers, which is empty if the option is missing."""
        text = self.text(option, "")
        try:
            values = tuple(float(part) for part in text.split(",") if part)
        except ValueError:
            values = (math.nan,)
        if not all(map(math.isfinite, values)):
            self.fail(f"{option} must be numbers with commas between them", repr(text), option)
        return values

    def integers(self, option: str) -> tuple[int, ...]:
        """Returns the integers of a list; empty if the option is missing."""
        values = self.numbers(option)
        if any(value != int(value) for value in values):
            self.fail(f"{option} must be integers with commas between them", repr(self.text(option, "")), option)
        return tuple(map(int, values))

    def activation(self, default: str) -> str:
        """Returns the name of the activation."""
        name = self.text("activation", default)
        if name not in ACTIVATIONS:
            self.fail(f"activation must be one of {', '.join(ACTIVATIONS)}", name, "activation")
        return name

    def references(self, option: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Returns the indices of earlier layers. Negative values count back from this layer."""
        here = len(shapes)
        absolute = tuple(n if n >= 0 else here + n for n in self.integers(option))
        if not absolute or any(not 0 <= n < here for n in absolute):
            given = self.options.get(option, ("nothing", 0))[0]
            self.fail(f"{option} must name layers before this one, number {here}", given, option)
        return absolute

    def check_options(self) -> None:
        """Raises ValueError for an unknown option, or an unsupported one that changes the computation."""
        neutral, training = _NEUTRAL.get(self.kind, {}), _TRAINING.get(self.kind, "").split()
        for option, (value, _) in self.options.items():
            if option in neutral:
                same = value == neutral[option]
                if not same:
                    try:
                        same = float(value) == float(neutral[option])
                    except ValueError:
                        same = False
                if not same:
                    self.fail(f"{option} must be {neutral[option]}, since nothing else is supported", value, option)
            elif option not in self.used and option not in training:
                known = ", ".join(sorted({*self.used, *neutral, *training}))
                self.fail(f"option must be one of {known}", option, option)


def sections_of(text: str, file: str) -> list[Section]:
    """Splits the text of a file into sections.

    Args:
        text: The content of the file.
        file: The name of the file, for error messages.

    Returns:
        The sections in order.

    Raises:
        ValueError: A line is neither a section, an option nor a comment.
    """
    sections: list[Section] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = "".join(raw.split())  # darknet removes all white space
        if not line or line[0] in "#;":
            continue
        if line[0] == "[":
            kind = line[1:].partition("]")[0]
            sections.append(Section(_ALIASES.get(kind, kind), number, file))
            continue
        option, equals, value = line.partition("#")[0].partition("=")
        if not equals or not sections:
            right = "an option and its value with = between them" if sections else "a section such as [net]"
            raise ValueError(f"{file}, line {number}: the line must hold {right}; got {raw.strip()!r}")
        sections[-1].options.setdefault(option, (value, number))  # darknet uses the first of repeated options
    return sections
