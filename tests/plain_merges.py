"""Several gradients as one, in plain NumPy: what the kernels and the servers are held against."""

import numpy as np


def weighted_sum(gradients, weights):
    """float32[n]: gradients[0] · weights[0] + …, each product and each sum rounded, in this order."""
    with np.errstate(all="ignore"):
        total = gradients[0] * np.float32(weights[0])
        for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
            total = total + gradient * np.float32(weight)
    return total


def weighted_mean(gradients, weights):
    """float32[n]: Σ weight · gradient / Σ weight."""
    return weighted_sum(gradients, weights) / np.float32(sum(weights))


def middle(gradients, zeros=0, left_out=0):
    """float32[n]: the mean of each element's middle values; NaN where any of them is."""
    values = np.stack([*gradients, *[np.zeros_like(gradients[0])] * zeros])
    ordered = np.sort(values, axis=0)[left_out : len(values) - left_out]
    with np.errstate(all="ignore"):
        total = ordered[0].copy()
        for one in ordered[1:]:
            total = total + one
        return np.where(np.isnan(values).any(axis=0), np.float32(np.nan), total / np.float32(len(ordered)))


def median(gradients):
    """float32[n]: of each element."""
    return middle(gradients, left_out=(len(gradients) - 1) // 2)


def trimmed(gradients, trim):
    """float32[n]: the mean of each element's values without the `trim` smallest and largest."""
    return middle(gradients, left_out=min(trim, (len(gradients) - 1) // 2))


def rda(gradients, weights=None):
    """float64, of one tensor: the weighted mean of the lengths, along the weighted sum of unit vectors."""
    weights = np.ones(len(gradients)) if weights is None else np.array(weights, np.float64)
    wide = [np.asarray(gradient, np.float64) for gradient in gradients]
    lengths = np.array([np.linalg.norm(one) for one in wide])
    length = (weights * lengths).sum() / weights.sum()
    direction = sum(
        weight * one / size for weight, one, size in zip(weights, wide, lengths, strict=True) if size > 0
    )
    size = np.linalg.norm(direction)
    return np.zeros_like(wide[0]) if np.all(size < 1e-6 * weights.sum()) else length * direction / size
