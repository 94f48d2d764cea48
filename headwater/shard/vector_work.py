"""What the members of a meeting have the servers do with vectors: refused, measured, done.

Pure: it depends on the entry, the requests and the vectors alone, so all servers and their standbys do the
same. The members of one meeting ask for the same work; the first one's counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headwater import messages as m
from headwater.errors import UsageError
from headwater.log.norms import Node
from headwater.shard.named_vectors import Array, BroughtGradients, check, coefficients
from headwater.shard.vector import Vector


def refusal(vectors: Mapping[int, Vector], work: m.VectorWork) -> str:
    """Why work cannot be done with the vectors of now; "" where it can."""
    vector = vectors[work.model]

    def owners(name: str) -> list[str]:
        return [other.spec.name for other in vectors.values() if name in other.named.arrays]

    try:
        check(vector.spec.name, vector.named.arrays, work, owners)
    except UsageError as error:
        return str(error)
    return ""


def gathered(work: m.VectorWork, requests: Sequence[m.Meet], gradients: Sequence[Array]) -> BroughtGradients:
    """The gradients of these members, in rank order, as the work's gathering weighs them."""
    means = [one.mean for one in work.operations if isinstance(one, m.GatherGradients)]
    if not means:
        return BroughtGradients()
    return BroughtGradients(gradients, coefficients([request.weight for request in requests], means[0]))


def perform(
    vectors: Mapping[int, Vector], work: m.VectorWork, brought: BroughtGradients, version: int
) -> None:
    """Do what is not refused; blocks for a pass over memory."""
    vectors[work.model].perform(work, brought, version)


def reduce(
    vectors: Mapping[int, Vector], work: m.VectorWork, brought: BroughtGradients
) -> list[tuple[m.Reduction, int, Node]]:
    """This server's part of all reductions: each with its number and a node of its sum.

    Blocks for a pass over memory. Work that is refused has no parts.
    """
    if refusal(vectors, work):
        return []
    vector = vectors[work.model]
    parts = vector.named.reduce(work, vector.values, brought)
    return [(work.reductions[number], number, node) for number, node in parts]
