"""How long things take in a simulated cluster, in virtual seconds: as in a real one, fifty times as fast.

A message takes as long as a real one on a busy machine, so waits and failures overlap with more of the
training than they would with a real lease.
"""

LEASE_S = 0.3
"""Who is not heard of for so long is declared dead."""

NO_LEASE_S = 1e6
"""Where nobody sends heartbeats, since nobody is stopped or cut off."""

HEARTBEAT_S = LEASE_S / 3

PATIENCE_S = 0.2
"""How long a server lets a member wait before it may be served."""

ANSWER_S = 0.04
"""How long a server may take to acknowledge a roster before others need not wait for that."""

BEGIN_S = 0.004
"""How long a process takes until it joins, on average."""

START_S = 0.05
"""How long it takes to start a process in the place of one that ended."""

QUIET_S = 12.0
"""When nobody was answered for so long, nothing is to come."""

DEADLINE_S = 60.0
"""Of the cluster: members give up after that. It is longer than `QUIET_S`, where more is said of why."""

SETTLED_S = 0.3
"""How long after the last answer everything that was sent has arrived."""

STANDBY_S = 1.0
"""How long a standby may be unreachable, or owe an acknowledgement."""
