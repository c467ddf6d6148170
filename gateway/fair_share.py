"""Who is served next when several clients wait: the Virtual Token Counter (Sheng et al. 2024, arXiv:2401.00588).

Every client has a counter of the tokens it was served, weighted as the paper does; the smallest is next. A client that
comes back is lifted to the smallest counter among those that wait, so that nobody saves up. Two levels: API keys
share the engine, and the users that one key names share what the key gets; naming more users gains a key nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

PROMPT_WEIGHT, GENERATED_WEIGHT = 1, 2  # the paper's
_MOST_REMEMBERED = 4096  # counters of one level; whoever was served longest ago is forgotten, as if it were new


class Client(NamedTuple):
    """Whose request it is; both are empty where nothing is known."""

    key: str = ""  # stands for the API key
    user: str = ""


@dataclass(slots=True)
class Counters:
    """One level of counters."""

    served: dict[str, int] = field(default_factory=dict)  # weighted tokens; longest ago first
    _last: str | None = None  # who left the queue last

    def arrive(self, name: str, waiting: Iterable[str]) -> None:
        """``name`` begins to wait beside ``waiting``."""
        others = [self.served[each] for each in waiting if each in self.served]
        floor = min(others) if others else self.served.get(self._last or "", 0)
        self._set(name, max(self.served.get(name, 0), floor))

    def leave(self, name: str) -> None:
        """``name`` has nothing waiting any more."""
        self._last = name

    def charge(self, name: str, tokens: int) -> None:
        self._set(name, self.served.get(name, 0) + tokens)

    def _set(self, name: str, value: int) -> None:
        self.served.pop(name, None)
        self.served[name] = value
        if len(self.served) > _MOST_REMEMBERED:
            del self.served[next(iter(self.served))]


@dataclass(slots=True)
class FairShare:
    """The counters of keys, and of the users of each key."""

    _keys: Counters = field(default_factory=Counters)
    _users: dict[str, Counters] = field(default_factory=dict)

    def arrive(self, client: Client, waiting: Iterable[Client]) -> None:
        """``client``, of whom nothing waited, queues something beside the other clients that wait."""
        waiting = list(waiting)
        if not any(each.key == client.key for each in waiting):
            self._keys.arrive(client.key, {each.key for each in waiting})
            self._users = {key: users for key, users in self._users.items() if key in self._keys.served}
        users = self._users.setdefault(client.key, Counters())
        users.arrive(client.user, {each.user for each in waiting if each.key == client.key})

    def leave(self, client: Client, waiting: Iterable[Client]) -> None:
        """Nothing of ``client`` waits any more."""
        self._of(client).leave(client.user)
        if not any(each.key == client.key for each in waiting):
            self._keys.leave(client.key)

    def charge(self, client: Client, tokens: int) -> None:
        """``client`` was served so many weighted tokens."""
        self._keys.charge(client.key, tokens)
        self._of(client).charge(client.user, tokens)

    def rank(self, client: Client) -> tuple[int, int]:
        """The smallest is served next."""
        return self._keys.served.get(client.key, 0), self._of(client).served.get(client.user, 0)

    def _of(self, client: Client) -> Counters:
        return self._users.setdefault(client.key, Counters())
