"""Compressed run-length encodings (RLE) of masks, in the format of COCO.

The runs alternate between zeros and ones, start with zeros, and go down the columns of the mask. pycocotools reads them
too, but with NumPy 2 its decoder warns (2.0.11), and it does not check that the runs fill the mask.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def runs_of(counts: bytes) -> np.ndarray:
    """Returns the lengths of the runs, int64.

    A length is stored in characters of five bits, lowest bits first. A sixth bit tells whether more characters follow.
    From the fourth run on, the difference from the run before the last one is stored.

    Args:
        counts: The `counts` of a compressed RLE.

    Raises:
        ValueError: `counts` is not a compressed RLE.
    """
    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    last = codes & 32 == 0
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not last[-1]:
        raise ValueError(f"counts must be a compressed RLE; got {counts[:60]!r}")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    bit = 5 * (np.arange(len(codes)) - np.repeat(starts, ends - starts + 1))
    if bit.max() > 50:
        raise ValueError(f"counts must have runs of less than 2^50; got {counts[:60]!r}")
    runs = np.add.reduceat((codes & 31) << bit, starts)
    runs -= np.where(codes[ends] & 16, 1 << (bit[ends] + 5), 0)  # the highest bit is the sign
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def area(counts: bytes) -> int:
    """Returns the number of ones of a mask.

    Args:
        counts: The `counts` of a compressed RLE.
    """
    return int(runs_of(counts)[1::2].sum())


def encode(masks: np.ndarray) -> tuple[bytes, ...]:
    """Encodes masks with pycocotools.

    Args:
        masks: Zeros and ones, or bool, [M, height, width].

    Returns:
        The `counts` of M compressed RLEs.
    """
    import pycocotools.mask

    coder: Any = pycocotools.mask  # its type hints give str or bytes
    return tuple(coder.encode(np.asfortranarray(mask, np.uint8))["counts"] for mask in masks)


def decode(masks: Sequence[bytes], size: tuple[int, int]) -> np.ndarray:
    """Decodes masks.

    Args:
        masks: The `counts` of M compressed RLEs, whose runs fill the masks.
        size: Height and width of the masks in pixels.

    Returns:
        Zeros and ones, uint8 [M, height, width].
    """
    decoded = np.zeros((len(masks), *size), np.uint8)
    for mask, counts in zip(decoded, masks, strict=True):
        runs = runs_of(counts)
        mask[:] = np.repeat(np.arange(len(runs), dtype=np.uint8) & 1, runs).reshape(size[::-1]).T
    return decoded
