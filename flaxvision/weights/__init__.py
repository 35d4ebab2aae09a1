"""The world's weights: other libraries' tensors, published tags, files, and our own bundles.

Importing this package loads no file format and no library: the functions import what they need.
"""

from flaxvision.weights.bundle import read_bundle, read_card, save
from flaxvision.weights.convert import convert, export, fields, sources
from flaxvision.weights.download import cache_dir, fetch
from flaxvision.weights.files import read
from flaxvision.weights.load import load, load_model
from flaxvision.weights.tags import WeightsInfo, tag_of, tags

__all__ = [
    "WeightsInfo",
    "cache_dir",
    "convert",
    "export",
    "fetch",
    "fields",
    "load",
    "load_model",
    "read",
    "read_bundle",
    "read_card",
    "save",
    "sources",
    "tag_of",
    "tags",
]
