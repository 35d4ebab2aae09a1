"""Measurements of speed. Run from the root of a checkout: `python -m benchmarks.throughput --help`."""
