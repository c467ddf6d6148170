"""Requests of known lengths: prompts are windows of token ids of random English words, all different."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from bench.client import Request

VOCABULARY = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city community name president team minute idea "
    "body information back parent face others level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education the a of to in and that it for on with as"
)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked: prompt lengths are uniform from ``shortest`` to ``longest``; every answer has one length."""

    chat: bool
    model: str
    shortest: int
    longest: int
    output_tokens: int
    seed: int


async def requests_of(client: httpx.AsyncClient, workload: Workload) -> Iterator[Request]:
    """An endless supply of requests, the same for the same seed.

    Completions get ids of the server's own /tokenize, so that their lengths are exact. Chats, and servers without
    that endpoint, get as many words; the usage that the server reports tells the real lengths.
    """
    random_ = random.Random(workload.seed)
    ids = [] if workload.chat else await _token_ids(client, workload.model, random_)
    return _endless(workload, ids, random_)


def _endless(workload: Workload, ids: list[int], random_: random.Random) -> Iterator[Request]:
    common: dict[str, Any] = {
        "model": workload.model,
        "max_tokens": workload.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    while True:
        length = random_.randint(workload.shortest, workload.longest)
        if workload.chat:
            messages = [{"role": "user", "content": _words(random_, length)}]
            yield Request("/v1/chat/completions", {**common, "messages": messages}, workload.output_tokens)
        else:
            # Sampled, not cut out: windows of one text would share prefixes that a cache could know.
            prompt = random_.choices(ids, k=length) if ids else _words(random_, length)
            yield Request("/v1/completions", {**common, "prompt": prompt}, workload.output_tokens)


def _words(random_: random.Random, count: int) -> str:
    return " ".join(random_.choices(VOCABULARY.split(), k=count))


async def _token_ids(client: httpx.AsyncClient, model: str, random_: random.Random) -> list[int]:
    """The ids of English words; none where the server has no /tokenize."""
    response = await client.post("/tokenize", json={"model": model, "prompt": _words(random_, 2000)})
    return list(response.json()["tokens"]) if response.status_code == 200 else []
