"""Compiles the loops that a request will need, in the thread that brings it.

A request is processed under a server's lock, with everybody waiting; it is brought in its connection's own
thread, where nobody does. So whoever brings one, a member or the server that a standby follows, calls this
first. Where the loops are compiled already it takes no time.
"""

from __future__ import annotations

from headwater import messages as m
from headwater.kernels.ahead import compile_for_bfloat16, compile_for_vectors, compile_for_weights
from headwater.shard.checks import check_declared


def compile_for(request: m.AnyMessage) -> None:
    """Blocks while something is compiled. Raises as `check_declared`, for what declares."""
    if isinstance(request, m.Step):
        if request.weight != 1.0:
            compile_for_weights()
    elif isinstance(request, m.Register | m.RegisterTable):
        check_declared(request.spec)
    elif isinstance(request, m.Operate | m.NextPortion) or (
        isinstance(request, m.Meet) and request.work is not None
    ):
        compile_for_vectors()
    elif isinstance(request, m.Publish) and request.dtype == "bfloat16":
        compile_for_bfloat16()


def compile_for_snapshot(snapshot: m.Snapshot) -> None:
    """Of a shard that is to be gone on with. Blocks and raises as `compile_for`."""
    for model in snapshot.models:
        check_declared(model.spec)
    for table in snapshot.tables:
        check_declared(table.spec)
