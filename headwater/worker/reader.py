"""Read all models of a cluster at one version, without being a worker."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.runtime.client import Client
from headwater.wire.security import PLAIN, Security
from headwater.worker.local_model import LocalModel


def read_parameters(
    coordinator: str, *, security: Security = PLAIN
) -> tuple[int, dict[str, dict[str, NDArray[np.float32]]]]:
    """The version and the values of all models then, as the servers keep them; blocks for a few exchanges.

    The arrays are the caller's.

    Raises:
        ConnectionLostError: a node is gone.
    """
    session = Client(coordinator, "observer", security=security)
    try:
        models = []
        for info in session.describe().models:
            model = LocalModel(session, msgspec.structs.replace(info.spec, values_codec=None))
            models.append(model)
            model.attach(info.model)
        ids = tuple(model.id for model in models)
        answer = session.ask(lambda number: m.Pull(number, ids, -1), "read")
        values = {
            model.name: model.layout.with_aliases(
                {name: view.copy() for name, view in model.parameters.items()}
            )
            for model in models
        }
        for model in models:
            model.release()
        session.leave(finished=True)
        return answer.version, values
    finally:
        session.close()
