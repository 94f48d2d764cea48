"""Compiles what a model, a table or a request will need, where nobody waits for it.

A loop is compiled when it is first used, which takes seconds where no process of this user has done so. On a
server that would be in the middle of an entry of the log, and all its members would wait.
"""

from __future__ import annotations

from headwater.kernels import arrange, cast, codecs, combinations, merges, moves, rows, squares


def compile_for_model(*, measured: bool, merged: bool, coded: bool) -> None:
    """All but the pass of the rule. `measured`: norms or products are summed; `merged`: other than by mean or
    sum; `coded`: gradients or values are represented otherwise than as float32."""
    moves.compiled()
    if measured:
        squares.compiled()
    if merged:
        merges.compiled()
    if coded:
        codecs.compiled()


def compile_for_table(*, coded: bool, kept: bool = True) -> None:
    """All but the row pass of the rule. `coded`: its gradients are represented otherwise than as float32;
    `kept`: rows are kept here, and not only asked for."""
    moves.compiled()
    arrange.compiled()
    if kept:
        rows.compiled()
    if coded:
        codecs.compiled()


def compile_for_weights() -> None:
    """A step counts more or less than others in a mean."""
    merges.compiled()


def compile_for_vectors() -> None:
    """Servers work on vectors beside a model's values."""
    combinations.compiled()


def compile_for_bfloat16() -> None:
    """Values are published as bfloat16."""
    cast.compiled()
