"""Virtual token counters: who is next, and what nobody gains by."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.fair_share import Client, FairShare

CLIENTS = [Client("a", "x"), Client("a", "y"), Client("b", "x"), Client()]


def serve(shares: FairShare, waiting: list[Client], rounds: int, tokens: dict[Client, int]) -> dict[Client, int]:
    """Everybody waits all the time; tokens served to each."""
    served = dict.fromkeys(waiting, 0)
    for number, client in enumerate(waiting):
        shares.arrive(client, waiting[:number])
    for _ in range(rounds):
        client = min(waiting, key=shares.rank)
        shares.charge(client, tokens[client])
        served[client] += tokens[client]
    return served


@given(st.lists(st.integers(1, 500), min_size=3, max_size=3))
def test_keys_get_the_same_whatever_their_requests_take(sizes: list[int]) -> None:
    clients = [Client(key) for key in "abc"]
    served = serve(FairShare(), clients, 2000, dict(zip(clients, sizes, strict=True)))
    assert max(served.values()) - min(served.values()) <= 2 * max(sizes)


def test_naming_more_users_gains_a_key_nothing() -> None:
    clients = [Client("many", str(number)) for number in range(9)] + [Client("one")]
    served = serve(FairShare(), clients, 1000, dict.fromkeys(clients, 10))
    assert served[Client("one")] == 5000
    shares = [served[each] for each in clients[:9]]
    assert max(shares) - min(shares) <= 10


def test_who_was_away_saves_nothing_up() -> None:
    shares, busy, idle = FairShare(), Client("busy"), Client("idle")
    shares.arrive(idle, [])
    shares.leave(idle, [])
    shares.arrive(busy, [])
    shares.charge(busy, 1_000_000)
    shares.arrive(idle, [busy])
    assert shares.rank(idle) == (1_000_000, 0)


def test_who_comes_to_an_empty_queue_starts_where_the_last_one_left() -> None:
    shares, busy, new = FairShare(), Client("busy"), Client("new")
    shares.arrive(busy, [])
    shares.charge(busy, 1000)
    shares.leave(busy, [])
    shares.arrive(new, [])
    assert shares.rank(new)[0] == 1000


@given(st.lists(st.tuples(st.sampled_from(["arrive", "charge", "leave"]), st.sampled_from(CLIENTS))))
def test_no_counter_ever_falls(story: list[tuple[str, Client]]) -> None:
    shares, waiting = FairShare(), set[Client]()
    for event, client in story:
        before = {each: shares.rank(each) for each in CLIENTS}
        if event == "charge":
            shares.charge(client, 3)
        elif event == "arrive" and client not in waiting:
            shares.arrive(client, waiting)
            waiting.add(client)
        elif event == "leave" and client in waiting:
            waiting.remove(client)
            shares.leave(client, waiting)
        for each, rank in before.items():
            assert all(now >= then for now, then in zip(shares.rank(each), rank, strict=True))


def test_what_is_remembered_is_bounded() -> None:
    shares = FairShare()
    for number in range(10_000):
        client = Client(str(number), str(number))
        shares.arrive(client, [])
        shares.charge(client, 1)
        shares.leave(client, [])
    assert len(shares._keys.served) <= 4096
    assert len(shares._users) <= 4097
