"""Modes compared: the same data, seeds and delays for each, measured here and predicted for others."""

from headwater.comparison.comparison import Comparison
from headwater.comparison.measure import compare

__all__ = ["Comparison", "compare"]
