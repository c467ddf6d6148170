"""Whatever workers do, in whatever order: each row is right to the bit or has failed, and nothing is left behind.

Workers answer, fail, are late, lie, hang, leave and come back; several frames have their outcome at once; placements
change while a layer waits. Time is the story's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, cast
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilium.config import GatewayConfig, LastReplica
from consilium.errors import (
    Cancelled,
    CheckpointError,
    ConsiliumError,
    ExpertUnavailable,
    InvalidRequest,
    Overloaded,
    WireError,
)
from consilium.frames import Frame
from consilium.gate import Routing
from gateway import frames_in_flight
from gateway.batches import ExpertBatches, ExpertOutputs, group_by_expert
from gateway.dispatcher import Dispatcher
from gateway.ejection import Ejections
from gateway.expert_meter import ExpertMeter
from gateway.local_experts import LocalExperts
from gateway.mailbox import Awaited, Completion
from gateway.placement import build_placement
from gateway.worker import Reply, Worker
from tests.unit.model_configs import tiny_config

TOKENS, EXPERTS, TOP_K, HIDDEN = 5, 4, 2, 8
CONFIG = tiny_config(num_layers=1, num_experts=EXPERTS)
LAYERS = 8  # of each story, one or two at a time
TROUBLE = 60  # events until everybody does what they should
MOST_EVENTS = 2000
LIAR = 0  # no other worker answers with wrong numbers
ERRORS = (ExpertUnavailable("gone"), Overloaded("full"), InvalidRequest("no"), WireError("garbage"))

Dispatched = tuple[ExpertOutputs, dict[int, Exception]]


def computed(frame: Frame) -> Tensor:
    """What everybody computes, and no two experts alike: [P, D]."""
    experts = torch.tensor(frame.experts).repeat_interleave(torch.tensor(frame.offsets).diff())
    return frame.rows[frame.indices.long()] * (experts + 2.5)[:, None]


class Here:
    """The checkpoint's word."""

    numerics_class = "float32"
    rows = staticmethod(computed)


@dataclass(eq=False)
class Asked:
    """One call, and what has become of it."""

    frame: Frame
    completion: Completion[Reply]
    withdrawn: bool = False  # nobody waits for it any more
    lied: bool = False
    believed: bool = False  # it was answered before that, by a worker that nobody knew to lie

    def withdraw(self) -> None:
        self.withdrawn = True


@dataclass(eq=False)
class Actor:
    """A worker of a story."""

    address: str
    story: Story
    linked: bool  # when one of its calls runs out of time, all are lost
    group: str = "experts"
    identity: str = "1"
    numerics_class: str = "float32"
    local_link: bool = False
    open: list[Asked] = field(default_factory=list)

    def time_limit(self, pairs: int) -> float:  # noqa: ARG002 (the protocol's)
        return 3.0

    def send(self, frame: Frame, deadline: float) -> Completion[Reply]:
        story = self.story
        assert (self.address, self.identity) not in story.condemned
        asked = Asked(frame, Completion(deadline, lambda: self.expire(asked), lambda: asked.withdraw()))
        self.open.append(asked)
        story.asked.append(asked)
        if story.trouble and story.chance.random() < 0.05:  # the way there is gone
            self.lose()
        return asked.completion

    def lose(self) -> None:
        """Everything in flight fails, with the link or the process."""
        while self.open:
            self.open.pop(0).completion.settle(ExpertUnavailable("lost"))

    def expire(self, asked: Asked) -> None:
        if asked in self.open:
            self.open.remove(asked)
            if self.linked:
                self.lose()

    def answer(self, spoil: Callable[[Tensor], Tensor] | None = None) -> None:
        """One of its calls, not always the oldest."""
        asked = self.open.pop(self.story.chance.randrange(len(self.open)))
        if asked.withdrawn and self.story.chance.random() < 0.5:  # it had not begun
            asked.completion.settle(Cancelled("not wanted any more"))
            return
        rows = computed(asked.frame)
        known = (self.address, self.identity) in self.story.condemned
        asked.lied, asked.believed = spoil is not None, not asked.withdrawn and not known
        if asked.lied:
            self.story.liars.add((self.address, self.identity))
        asked.completion.settle(self.story.reply(rows if spoil is None else spoil(rows)))

    def fail(self, error: ConsiliumError) -> None:
        self.open.pop(0).completion.settle(error)


@dataclass(eq=False)
class Story:
    """A few workers and the dispatcher that asks them."""

    chance: Random
    policy: LastReplica
    now: float = 1000.0
    trouble: int = TROUBLE
    asked: list[Asked] = field(default_factory=list)
    liars: set[tuple[str, str]] = field(default_factory=set)  # addresses and identities of who has answered wrongly
    condemned: set[tuple[str, str]] = field(default_factory=set)
    released: list[int] = field(default_factory=list)  # how often each answer was

    def __post_init__(self) -> None:
        chance = self.chance
        settings = {"audit": chance.choice([0, 0.5, 1, 1]), "hedging": chance.choice([0, 0.5, 1])}
        config = GatewayConfig(layer_timeout=8, last_replica=self.policy, ejection_time=1, **settings)
        checkpoint = chance.random() < 0.5
        self.actors = [
            Actor(f"worker-{n}:1", self, chance.random() < 0.5) for n in range(chance.choice([1, 2, 3, 4, 5]))
        ]
        for actor in self.actors[3:]:
            actor.numerics_class = chance.choice(["float32", "another"])
        self.held = [
            [each for each in range(EXPERTS) if chance.random() < chance.choice([0.6, 1])] for _ in self.actors
        ]
        self.dispatcher = Dispatcher(
            torch.float32, config, ExpertMeter(CONFIG), lambda: self.local() if checkpoint else self.unable()
        )
        self.crew = self.dispatcher.crew
        self.crew.probation.ejections = Ejections(config.ejection_time, self.clock)
        self._condemn, self.crew.condemn = self.crew.condemn, self.condemn  # type: ignore[method-assign] # to listen
        self.follow()

    def condemn(self, worker: Worker, identity: str, frame: Frame, others: Collection[str]) -> None:
        """Somebody has been found out, and is not to be asked again."""
        assert (worker.address, identity) in self.liars, "an honest worker was condemned"
        self.condemned.add((worker.address, identity))
        self._condemn(worker, identity, frame, others)

    @staticmethod
    def local() -> LocalExperts:
        return cast("LocalExperts", Here())

    @staticmethod
    def unable() -> LocalExperts:
        raise CheckpointError("the gateway has no experts")

    def follow(self, gone: tuple[int, ...] = ()) -> None:
        present = [number for number in range(len(self.actors)) if number not in gone]
        held = {self.actors[each].address: [(0, expert) for expert in self.held[each]] for each in present}
        self.dispatcher.follow(
            build_placement(held), {self.actors[each].address: self.actors[each] for each in present}
        )

    def reply(self, rows: Tensor) -> Reply:
        number = len(self.released)
        self.released.append(0)

        def release() -> None:
            self.released[number] += 1

        def as_asked(pairs: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
            if (rows.shape, rows.dtype) != ((pairs, hidden_size), dtype):
                raise WireError("other rows than were asked for")
            return rows

        return Reply(as_asked, 1, 1, self.chance.choice([1e-3, 1e-2, 1.0]), 1, 1, release)

    def clock(self) -> float:
        return self.now

    # -- what happens --------------------------------------------------------------------------------------------

    def happen(self, awaited: Awaited) -> None:
        """One to four things before anybody looks, or time passes."""
        for _ in range(self.chance.choice([1, 1, 2, 4])):
            asked = [each for each in self.actors if each.open]
            if not asked or (self.trouble and self.chance.random() < 0.15):
                self.pass_time(awaited)
            elif self.trouble:
                self.trouble -= 1
                self.chance.choice(self.troubles())(self.chance.choice(asked))
            else:
                self.chance.choice(asked).answer()

    def pass_time(self, awaited: Awaited) -> None:
        """As the mailbox has it."""
        if awaited.deadline < float("inf") and self.chance.random() < 0.6:
            self.now = max(self.now, awaited.deadline)
        else:
            self.now += self.chance.choice([1e-3, 0.1, 1])
        if awaited.outcome is None and awaited.deadline <= self.now:
            awaited.expire()

    def troubles(self) -> list[Callable[[Actor], None]]:
        well = [Actor.answer] * 4
        return [*well, self.fail, self.lose, self.lie, self.lie, self.garble, self.change]

    def fail(self, actor: Actor) -> None:
        actor.fail(self.chance.choice(ERRORS))

    def lose(self, actor: Actor) -> None:
        """It is gone for a while, and is another process then, or not."""
        known = actor.identity, actor.numerics_class
        actor.identity = actor.numerics_class = ""
        actor.lose()
        if self.chance.random() < 0.5:
            self.follow((self.actors.index(actor),))
        actor.identity, actor.numerics_class = known
        if self.chance.random() < 0.3:
            actor.identity += "+"
        self.follow()

    def lie(self, _: Actor) -> None:
        """Answer with one number more, or with what is none."""
        if self.actors[LIAR].open:
            wrong = self.chance.choice([0.1, 0.1, float("nan")])
            self.actors[LIAR].answer(partial(torch.add, other=wrong))

    def garble(self, actor: Actor) -> None:
        """Too few rows."""
        asked = actor.open.pop()
        asked.completion.settle(self.reply(computed(asked.frame)[1:]))

    def change(self, _: Actor) -> None:
        """Some leave the placement although they may still answer, or are back; others hold something else."""
        if self.chance.random() < 0.5:
            place = self.chance.randrange(len(self.actors))
            self.held[place] = [each for each in range(EXPERTS) if self.chance.random() < 0.7]
        self.follow(tuple(place for place in range(len(self.actors)) if self.chance.random() < 0.3))

    # -- layers --------------------------------------------------------------------------------------------------

    def batches(self) -> ExpertBatches:
        ids = [sorted(self.chance.sample(range(EXPERTS), TOP_K)) for _ in range(TOKENS)]
        rows = torch.tensor([[self.chance.uniform(1, 2) for _ in range(HIDDEN)] for _ in range(TOKENS)])
        return group_by_expert(rows, None, Routing(torch.tensor(ids), torch.ones(TOKENS, TOP_K)))

    def drive(self, layers: list[Coroutine[Awaited, None, Dispatched]]) -> list[Dispatched | None]:
        """Side by side, as the mailbox does it; None for those that were given up on the way."""
        results: list[Dispatched | None] = [None] * len(layers)
        waiting: dict[int, Awaited | None] = dict.fromkeys(range(len(layers)))
        for _ in range(MOST_EVENTS):
            for place in [place for place, what in waiting.items() if what is None or what.outcome is not None]:
                try:
                    waiting[place] = layers[place].send(None)
                except StopIteration as stop:
                    results[place] = stop.value
                    del waiting[place]
            if self.trouble and self.chance.random() < 0.02:  # the step has failed
                for place in waiting:
                    layers[place].close()
                return results
            if not waiting:
                return results
            self.happen(min((each for each in waiting.values() if each is not None), key=lambda each: each.deadline))
        raise AssertionError("a layer waits for ever")

    def check(self, batches: ExpertBatches, found: Dispatched) -> None:
        """Each row is right, or its token has failed, or the policy is to do without it."""
        outputs, failures = found
        assert not any("missing" in str(error) for error in failures.values()), "rows were forgotten"
        left_out = set() if outputs.left_out is None else set(outputs.left_out.tolist())
        assert not left_out or self.policy == "renormalise"
        experts = torch.from_numpy(batches.experts).repeat_interleave(torch.from_numpy(batches.counts))  # [P]
        right = batches.rows[torch.from_numpy(batches.tokens)] * (experts + 2.5)[:, None]  # [P, D]
        wrong = (outputs.rows(batches.slots) != right).any(dim=1)
        for pair in wrong.nonzero().flatten().tolist():
            slot, token = int(batches.slots[pair]), int(batches.tokens[pair])
            if token in failures or slot in left_out:
                continue
            assert outputs.addresses[slot], f"nothing became of expert {experts[pair]} of token {token}"
            assert self.deceived(batches.rows[token], int(experts[pair])), "a wrong row, and nobody has lied about it"

    def deceived(self, row: Tensor, expert: int) -> bool:
        """Whether a lie about this row was all that anybody had to say of its frame."""
        about = [
            each
            for each in self.asked
            if each.believed and expert in each.frame.experts and any(torch.equal(row, one) for one in each.frame.rows)
        ]
        honest = {id(each.frame) for each in about if not each.lied}
        return any(each.lied and id(each.frame) not in honest for each in about)

    def end(self) -> None:
        """All answer in the end; nothing is left."""
        self.trouble = 0
        for actor in self.actors:
            while actor.open:
                actor.answer()
        crew = self.crew
        assert (crew.unattended.attempts, crew.probation.probes) == (0, 0)
        assert (crew.retries.active, crew.retries.retries) == (0, 0)
        assert not crew.fleet.work.any()
        doubtful = {address for address, place in crew.fleet.index.items() if crew.fleet.standing[place]}
        assert all(identity == crew.process(address).identity for address, identity in crew.liars.items())
        assert doubtful == set(crew.probation.ejections.out) & crew.fleet.index.keys()
        assert set(self.released) <= {1}, self.released


POLICIES = st.sampled_from(["fail", "wait", "local", "renormalise"])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), POLICIES)
def test_rows_are_right_or_failed_and_nothing_is_left(seed: int, policy: LastReplica) -> None:
    story = Story(Random(seed), policy)
    pieces = story.chance.choice([1, 2**20])  # a frame for every expert, or one for every worker
    with (
        mock.patch.object(time, "monotonic", story.clock),
        mock.patch.object(frames_in_flight, "PIECE_BYTES", pieces),
    ):
        for _ in range(LAYERS):
            asked = [story.batches() for _ in range(story.chance.choice([1, 1, 2]))]
            layers: list[Any] = [story.dispatcher.dispatch(0, batches) for batches in asked]
            for batches, found in zip(asked, story.drive(layers), strict=True):
                if found is not None:
                    story.check(batches, found)
                    found[0].release()
        story.end()
