"""Compiled loops: each is generated, compiled once a machine, and has a plain NumPy reference in the tests.

The only place that knows numba; it is imported with the first kernel that is used, not before.
"""

from __future__ import annotations

from headwater.kernels.fused import Update, dense
from headwater.kernels.merges import middle, weigh
from headwater.kernels.moves import add_up, copy_out, finite, finite_sum, stage, stager
from headwater.kernels.squares import multiply_up, square_up

__all__ = [
    "Update",
    "add_up",
    "copy_out",
    "dense",
    "finite",
    "finite_sum",
    "middle",
    "multiply_up",
    "square_up",
    "stage",
    "stager",
    "weigh",
]
