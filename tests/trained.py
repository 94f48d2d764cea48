"""A training whose every step a test asks for, in threads of this process."""

import queue
import threading
from contextlib import contextmanager

import numpy as np

import headwater as hw

SIZE = 2500


class Trained:
    """One worker of an inline cluster: `do(f)` runs f(worker, model, table) there and returns its value.

    Attributes:
        values: by version, what each element of `w` is then, where `step` made that version.
    """

    def __init__(self, address, asked, told):
        self.address = address
        self.values = {0: 0.0}
        self._asked, self._told = asked, told

    def do(self, what):
        self._asked.put(what)
        value = self._told.get(timeout=60)
        if isinstance(value, BaseException):
            raise value
        return value

    def step(self, count=1, ids=(), rows=1.0):
        """So many steps that add 1 to every element, and `rows` to these rows; the version after them."""

        def steps(worker, model, table):
            for _ in range(count):
                model.push({"w": np.ones(SIZE, np.float32), "b": np.ones(3, np.float32)})
                if len(ids):
                    table.push(np.asarray(ids), np.full((len(ids), table.dim), rows, np.float32))
                worker.step()
                self.values[worker.version] = float(model.pull()["w"][0])
            return worker.version

        return self.do(steps)

    def value(self, version):
        """What each element of `w` is at a version."""
        return self.values[max(known for known in self.values if known <= version)]

    def pull(self, ids):
        """The rows of ids as a worker sees them."""
        return self.do(lambda worker, model, table: table.pull(np.asarray(ids)))


@contextmanager
def trained(*, servers=2, sync="async", dim=2, steps=0, start=None, **table):
    """`steps`: taken before anybody follows. `start`: other arguments of `hw.run`."""
    asked, told, addresses = queue.Queue(), queue.Queue(), queue.Queue()

    def train(worker):
        model = worker.model(
            "net", {"w": np.zeros(SIZE, np.float32), "b": np.zeros(3, np.float32)}, hw.Accumulate()
        )
        rows = worker.table("users", dim, hw.Accumulate(), initializer=hw.Uniform(-1.0, 1.0), **table)
        while (what := asked.get()) is not None:
            try:
                told.put(what(worker, model, rows))
            except BaseException as error:  # noqa: BLE001 - for the test
                told.put(error)

    def run():
        options = {"deadline": 60, **(start or {})}
        try:
            hw.run(
                train,
                workers=1,
                servers=servers,
                sync=sync,
                engine="inline",
                started=addresses.put,
                **options,
            )
        except BaseException as error:  # noqa: BLE001 - for the test
            addresses.put(error)
            told.put(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        address = addresses.get(timeout=60)
        if isinstance(address, BaseException):
            raise address
        training = Trained(address, asked, told)
        if steps:
            training.step(steps)
        yield training
    finally:
        asked.put(None)
        thread.join(60)
