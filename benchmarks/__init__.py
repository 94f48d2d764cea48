"""Measurements of Headwater beside other systems; no part of the package. Run from the root of a clone."""
