"""The models and tables that a worker has registered, by name: the user's handles and this worker's sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headwater.errors import UsageError
from headwater.worker.local_model import LocalModel
from headwater.worker.local_table import LocalTable
from headwater.worker.model import Model
from headwater.worker.table import Table


class Registrations:
    """Holds what one worker has registered.

    Attributes:
        models, tables: handles by name.
        local_models, local_tables: this worker's sides of them, in the order of registration.
    """

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.tables: dict[str, Table] = {}
        self.local_models: list[LocalModel] = []
        self.local_tables: list[LocalTable] = []

    def add_model(self, model: Model) -> None:
        """Note a model that the servers know from now on."""
        self.models[model.name] = model
        self.local_models.append(model.local)

    def add_table(self, table: Table) -> None:
        """Note a table that the servers know from now on."""
        self.tables[table.name] = table
        self.local_tables.append(table.local)

    def read_by_step(self, read: Any) -> Sequence[LocalModel]:
        """The models that a step reads, which a user named. Raises UsageError."""
        listed = isinstance(read, Sequence | set | frozenset) and not isinstance(read, str | bytes)
        if not listed or any(one not in self.models.values() for one in read):
            known = ", ".join(map(repr, self.models)) or "none"
            raise UsageError(
                f"step: got read={read!r}, expected True, False or a list of this worker's models, which are "
                f"{known}; nothing was sent"
            )
        return [model.local for model in read]

    def check_tables(self, ids: object) -> None:
        """Raises UsageError where `ids` is not a mapping from these tables."""
        if not isinstance(ids, Mapping) or any(one not in self.tables.values() for one in ids):
            known = ", ".join(map(repr, self.tables)) or "none"
            raise UsageError(
                f"pull: got {ids!r}, expected a mapping from this worker's tables, the objects that "
                f"worker.table gave, to ids; its tables are {known}"
            )

    def outdate(self) -> None:
        """Note that values may have changed without this worker's step."""
        for model in self.local_models:
            model.outdated()

    def release(self) -> None:
        """Give the models' memory back."""
        for model in self.local_models:
            model.release()
