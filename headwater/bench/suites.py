"""The suites of `headwater bench` by name."""
SUITES: dict = {}
