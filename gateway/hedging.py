"""When a second worker is asked for what the first one has not answered, and how often that may be. Pure; no I/O."""

from __future__ import annotations

LEARNT = 20  # frames of a size before its p95 means anything
SHARE = 0.95  # of frames that are answered within the limit
STEP = 0.1  # of the newest frame: the limit rises by 9.5 % where it was passed, and falls by 0.5 % where it was not
LEAST = 0.002  # seconds: whoever waits wakes up by the millisecond
BURST = 5.0  # hedges that may be saved up


class RowTimes:
    """How long one worker takes to answer, by the size of the frame: a p95 that follows what is new.

    A frugal quantile (Ma, Muthukrishnan and Sandler 2013): at rest it is passed by one frame in twenty.
    """

    def __init__(self) -> None:
        self._limits: dict[int, float] = {}  # seconds, by the bits of the number of rows
        self._counts: dict[int, int] = {}

    def add(self, rows: int, seconds: float) -> None:
        """A frame of so many rows was answered after so many seconds."""
        size = rows.bit_length()
        limit, count = self._limits.get(size, 0.0), self._counts.get(size, 0)
        if count < LEARNT:
            self._counts[size], self._limits[size] = count + 1, max(limit, seconds)
        elif seconds > limit:
            self._limits[size] = limit * (1 + STEP * SHARE)
        else:
            self._limits[size] = limit * (1 - STEP * (1 - SHARE))

    def not_within(self, rows: int, seconds: float) -> None:
        """A frame of so many rows was given up unanswered after so many seconds; that says something if it was late."""
        limit = self.limit(rows)
        if limit is not None and seconds > limit:
            self.add(rows, seconds)

    def limit(self, rows: int) -> float | None:
        """Seconds after which a frame of so many rows is late; None while that is not known."""
        size = rows.bit_length()
        return max(LEAST, self._limits[size]) if self._counts.get(size, 0) >= LEARNT else None


class AnswerTimes:
    """The same for all workers, by address."""

    def __init__(self) -> None:
        self._times: dict[str, RowTimes] = {}

    def of(self, address: str) -> RowTimes:
        """How long this one takes."""
        times = self._times.get(address)
        if times is None:
            times = self._times[address] = RowTimes()
        return times

    def forget(self, address: str) -> None:
        """It is another process now."""
        self._times.pop(address, None)


class HedgeBudget:
    """Hedges are at most a share of all frames."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._left = BURST if share else 0.0

    def earn(self) -> None:
        """A frame was sent."""
        self._left = min(BURST, self._left + self._share)

    def spend(self) -> bool:
        """Whether one more may be sent."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class RetryBudget:
    """Envoy's: at most a share of the frames in flight are retries, but some may always be."""

    SHARE, LEAST = 0.2, 3

    def __init__(self) -> None:
        self.active = 0  # frames in flight
        self.retries = 0  # of them

    def admits(self) -> bool:
        """Whether one more may be sent."""
        return self.retries < max(self.LEAST, self.SHARE * self.active)
