"""Arithmetic with one implementation per platform.

The rest of the package reaches everything specific to a platform through the functions that are exported here. Plain
lax defines each of them, and it is what cuda and tpu run. On a CPU they take another form of the same sums, chosen when
a program is lowered. Parameters, results (up to rounding) and derivatives of any order are the same on all platforms;
see `primitive`. There is one exception: on cuda and tpu, forward-mode derivatives of a max-pool are those of
`lax.reduce_window`. At ties they differ from its reverse-mode derivatives, and JAX computes them in reduced precision
for float64.
"""

from flaxvision.layers.lowering.convolution import conv_general_dilated, convolutions_saveable
from flaxvision.layers.lowering.gather import sum_rows
from flaxvision.layers.lowering.pooling import first_larger, max_windows, sum_windows
from flaxvision.layers.lowering.reductions import channel_sum, spread, standardize
from flaxvision.layers.lowering.rows import map_rows, unfused
from flaxvision.layers.lowering.window import dimension_numbers_of

__all__ = [
    "channel_sum",
    "conv_general_dilated",
    "convolutions_saveable",
    "dimension_numbers_of",
    "first_larger",
    "map_rows",
    "max_windows",
    "spread",
    "standardize",
    "sum_rows",
    "sum_windows",
    "unfused",
]
