"""Weights: conversion from and to other libraries, published weights by tag, files, and flaxvision's own bundles.

Importing this package loads no file format and no other library. The functions import what they need.
"""

from flaxvision.weights.bundle import read_bundle, read_card, save
from flaxvision.weights.cfg import load_cfg, parse_cfg, read_cfg
from flaxvision.weights.cfg_writer import save_cfg
from flaxvision.weights.class_names import class_names_for
from flaxvision.weights.convert import convert, export, fields, sources
from flaxvision.weights.darknet import DarknetFile, load_darknet, read_darknet, save_darknet, write_darknet
from flaxvision.weights.download import cache_dir, fetch
from flaxvision.weights.files import read
from flaxvision.weights.load import load, load_model
from flaxvision.weights.preprocessing import preprocessing_for
from flaxvision.weights.tags import WeightsInfo, tag_of, tags

__all__ = [
    "DarknetFile",
    "WeightsInfo",
    "cache_dir",
    "class_names_for",
    "convert",
    "export",
    "fetch",
    "fields",
    "load",
    "load_cfg",
    "load_darknet",
    "load_model",
    "parse_cfg",
    "preprocessing_for",
    "read",
    "read_bundle",
    "read_card",
    "read_cfg",
    "read_darknet",
    "save",
    "save_cfg",
    "save_darknet",
    "sources",
    "tag_of",
    "tags",
    "write_darknet",
]
