"""Copies between a process's own arrays and windows, one pass each."""

from __future__ import annotations

TEMPLATE = '''"""Copies into and out of windows."""
import math

import numpy as np
from headwater.kernels.primitives import floats, outer


@outer("void(float32[::1], int64[::1])")
def copy_out(values, answers):
    for answer in answers:
        floats(answer, 0, len(values))[:] = values


@outer("boolean(float32[::1], float32[::1], boolean)")
def stage(source, destination, add):
    if len(source) != len(destination):
        raise ValueError("source and destination differ in length")
    bad = np.int32(0)
    if add:
        for i in range(len(source)):
            bad |= np.int32(not math.isfinite(source[i]))
            destination[i] += source[i]
    else:
        for i in range(len(source)):
            bad |= np.int32(not math.isfinite(source[i]))
            destination[i] = source[i]
    return bad == 0


@outer("boolean(float32[::1])")
def finite(array):
    bad = np.int32(0)
    for i in range(len(array)):
        bad |= np.int32(not math.isfinite(array[i]))
    return bad == 0
'''
