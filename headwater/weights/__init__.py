"""Published weights: versions of a model as files that inference engines pull, in full or as deltas.

The format: docs/weights-format.md.
"""

from headwater.weights.notify import Notification
from headwater.weights.reader import Weights, WeightsReader, load_weights, versions
from headwater.weights.writer import PublishedVersion, TableDelta, WeightsWriter

__all__ = [
    "Notification",
    "PublishedVersion",
    "TableDelta",
    "Weights",
    "WeightsReader",
    "WeightsWriter",
    "load_weights",
    "versions",
]
