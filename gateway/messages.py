"""What the HTTP process and the engine process say to each other over a unix socket.

Every message is a 4-byte little-endian length and one JSON object with a ``type``. Free of torch: the HTTP process
must start fast and stay small. One sequence is one choice of one request; the HTTP process gives out the ids.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

LENGTH_BYTES = 4

_CONFIG = ConfigDict(extra="forbid")

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, config=_CONFIG)
class SamplingParams:
    """How the next token is chosen; bounds are checked at the HTTP door."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives beside the chosen token; None is no logprobs at all
    prompt_logprobs: int | None = None  # the same for the prompt's tokens


@dataclass(frozen=True, slots=True, config=_CONFIG)
class Caller:
    """Whose a request is, for fair admission, and how urgent; what is not known is empty."""

    api_key: str = ""  # stands for the key, and is not the key itself
    user: str = ""
    priority: int = 0  # lower is earlier


@dataclass(frozen=True, slots=True, config=_CONFIG)
class Generate:
    """HTTP to engine: run a new sequence."""

    id: int
    prompt: list[int]
    sampling: SamplingParams
    choice: int = 0  # index among the n choices of its request; part of the random numbers' counter
    caller: Caller = Caller()
    resumed: list[int] = field(default_factory=list)  # tokens that were generated elsewhere: it goes on after them
    type: Literal["generate"] = "generate"


@dataclass(frozen=True, slots=True, config=_CONFIG)
class Abort:
    """HTTP to engine: nobody waits for this sequence any more. Unknown and finished ids are ignored."""

    id: int
    type: Literal["abort"] = "abort"


@dataclass(frozen=True, slots=True, config=_CONFIG)
class TokenLogprobs:
    """Log-probability (natural, of the model's unmodified distribution) of one token and of the likeliest ones."""

    token: int
    logprob: float
    top_tokens: list[int]  # descending by probability, ties by id
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True, config=_CONFIG)
class Failure:
    """Why a sequence ended with an error: the name of a class in consilium.errors, and its text."""

    error: str
    message: str


@dataclass(frozen=True, slots=True, config=_CONFIG)
class Output:
    """News of one sequence from one step. Once ``finish_reason`` is set nothing more comes for this id."""

    id: int
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    # For the prompt's tokens 1, 2, … in order; may come in several parts, all before the first token.
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    # "eos" or the stop token's id as text, when finish_reason is "stop".
    stop_reason: str | None = None
    failure: Failure | None = None
    # Seconds from Generate to the sequence's first step; on the first news of a sequence only.
    queue_seconds: float | None = None
    # Prompt tokens that were not computed because others had them in their cache; on the first news, too.
    cached_tokens: int | None = None
    # By policy (gateway.last_replica): rows of all layers that needed an expert that nobody held, until now.
    last_replica: dict[str, int] | None = None


# Bounds of the buckets in which expert calls are counted by their rows; the last bucket has none.
EXPERT_CALL_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(slots=True, config=_CONFIG)
class WorkerStats:
    """What one worker did for this gateway since the last message."""

    group: str
    address: str
    frames: int = 0
    rows: int = 0  # (token, expert) pairs
    failures: int = 0
    failovers: int = 0  # frames it got because another worker had failed
    hedges: int = 0  # because another one was late
    late: int = 0  # frames of its own that others answered before it did
    audits: int = 0  # frames it computed only to compare
    lies: int = 0  # frames that it answered with wrong numbers
    ejections: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    wire_seconds: float = 0.0  # round trip less queue and compute
    # Computed (frame, expert) pairs by their rows: how many in each bucket of EXPERT_CALL_ROWS; empty is none.
    expert_calls: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, config=_CONFIG)
class EngineStats:
    """The engine's state after a step, and what the step did."""

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_total: int
    step_seconds: float = 0.0
    prompt_tokens: int = 0  # computed in this step
    generated_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens looked for in the prefix cache, and found there
    prefix_hits: int = 0
    prefix_evicted: int = 0  # tokens that made room
    prefix_tokens: int = 0  # kept now, beside what running sequences use
    workers: list[WorkerStats] = field(default_factory=list)
    # Seconds of the engine's thread in each stage of gateway.stage_clock since the last message.
    stages: dict[str, float] = field(default_factory=dict)
    last_replica: dict[str, int] = field(default_factory=dict)  # rows of all layers, by policy
    gate_policy: dict[str, int] = field(default_factory=dict)  # what it changed: see gateway.gate_policy
    micro_batches: int = 1  # that the step was computed as, and what was weighed, in seconds of a layer
    hop_seconds: float = 0.0
    rereading_seconds: float = 0.0


@dataclass(frozen=True, slots=True, config=_CONFIG)
class Step:
    """Engine to HTTP: one step is done (or sequences ended between steps)."""

    outputs: list[Output]
    stats: EngineStats
    type: Literal["step"] = "step"


@dataclass(frozen=True, slots=True, config=_CONFIG)
class WorkerStatus:
    """One address of an expert group as the engine sees it."""

    group: str
    address: str
    connected: bool
    detail: str = ""  # why it is not connected or not used
    experts: int = 0  # (layer, expert) pairs it holds
    transport: Literal["", "grpc", "local"] = ""  # what frames go over, while it is connected
    ejected: bool = False  # connected, but left alone


@dataclass(frozen=True, slots=True, config=_CONFIG)
class Status:
    """Engine to HTTP: sent at start and whenever anything in it changes."""

    ready: bool
    detail: str  # one sentence for /ready, for example which experts nobody holds
    workers: list[WorkerStatus]
    kv_tokens_total: int
    missing_experts: int = 0  # (layer, expert) pairs nobody holds
    type: Literal["status"] = "status"


@dataclass(frozen=True, slots=True, config=_CONFIG)
class ExpertLoad:
    """Engine to HTTP: rows that went to each expert since the last such message. At most one in a second."""

    rows: dict[int, list[int]]  # of all the experts of a layer, by layer; layers without any are left out
    type: Literal["expert_load"] = "expert_load"


BreakerState = Literal["closed", "half_open", "open"]


@dataclass(slots=True, config=_CONFIG)
class TierStats:
    """What one level of the expert-output cache was asked for: a token's row with the outputs of all its experts."""

    hits: int = 0
    misses: int = 0  # also what was not asked because the breaker was open
    lookups: int = 0  # one for a layer and step
    seconds: float = 0.0  # that the engine waited for them


@dataclass(slots=True, config=_CONFIG)
class CacheStats:
    """Engine to HTTP: what the expert-output cache did since the last such message, and its state. Once in a second."""

    entries: int = 0  # in memory
    bytes: int = 0
    capacity: int = 0
    evictions: int = 0
    tiers: dict[str, TierStats] = field(default_factory=dict)  # memory, redis
    written: int = 0  # rows, to Redis
    dropped: int = 0  # rows that were to be written, but the breaker was open or too much was waiting
    errors: dict[str, dict[str, int]] = field(default_factory=dict)  # by operation (read, write) and kind
    breakers: dict[str, BreakerState] = field(default_factory=dict)  # by operation; none without Redis
    type: Literal["cache"] = "cache"


ToEngine = Generate | Abort
Report = ExpertLoad | CacheStats  # what only the metrics are interested in
ToHttp = Step | Status | Report
Message = Annotated[ToEngine | ToHttp, Field(discriminator="type")]

# A log-probability may be -Infinity, which JSON would otherwise turn into null.
_MESSAGE: TypeAdapter[ToEngine | ToHttp] = TypeAdapter(Message, config=ConfigDict(ser_json_inf_nan="constants"))


def pack(message: ToEngine | ToHttp) -> bytes:
    """The bytes of one message, length first."""
    body = _MESSAGE.dump_json(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def unpack(body: bytes) -> ToEngine | ToHttp:
    """The message in ``body``, which is without its length. Raises pydantic.ValidationError."""
    return _MESSAGE.validate_json(body)
