"""Where the engine's thread waits: nothing that other threads post is lost, and nobody sleeps beside an event."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from consilium.errors import DeadlineExceeded, ExpertUnavailable
from gateway.mailbox import Completion, Mailbox

SECONDS = 30.0
POSTS = 3000


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_NONBLOCK)
    yield ends
    for end in ends:
        with suppress(OSError):  # closed by the test
            os.close(end)


def refuse(event: object) -> None:
    pytest.fail(f"unexpected {event}")


def completion(seconds: float = SECONDS) -> Completion[str]:
    return Completion(time.monotonic() + seconds, lambda: None)


async def outcome(*awaited: Completion[str]) -> list[str]:
    return [await each for each in awaited]


def test_events_come_in_order_and_functions_are_called() -> None:
    seen: list[object] = []
    mailbox = Mailbox(seen.append)
    for event in (1, lambda: seen.append("called"), 2):
        mailbox.post(event)
    while mailbox.receive(0):
        pass
    assert seen == [1, "called", 2]


def test_no_post_is_lost_and_none_leaves_the_sleeper_asleep() -> None:
    """The poster waits for each to be taken, so that the sleeper is about to sleep, or does, at every post."""
    taken = threading.Semaphore(0)
    seen: list[object] = []

    def handle(event: object) -> None:
        seen.append(event)
        taken.release()

    mailbox = Mailbox(handle)

    def post() -> None:
        for number in range(POSTS):
            mailbox.post(number)
            assert taken.acquire(timeout=SECONDS)

    poster = threading.Thread(target=post)
    poster.start()
    while len(seen) < POSTS:
        assert mailbox.receive(SECONDS), "it slept although something was posted"
    poster.join(SECONDS)
    assert seen == list(range(POSTS))


def test_no_post_of_several_threads_is_lost() -> None:
    seen: list[object] = []
    mailbox = Mailbox(seen.append)

    def post() -> None:
        for number in range(POSTS):
            mailbox.post(number)

    threads = [threading.Thread(target=post) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(seen) < 3 * POSTS:
        assert mailbox.receive(SECONDS)
    for thread in threads:
        thread.join(SECONDS)
    assert sorted(seen, key=str) == sorted([*range(POSTS)] * 3, key=str)


def test_a_sleeper_wakes_for_a_watched_descriptor(pipe: tuple[int, int]) -> None:
    """Each byte is written only when the one before it has been read."""
    reading, writing = pipe
    taken, seen = threading.Semaphore(0), list[bytes]()
    mailbox = Mailbox(refuse)

    def read() -> None:
        seen.append(os.read(reading, 1))
        taken.release()

    def write() -> None:
        for _ in range(500):
            os.write(writing, b"x")
            assert taken.acquire(timeout=SECONDS)

    mailbox.watch(reading, read)
    writer = threading.Thread(target=write)
    writer.start()
    while len(seen) < 500:
        assert mailbox.receive(SECONDS)
    writer.join(SECONDS)


def test_a_descriptor_is_watched_from_the_moment_on_that_the_sleeper_sleeps(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    seen: list[bytes] = []
    mailbox = Mailbox(refuse)
    os.write(writing, b"x")
    watcher = threading.Timer(0.01, lambda: mailbox.watch(reading, lambda: seen.append(os.read(reading, 1))))
    watcher.start()
    assert mailbox.receive(SECONDS)
    assert seen == [b"x"]
    watcher.join(SECONDS)


def test_what_is_no_longer_watched_is_not_read(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    mailbox = Mailbox(refuse)
    mailbox.watch(reading, lambda: pytest.fail("it is not watched any more"))
    mailbox.unwatch(reading)
    mailbox.unwatch(reading)  # twice is once
    os.write(writing, b"x")
    assert not mailbox.receive(0)
    os.close(reading)
    assert not mailbox.receive(0.01)


def test_a_reader_may_stop_its_own_watch_and_close(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    mailbox = Mailbox(refuse)

    def end() -> None:
        assert os.read(reading, 1) == b""
        mailbox.unwatch(reading)
        os.close(reading)

    mailbox.watch(reading, end)
    os.close(writing)  # the end of a stream is something to read
    assert mailbox.receive(SECONDS)
    assert not mailbox.receive(0)


def test_nothing_comes_in_time() -> None:
    mailbox = Mailbox(refuse)
    assert not mailbox.receive(0)
    assert not mailbox.receive(0.01)


def test_a_completion_brings_its_outcome_or_its_error() -> None:
    mailbox = Mailbox(refuse)
    good, bad = completion(), completion()
    mailbox.settle(good, "rows")
    mailbox.settle(good, "too late: the first stands")
    mailbox.settle(bad, ExpertUnavailable("gone"))
    assert mailbox.drive(outcome(good)) == ["rows"]
    with pytest.raises(ExpertUnavailable, match="gone"):
        mailbox.drive(outcome(bad))


def test_a_completion_is_settled_by_another_thread() -> None:
    mailbox = Mailbox(refuse)
    calls = [completion() for _ in range(200)]

    def settle() -> None:
        for number, call in reversed(list(enumerate(calls))):
            mailbox.settle(call, str(number))

    thread = threading.Thread(target=settle)
    thread.start()
    assert mailbox.drive(outcome(*calls)) == [str(number) for number in range(200)]
    thread.join(SECONDS)


def test_a_completion_expires_at_its_deadline() -> None:
    mailbox, told = Mailbox(refuse), list[str]()
    late: Completion[str] = Completion(time.monotonic() + 0.01, lambda: told.append("expired"))
    with pytest.raises(DeadlineExceeded):
        mailbox.drive(outcome(late))
    assert told == ["expired"]


def test_whoever_expires_it_may_say_why() -> None:
    mailbox = Mailbox(refuse)
    late: Completion[str] = Completion(time.monotonic(), lambda: late.settle(ExpertUnavailable("it hangs")))
    with pytest.raises(ExpertUnavailable, match="it hangs"):
        mailbox.drive(outcome(late))


def test_what_has_come_by_the_deadline_is_taken(pipe: tuple[int, int]) -> None:
    """The engine may have computed past it: what lies there then came in time."""
    reading, writing = pipe
    mailbox = Mailbox(refuse)
    late = completion(seconds=-1.0)
    mailbox.watch(reading, lambda: late.settle(os.read(reading, 10).decode()))
    os.write(writing, b"rows")
    assert mailbox.drive(outcome(late)) == ["rows"]
