"""One server's way through the log, where threads meet."""

import threading

from headwater import messages as m
from headwater.runtime.server.applier import LogApplier, Progress
from headwater.shard import Shard


class Interrupted(LogApplier):
    """A sequencer says what stands just when `process` looks whether it did."""

    _said = False
    _value = False
    interrupting = None

    @property
    def _moved(self):
        value = self._value
        if self.interrupting is not None and not self._said:
            self._said = True
            self.interrupting.start()
            self.interrupting.join(0.3)  # it waits for the lock where `process` holds it
        return value

    @_moved.setter
    def _moved(self, value):
        self._value = value


def test_what_is_prepared_is_reported_however_a_new_sequencers_word_meets_the_look_for_it():
    course = Interrupted(Shard(0, 1, "mean"), replicated=True)
    course.begin_term(3)
    course.interrupting = threading.Thread(target=course.agree, args=(m.StartTerm(3, 0),))
    reported = course.process()
    course.interrupting.join(10)
    assert reported or course.process()
    assert course.progress() == Progress(3, 0)
