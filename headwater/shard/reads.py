"""Reads that are answered at once: a member is given what is applied here, without an entry of the log.

Invariants:
- Only entries that were applied are visible, so nothing that a failover could undo.
- A read changes nothing that follows from the log: a standby that never heard of it has the same bits.
- All of a read is of one version, as nothing is applied meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headwater import messages as m
from headwater.shard.outstanding import Members
from headwater.shard.state import State
from headwater.shard.tables import StagedRows


def read(
    state: State, members: Members, member: int, request: m.Read, rows: Sequence[StagedRows]
) -> m.Answer:
    """Write what a checked request asks for, of the version of now, to the member's memory.

    What `members.take_copies` gives then follows the answer. Blocks for a pass over what is read.
    """
    version = state.version
    if type(request) is m.Pull:
        mine, have, vectors = members.stagings(member), request.have, state.vectors
        changed = tuple([model for model in request.models if vectors[model].changed > have])
        for model in changed:
            vectors[model].write((mine[model],))
        return m.Answer(request.number, version, changed)
    if type(request) is m.PullRows:
        state.tables.pull(rows, version)
    elif type(request) is m.CountRows:
        count = state.tables[request.table].count(version)
        members.keep_copies(member, [np.array([count], dtype=np.int64)])
    return m.Answer(request.number, version)
