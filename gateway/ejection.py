"""Which workers are left alone for a while because they keep failing: Envoy's outlier detection. Pure; no I/O.

A worker that fails several times in a row gets no frames as long as others can answer. After a time that grows with
every ejection it is on probation: it gets copies of frames that nobody waits for, and is back after some good answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

FAILURES = 5  # in a row
PROBES = 3  # good answers in a row
MOST_TIMES = 10  # the ejection time is at most so many times that of the first
MOST_SHARE = 0.5  # of a group's workers; one may always be ejected


@dataclass(slots=True)
class _Record:
    failures: int = 0  # in a row
    ejections: int = 0  # that still count
    back: float = 0.0  # when it came back, or will be on probation
    out: bool = False
    probing: bool = False  # a probe is on its way
    good: int = 0  # probes in a row


class Ejections:
    """By address. Times are seconds."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``seconds`` is the time of a first ejection."""
        self._seconds, self._clock = seconds, clock
        self._records: dict[str, _Record] = {}

    @property
    def out(self) -> list[str]:
        """Who is ejected or on probation."""
        return [address for address, record in self._records.items() if record.out]

    def failed(self, address: str, group: int, out: int) -> bool:
        """Count a failure; whether it is ejected now. Of its ``group`` of workers ``out`` are ejected already."""
        record = self._records.setdefault(address, _Record())
        record.failures += 1
        if record.out or record.failures < FAILURES or out >= max(1, int(MOST_SHARE * group)):
            return False
        healthy = int((self._clock() - record.back) / self._seconds) if record.ejections else 0
        record.ejections = max(0, record.ejections - healthy)
        self._eject(record)
        return True

    def answered(self, address: str) -> None:
        """A frame was answered well."""
        record = self._records.get(address)
        if record is not None:
            record.failures = 0

    def wants_probe(self, address: str) -> bool:
        """Whether it is on probation, and no probe is on its way."""
        record = self._records.get(address)
        return record is not None and record.out and not record.probing and self._clock() >= record.back

    def probing(self, address: str) -> None:
        """A probe is on its way; :meth:`probed` is told how it ended."""
        self._records[address].probing = True

    def probed(self, address: str, *, good: bool) -> bool:
        """How a probe ended; whether the worker is back."""
        record = self._records.get(address)
        if record is None or not record.out:
            return False
        record.probing = False
        if not good:
            self._eject(record)
            return False
        record.good += 1
        if record.good >= PROBES:
            record.out, record.failures, record.back = False, 0, self._clock()
        return not record.out

    def forget(self, address: str) -> None:
        """It is another process now."""
        self._records.pop(address, None)

    def _eject(self, record: _Record) -> None:
        record.ejections = min(MOST_TIMES, record.ejections + 1)
        record.out, record.good = True, 0
        record.back = self._clock() + self._seconds * record.ejections
