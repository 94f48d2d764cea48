"""The command `headwater`: run a script, ask a cluster how it is, measure this machine."""

from headwater.cli.app import app, main

__all__ = ["app", "main"]
