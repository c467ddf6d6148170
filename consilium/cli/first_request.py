"""The first request to a new gateway: waiting until it is ready, asking it something, and how a user does the same.

Plain HTTP to an address on this machine: the proxies that other clients take from the environment are not asked.
"""

from __future__ import annotations

import http.client
import json
import shlex
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

QUESTION = "Name the three primary colors."
OPENING = "Once upon a time"
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to ``prompt``."""

    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway on this machine, as a client reaches it."""

    url: str
    api_key: str | None

    def call(self, method: str, path: str, body: dict[str, Any] | None = None, timeout: float = 300) -> tuple[int, Any]:
        """HTTP status and JSON answer. Raises OSError and http.client.HTTPException when there is no answer."""
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=timeout)
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        try:
            return response.status, json.loads(content)
        except ValueError:
            return response.status, {}

    def wait_until_ready(self, stop: threading.Event, tell: Callable[[str], None]) -> bool:
        """Whether it became ready before ``stop`` was set; ``tell`` hears why it is not."""
        while not stop.wait(_POLL_SECONDS):
            try:
                status, answer = self.call("GET", "/ready", timeout=10)
            except (OSError, http.client.HTTPException) as error:
                tell(str(error))
                continue
            if status == http.client.OK:
                return True
            tell(error_message(answer))
        return False

    def model_name(self) -> str:
        """The name that requests use for the model."""
        _, answer = self.call("GET", "/v1/models")
        return str(answer["data"][0]["id"])

    def ask(self, model: str) -> Answer | str:
        """A short answer; a continuation where the model has no chat template; or why there is none."""
        common = {"model": model, "temperature": 0, "max_tokens": 48}
        messages = [{"role": "user", "content": QUESTION}]
        try:
            status, answer = self.call("POST", "/v1/chat/completions", {**common, "messages": messages})
            if status == http.client.OK:
                return Answer(QUESTION, answer["choices"][0]["message"]["content"])
            if status == http.client.BAD_REQUEST:
                status, answer = self.call("POST", "/v1/completions", {**common, "prompt": OPENING})
            if status == http.client.OK:
                return Answer(OPENING, answer["choices"][0]["text"])
        except (OSError, http.client.HTTPException) as error:
            return str(error)
        return f"HTTP {status}: {error_message(answer)}"


def error_message(answer: Any) -> str:
    """The message of an error object in OpenAI's form."""
    error = answer.get("error") if isinstance(answer, dict) else None
    return str(error.get("message")) if isinstance(error, dict) else "no reason given"


def how_to_ask(url: str, model: str, needs_key: bool) -> str:
    """The same request with curl and with the Python SDK."""
    key_header = ' -H "Authorization: Bearer $API_KEY"' if needs_key else ""
    key = 'os.environ["API_KEY"]' if needs_key else '"none"'
    messages = json.dumps([{"role": "user", "content": QUESTION}])
    body = shlex.quote(f'{{"model": {json.dumps(model)}, "temperature": 0, "messages": {messages}}}')
    return f"""\
curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key_header} \\
  -d {body}

{"import os" + chr(10) if needs_key else ""}from openai import OpenAI  # pip install openai
client = OpenAI(base_url="{url}/v1", api_key={key})
messages = {messages}
answer = client.chat.completions.create(model={json.dumps(model)}, temperature=0, messages=messages)
print(answer.choices[0].message.content)"""
