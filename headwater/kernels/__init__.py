"""Compiled loops."""

from __future__ import annotations

from headwater.kernels.cache import load
from headwater.kernels.fused import dense
from headwater.kernels.moves import TEMPLATE


def _moves():
    return load(TEMPLATE)


def copy_out(values, answers):
    _moves().copy_out(values, answers)


def stage(source, destination, add):
    return _moves().stage(source, destination, add)


def finite(array):
    return _moves().finite(array)
