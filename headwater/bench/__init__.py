"""Measurements: each figure beside the limit it is held against, taken in turns in the same run."""
