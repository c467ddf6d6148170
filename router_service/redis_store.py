"""State that several routers share, in a Redis of their own (noeviction: nothing may vanish but what expires).

Leases are keys that expire. One router leads: it holds a lock with a number that only rises, and the state is replaced
by a script that looks at lock and epoch in the same instant, so that a leader that was away writes nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable
from typing import Any, TypeVar

from google.protobuf.message import DecodeError
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from consilium.errors import ConfigError, NotReady
from protos.router.v1 import router_pb2

T = TypeVar("T")

TIMEOUT = 2.0  # seconds for one command
# KEYS lock, fence. ARGV identity, milliseconds. The lock's value is the identity and the fence it was taken with.
_LEAD = """
local held = redis.call('GET', KEYS[1])
if not held then
  held = ARGV[1] .. ':' .. redis.call('INCR', KEYS[2])
  redis.call('SET', KEYS[1], held, 'PX', ARGV[2])
elseif string.sub(held, 1, #ARGV[1] + 1) == ARGV[1] .. ':' then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
else
  return ''
end
return held
"""
# KEYS lock, state. ARGV the lock's value, expected epoch, new epoch, state.
_WRITE = """
local epoch = redis.call('HGET', KEYS[2], 'epoch') or '0'
if redis.call('GET', KEYS[1]) ~= ARGV[1] or epoch ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[2], 'epoch', ARGV[3], 'state', ARGV[4])
return 1
"""


class RedisStore:
    """Everything is under ``consilium:router:NAME:``, where NAME keeps deployments apart."""

    def __init__(self, url: str, name: str) -> None:
        """Raises ConfigError where the URL cannot be used. Nothing is asked yet."""
        try:
            retry = Retry(NoBackoff(), 0)
            self._redis: Any = Redis.from_url(
                url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT, retry=retry, driver_info=None
            )
        except (TypeError, ValueError, RedisError) as error:
            raise ConfigError(f"router.redis: the URL cannot be used: {type(error).__name__}") from None
        self._prefix = f"consilium:router:{name}:"
        self._identity, self._lock = uuid.uuid4().hex, b""
        self._lead = self._redis.register_script(_LEAD)
        self._write = self._redis.register_script(_WRITE)

    async def put_worker(self, record: router_pb2.WorkerRecord, lease: float) -> None:
        key = self._worker(record.worker.description.worker_id)
        await _ask(self._redis.set(key, record.SerializeToString(), px=_milliseconds(lease)))

    async def renew(self, worker_id: str, lease: float) -> bool:
        return bool(await _ask(self._redis.pexpire(self._worker(worker_id), _milliseconds(lease))))

    async def remove_worker(self, worker_id: str) -> None:
        await _ask(self._redis.delete(self._worker(worker_id)))

    async def workers(self) -> dict[str, router_pb2.WorkerRecord]:
        found = {}
        for key, value in (await self._all("worker:")).items():
            try:
                found[key] = router_pb2.WorkerRecord.FromString(value)
            except DecodeError:  # not ours, or of another version: as if it were not there, until it registers again
                continue
        return found

    async def lease_left(self, worker_id: str) -> float:
        return max(0.0, float(await _ask(self._redis.pttl(self._worker(worker_id)))) / 1e3)

    async def put_load(self, router_id: str, load: bytes, seconds: float) -> None:
        await _ask(self._redis.set(f"{self._prefix}load:{router_id}", load, px=_milliseconds(seconds)))

    async def loads(self) -> list[bytes]:
        return list((await self._all("load:")).values())

    async def put_gateway(self, gateway_id: str, epoch: int, seconds: float) -> None:
        await _ask(self._redis.set(f"{self._prefix}gateway:{gateway_id}", epoch, px=_milliseconds(seconds)))

    async def gateways(self) -> dict[str, int]:
        found = await self._all("gateway:")
        return {name: int(epoch) for name, epoch in found.items() if epoch.isdigit()}

    async def lead(self, seconds: float) -> bool:
        keys = [f"{self._prefix}leader", f"{self._prefix}fence"]
        self._lock = await _ask(self._lead(keys=keys, args=[self._identity, _milliseconds(seconds)]))
        return bool(self._lock)

    async def state(self) -> router_pb2.RouterState | None:
        value = await _ask(self._redis.hget(f"{self._prefix}state", "state"))
        try:
            return None if value is None else router_pb2.RouterState.FromString(value)
        except DecodeError:
            raise NotReady(f"what Redis holds under {self._prefix}state is no state of a router; remove it") from None

    async def write_state(self, state: router_pb2.RouterState, expected: int) -> bool:
        keys = [f"{self._prefix}leader", f"{self._prefix}state"]
        args: list[Any] = [self._lock, expected, state.placement.epoch, state.SerializeToString()]
        return bool(await _ask(self._write(keys=keys, args=args)))

    async def generation(self) -> str:
        """A mark of our own, which is gone with everything else."""
        key = f"{self._prefix}generation"
        await _ask(self._redis.set(key, uuid.uuid4().hex, nx=True))
        return str(await _ask(self._redis.get(key)))

    async def close(self) -> None:
        await self._redis.aclose()

    def _worker(self, worker_id: str) -> str:
        return f"{self._prefix}worker:{worker_id}"

    async def _all(self, kind: str) -> dict[str, bytes]:
        """The values of all keys of one kind, by the rest of the key."""
        prefix = self._prefix + kind
        keys = sorted(await _ask(self._scan(prefix)))
        values = await _ask(self._redis.mget(keys)) if keys else []
        pairs = zip(keys, values, strict=True)
        return {key.decode()[len(prefix) :]: value for key, value in pairs if value is not None}

    async def _scan(self, prefix: str) -> list[bytes]:
        return [key async for key in self._redis.scan_iter(f"{prefix}*", count=1000)]


async def _ask(answer: Awaitable[T]) -> T:
    try:
        return await answer
    except (RedisError, OSError, TimeoutError) as error:
        raise NotReady(f"Redis cannot be asked: {type(error).__name__}") from error


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))
