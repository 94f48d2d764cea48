"""Compiles what a model or table will need, where nobody waits for it.

A loop is compiled when it is first used, which takes seconds where no process of this user has done so. On a
server that would be in the middle of an entry of the log, and all its members would wait.
"""

from __future__ import annotations

from headwater.kernels import arrange, merges, moves, rows, squares


def compile_for_model(*, clipped: bool, merged: bool) -> None:
    """All but the pass of the rule. `clipped`: norms are summed; `merged`: other than by mean or sum."""
    moves.compiled()
    if clipped:
        squares.compiled()
    if merged:
        merges.compiled()


def compile_for_table() -> None:
    """All but the row pass of the rule."""
    moves.compiled()
    rows.compiled()
    arrange.compiled()
