"""The whole engine against lists in memory: whatever happens in whatever order, it holds what they hold.

What may be lost is what the durability mode allows, of each lane from the end; what is damaged is told.
"""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from typing import Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from logstore.storage import Durability
from tests.model import NAMES, Model

EXAMPLES: Final = os.environ.get("LOGSTORE_MODEL_EXAMPLES")
"""How many sequences are tried, others each time; without it as many as the suite has time for, always the same."""
SUITE_EXAMPLES: Final = 20
STEPS: Final = 20

STREAMS: Final = st.sampled_from(NAMES)
SIZES: Final = st.sampled_from([0, 30, 3_000, 70_000])
DURABILITIES: Final = st.sampled_from(["always", "interval", "os"])
SEEDS: Final = st.integers(0, 1 << 32)
CALLS: Final = st.integers(1, 40)


class Engine(RuleBasedStateMachine):
    """What may happen."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def teardown(self) -> None:
        self.model.end()

    @initialize(durability=DURABILITIES)
    def begin(self, durability: Durability) -> None:
        self.model.run(self.model.open(durability))
        self.append_batch(["a", "b", "a"], 30)

    def place_in(self, stream: str, seed: int) -> int:
        return random.Random(seed).randrange(len(self.model.lists.streams.get(stream, ())) + 1)

    # Appending and reading.

    @rule(stream=STREAMS, size=SIZES)
    def append(self, stream: str, size: int) -> None:
        model = self.model
        model.run(model.append(model.main, [(stream, model.payload(size))]))

    @rule(streams=st.lists(STREAMS, min_size=2, max_size=6), size=SIZES)
    def append_batch(self, streams: list[str], size: int) -> None:
        model = self.model
        model.run(model.append(model.main, [(stream, model.payload(size)) for stream in streams]))

    @rule(streams=st.lists(STREAMS, min_size=2, max_size=6))
    def append_from_many_tasks(self, streams: list[str]) -> None:
        model = self.model
        items = [(stream, model.payload(20)) for stream in streams]
        model.run(model.append_from_many_tasks(model.main, items))

    @rule(stream=STREAMS, seed=SEEDS)
    def replay(self, stream: str, seed: int) -> None:
        events, place = self.model.lists.streams.get(stream, []), self.place_in(stream, seed)
        after = str(events[place - 1].id) if place else None
        for writer in self.model.writers:
            assert self.model.run(self.model.read(writer.log, stream, after)) == events[place:]

    @rule(stream=STREAMS, seed=SEEDS, size=SIZES)
    def follow(self, stream: str, seed: int, size: int) -> None:
        model, place = self.model, self.place_in(stream, seed)
        found = model.run(model.follow(stream, place, [(stream, model.payload(size))]))
        assert found == model.lists.streams[stream][place:]

    # Work on the store.

    @rule()
    def checkpoint(self) -> None:
        self.model.run(self.model.checkpoint())

    @rule(kept=st.sampled_from([None, 1, 5]))
    def compact(self, kept: int | None) -> None:
        self.model.run(self.model.compact(kept))

    @rule()
    def back_up(self) -> None:
        self.model.run(self.model.back_up())

    @precondition(lambda self: self.model.lists.backups)
    @rule(seed=SEEDS, durability=DURABILITIES)
    def restore(self, seed: int, durability: Durability) -> None:
        backup = random.Random(seed).choice(self.model.lists.backups)
        self.model.run(self.model.restore(backup, durability))

    # Logs and sessions that come and go.

    @rule(durability=DURABILITIES)
    def close_and_reopen(self, durability: Durability) -> None:
        self.model.run(self.model.close())
        self.model.run(self.model.open(durability))

    @precondition(lambda self: len(self.model.writers) == 1)
    @rule(durability=DURABILITIES)
    def open_another(self, durability: Durability) -> None:
        self.model.run(self.model.open(durability))

    @rule()
    def open_session(self) -> None:
        self.model.run(self.model.open_session())

    @precondition(lambda self: self.model.sessions)
    @rule(seed=SEEDS)
    def take_over(self, seed: int) -> None:
        key = random.Random(seed).choice(sorted(self.model.sessions))
        self.model.run(self.model.take_over(key))

    # Crashes and damage.

    @rule(durability=DURABILITIES)
    def crash(self, durability: Durability) -> None:
        self.model.run(self.model.crash(durability))

    @rule(seed=SEEDS, durability=DURABILITIES)
    def cut_power(self, seed: int, durability: Durability) -> None:
        self.model.run(self.model.cut_power(seed, durability))

    @rule(streams=st.lists(STREAMS, min_size=1, max_size=5), size=SIZES, nth=CALLS, seed=SEEDS)
    def cut_power_during_an_append(self, streams: list[str], size: int, nth: int, seed: int) -> None:
        model = self.model
        items = [(stream, model.payload(size)) for stream in streams]
        model.run(model.cut_power_during(lambda: model.append(model.main, items), nth, seed, items))

    @rule(kind=st.sampled_from(["checkpoint", "compact", "back up", "close", "open"]), nth=CALLS, seed=SEEDS)
    def cut_power_during_work(self, kind: str, nth: int, seed: int) -> None:
        model = self.model
        works: dict[str, Callable[[], Awaitable[object]]] = {
            "checkpoint": model.checkpoint,
            "compact": lambda: model.compact(None),
            "back up": model.back_up,
            "close": model.close,
            "open": lambda: model.open("always"),
        }
        model.run(model.cut_power_during(works[kind], nth, seed))

    @rule(seed=SEEDS, killed=st.booleans())
    def damage(self, seed: int, killed: bool) -> None:
        self.model.run(self.model.look_at_damage(random.Random(seed), killed=killed))

    # Always.

    @invariant()
    def holds_what_the_lists_hold(self) -> None:
        model = self.model
        if not model.writers:
            return
        log = model.writers[-1].log
        model.compare(model.run(model.contents(log)))
        assert log.health().status == "ok"
        assert {each.key: each.incarnation for each in model.run(log.sessions.all())} == model.sessions


TestModel = Engine.TestCase
TestModel.settings = settings(
    max_examples=int(EXAMPLES or SUITE_EXAMPLES),
    stateful_step_count=STEPS,
    derandomize=EXAMPLES is None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
