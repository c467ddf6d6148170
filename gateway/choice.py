"""One choice of a request as its tokens arrive: its text, its counts, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from consilium.errors import InvalidRequest
from gateway.detokenizer import Detokenizer, StopStrings, decode_prompt
from gateway.logprobs import Entry
from gateway.messages import Output, TokenLogprobs
from gateway.metrics import ChoiceClock
from gateway.vocabulary import Vocabulary

_EOS = "eos"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the text that they came from where the client sent text."""

    ids: list[int]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class ChoiceOptions:
    """What the choices of one request share."""

    stop: Sequence[str] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0  # stop strings do not count before
    echo: bool = False
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """What can be shown of a choice since the last time."""

    text: str
    entries: list[Entry]
    finish_reason: str | None
    stop_reason: str | int | None
    tokens: list[int]

    @classmethod
    def join(cls, deltas: Sequence[Delta]) -> Delta:
        """All that was shown of a choice that has ended."""
        entries = [entry for each in deltas for entry in each.entries]
        tokens = [token for each in deltas for token in each.tokens]
        text = "".join(each.text for each in deltas)
        return cls(text, entries, deltas[-1].finish_reason, deltas[-1].stop_reason, tokens)


class Choice:
    """Turns the engine's news of one sequence into what the client sees; with ``echo`` its prompt comes first."""

    def __init__(
        self,
        index: int,
        number: int,
        prompt: Prompt,
        vocabulary: Vocabulary,
        options: ChoiceOptions,
        clock: ChoiceClock,
    ) -> None:
        self.index = index  # in the response
        self.number = number  # among the choices of the same prompt
        self.prompt = prompt
        self.completion_tokens = 0
        self.cached_tokens = 0  # of the prompt
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.last_replica: dict[str, int] = {}  # rows that needed an expert that nobody held, by what was done
        self._options = options
        self._clock = clock
        self._detokenizer = Detokenizer(vocabulary, options.skip_special_tokens, prompt.ids)
        self._stops = StopStrings(options.stop, options.include_stop)
        self._text = ""  # not yet shown
        self._entries: list[Entry] = []  # not yet shown
        self._tokens: list[int] = []  # not yet shown
        self.resumed: list[int] = []  # tokens that the client has already
        self._characters = 0  # of all text so far, shown or not
        self._prompt_offsets: list[int] = []
        if options.echo:
            self._echo(vocabulary)

    def resume(self, tokens: Sequence[int]) -> None:
        """Go on after ``tokens``, which the client has already, with all that they showed.

        Raises InvalidRequest where the text ends within them.
        """
        self.resumed = list(tokens)
        for token in tokens:
            self.completion_tokens += 1
            self._add(self._detokenizer.push(token))
        if self.finish_reason is not None:
            raise InvalidRequest(
                "consilium_resume_tokens: the answer ends within them, at a stop string; there is nothing to resume",
                param="consilium_resume_tokens",
            )
        self._text, self._entries = "", []

    def feed(self, output: Output) -> Delta | None:
        """Take the engine's news; what there is to show now, if anything. News after the end are ignored."""
        if self.finish_reason is not None:
            return None
        if output.queue_seconds is not None:
            self._clock.queued(output.queue_seconds)
        if output.cached_tokens is not None:
            self.cached_tokens = output.cached_tokens
        self.last_replica = output.last_replica or self.last_replica
        if output.prompt_logprobs:
            self._take_prompt_logprobs(output.prompt_logprobs)
        if output.token is not None:
            self._take_token(output.token, output)
        if output.finish_reason is not None and self.finish_reason is None:
            self._end(output.finish_reason, output.stop_reason)
        return self._show() if output.token is not None or self.finish_reason is not None else None

    def extensions(self) -> dict[str, Any]:
        """Members of the choice that OpenAI's API does not have; none as long as all is well."""
        ended = self.finish_reason is not None and self.last_replica
        return {"consilium_last_replica": self.last_replica} if ended else {}

    def _echo(self, vocabulary: Vocabulary) -> None:
        text, self._prompt_offsets = decode_prompt(vocabulary, self.prompt.ids, self._options.skip_special_tokens)
        self._text = text if self.prompt.text is None else self.prompt.text
        self._characters = len(self._text)
        if self._options.logprobs:
            self._entries.append(Entry(self.prompt.ids[0], None, 0))

    def _take_prompt_logprobs(self, tokens: list[TokenLogprobs]) -> None:
        if self._options.echo and self._options.logprobs:
            offsets = self._prompt_offsets[len(self.prompt_logprobs) + 1 :]
            self._entries += [Entry(token.token, token, offset) for token, offset in zip(tokens, offsets, strict=False)]
        self.prompt_logprobs += tokens

    def _take_token(self, token: int, output: Output) -> None:
        self.completion_tokens += 1
        self._clock.token()
        self._tokens.append(token)
        if output.logprobs is not None and self._options.logprobs:
            self._entries.append(Entry(token, output.logprobs, self._characters))
        # A token that stops the sequence is no part of its text, unless the client asks for that.
        if output.finish_reason != "stop" or self._options.include_stop:
            self._add(self._detokenizer.push(token))

    def _add(self, text: str) -> None:
        self._characters += len(text)
        if self.completion_tokens <= self._options.min_tokens:
            self._text += text
            return
        self._text += self._stops.push(text)
        if self._stops.matched is not None:
            self._finish("stop", self._stops.matched)

    def _end(self, reason: str, stop_reason: str | None) -> None:
        """The engine is done: what was held back comes out, and may still complete a stop string."""
        self._add(self._detokenizer.finish())
        if self.finish_reason is None:
            self._text += self._stops.finish()
            token = int(stop_reason) if stop_reason is not None and stop_reason != _EOS else None
            self._finish(reason, token)

    def _finish(self, reason: str, stop_reason: str | int | None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason
        self._clock.finished(reason)

    def _show(self) -> Delta | None:
        if not self._text and self.finish_reason is None:
            return None
        delta = Delta(self._text, self._entries, self.finish_reason, self.stop_reason, self._tokens)
        self._text, self._entries, self._tokens = "", [], []
        return delta
