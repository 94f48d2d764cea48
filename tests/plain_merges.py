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
