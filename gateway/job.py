"""One request's work: its choices, and the loop that turns the engine's news into what can be shown of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from gateway.choice import Choice, ChoiceOptions, Delta, Prompt
from gateway.engine_client import NewSequence
from gateway.messages import Caller, SamplingParams
from gateway.metrics import ChoiceClock
from gateway.state import Gateway


@dataclass(frozen=True, slots=True)
class Job:
    """Prompts times n choices. Choice ``i`` of a prompt is sampled alike whatever other prompts are in the request."""

    gateway: Gateway
    sampling: SamplingParams
    choices: list[Choice]
    caller: Caller

    @classmethod
    def plan(
        cls,
        gateway: Gateway,
        prompts: list[Prompt],
        n: int,
        sampling: SamplingParams,
        options: ChoiceOptions,
        arrival: float,
        caller: Caller,
        resumed: Sequence[int] = (),
    ) -> Job:
        """All choices, none of them started. ``arrival`` is on time.perf_counter's clock.

        The only choice of a request may go on after tokens that are ``resumed`` from another gateway; none is shown.
        """
        vocabulary = gateway.model.tokenizer.vocabulary
        choices = [
            Choice(index * n + number, number, prompt, vocabulary, options, ChoiceClock(gateway.metrics, arrival))
            for index, prompt in enumerate(prompts)
            for number in range(n)
        ]
        if resumed:
            (choice,) = choices
            choice.resume(resumed)
            sampling = replace(sampling, prompt_logprobs=None)  # they were shown before the first token
        return cls(gateway, sampling, choices, caller)

    async def run(self) -> AsyncGenerator[list[tuple[Choice, Delta]], None]:
        """Start all choices and show what is new of them until all have ended.

        Close the iterator to end early (``aclosing``): the engine then drops what is still running. Raises NotReady,
        Overloaded and whatever error a sequence ends with.
        """
        try:
            async with aclosing(self._deltas()) as batches:
                async for deltas in batches:
                    yield deltas
        except Exception as error:
            self.gateway.metrics.request_failed(error)
            raise

    async def _deltas(self) -> AsyncGenerator[list[tuple[Choice, Delta]], None]:
        sequences = [
            NewSequence(choice.prompt.ids, self.sampling, choice.number, choice.resumed) for choice in self.choices
        ]
        with self.gateway.engine.open(sequences, self.caller) as generation:
            self.gateway.metrics.prompt_tokens.inc(self.prompt_tokens())
            async for batch in generation.batches():
                deltas = []
                for position, output in batch:
                    choice = self.choices[position]
                    delta = choice.feed(output)
                    if delta is not None:
                        deltas.append((choice, delta))
                    if choice.finish_reason is not None and output.finish_reason is None:
                        generation.abort(position)  # a stop string, of which the engine knows nothing
                if deltas:
                    yield deltas

    async def finish(self) -> list[Delta]:
        """Run to the end; everything there is to show of each choice."""
        shown: list[list[Delta]] = [[] for _ in self.choices]
        async with aclosing(self.run()) as batches:
            async for deltas in batches:
                for choice, delta in deltas:
                    shown[choice.index].append(delta)
        return [Delta.join(each) for each in shown]

    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(choice.prompt.ids) for choice in self.choices if choice.number == 0)

    def cached_tokens(self) -> int:
        """Tokens of all prompts that were not computed anew, for the first choice of each."""
        return sum(choice.cached_tokens for choice in self.choices if choice.number == 0)

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        prompt = self.prompt_tokens()
        completion = sum(choice.completion_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens()},
        }

    def summary(self) -> str:
        """For the log: counts, ends and the seed that repeats it; never text."""
        usage = self.usage()
        ends = ",".join(choice.finish_reason or "unfinished" for choice in self.choices)
        return (
            f"prompt_tokens={usage['prompt_tokens']} cached_tokens={self.cached_tokens()} "
            f"completion_tokens={usage['completion_tokens']} seed={self.sampling.seed} finish={ends}"
        )
