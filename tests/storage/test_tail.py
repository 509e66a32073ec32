"""The tail keeps what is in no segment, and as much of the rest as its budget allows."""

from __future__ import annotations

import pytest

from logstore.storage.tail import Generation, StreamTail, Tail, memory_of

FRAME = bytes(100)
SIZE = memory_of([FRAME])
OTHERS = 3


class Log:
    """Appends to a tail as a commit does."""

    def __init__(self, budget: int = 1 << 30, cached_events: int = 100) -> None:
        self.tail = Tail(budget, cached_events)
        self.ids = 0
        self.ordinal = 1

    def append(self, *names: str) -> list[int]:
        """Show one event for each name, in the journal being written."""
        generation = self.tail.generation(self.ordinal)
        ids = []
        for name in names:
            self.ids += 1
            owner = self.tail.stream(name, OTHERS)
            owner.last = self.ids
            self.tail.show(generation, [self.ids], [FRAME], [owner])
            ids.append(self.ids)
        return ids

    def seal(self) -> Generation:
        generation = self.tail.generation(self.ordinal)
        generation.synced = len(generation.ids)
        generation.sealed = True
        self.ordinal += 1
        return generation

    def checkpoint(self) -> None:
        self.seal()
        self.tail.segmented([each for each in self.tail.generations if each.sealed])
        while self.tail.tidy(100):
            pass


def ids_of(tail: Tail, name: str) -> list[int]:
    return tail.streams[name].ids if name in tail.streams else []


def bytes_held(tail: Tail) -> int:
    return sum(600 + memory_of(owner.frames) for owner in tail.streams.values())


def test_events_are_found_by_stream_and_by_id() -> None:
    log = Log()
    assert log.append("a", "b", "a", "a") == [1, 2, 3, 4]
    assert ids_of(log.tail, "a") == [1, 3, 4]
    assert [log.tail.stream_of(event_id) for event_id in range(6)] == [None, "a", "b", "a", "a", None]
    assert log.tail.bytes == bytes_held(log.tail)


def test_the_events_after_an_id_come_in_order_up_to_a_limit() -> None:
    owner = StreamTail("a", OTHERS)
    owner.ids, owner.frames = [2, 4, 6], [b"2", b"4", b"6"]
    assert owner.after(0, 10) == [b"2", b"4", b"6"]
    assert owner.after(2, 10) == owner.after(3, 10) == [b"4", b"6"]
    assert owner.after(2, 1) == [b"4"]
    assert owner.after(6, 10) == owner.after(2, 0) == []


def test_a_stream_covers_what_follows_the_oldest_of_its_events() -> None:
    owner = StreamTail("a", OTHERS)
    assert not owner.covers(5)
    owner.ids = [4, 6]
    assert [owner.covers(each) for each in (3, 4, 5, 6, 7)] == [False, True, True, True, True]


def test_an_event_in_segments_is_no_longer_of_a_journal_but_stays_in_the_cache() -> None:
    log = Log()
    log.append("a", "b")
    assert log.tail.unsegmented_bytes == 2 * SIZE
    log.checkpoint()
    assert log.tail.unsegmented_bytes == 0
    assert not log.tail.generations
    assert log.tail.stream_of(1) is None
    assert ids_of(log.tail, "a") == [1]
    assert log.tail.streams["a"].in_segments == 1


def test_only_the_newest_events_of_a_stream_stay_once_they_are_in_segments() -> None:
    log = Log(cached_events=3)
    log.append(*["a"] * 10, "b")
    assert len(ids_of(log.tail, "a")) == 10
    log.checkpoint()
    assert ids_of(log.tail, "a") == [8, 9, 10]
    assert ids_of(log.tail, "b") == [11]
    assert log.tail.bytes == bytes_held(log.tail)


def test_the_very_newest_stays_even_without_a_cache() -> None:
    log = Log(cached_events=0)
    log.append(*["a"] * 4)
    log.checkpoint()
    assert ids_of(log.tail, "a") == [4]


def test_what_is_in_no_segment_stays_however_little_is_to_be_kept() -> None:
    log = Log(budget=0, cached_events=1)
    log.append(*["a"] * 5)
    sealed = log.seal()
    log.append(*["a"] * 5, "b")
    log.tail.segmented([sealed])
    assert not log.tail.tidy(100)
    assert ids_of(log.tail, "a") == [6, 7, 8, 9, 10]
    assert log.tail.streams["a"].in_segments == 0
    assert log.tail.unsegmented_bytes == 6 * SIZE


@pytest.mark.promise("memory-bounded")
def test_past_the_budget_the_streams_that_wrote_longest_ago_go() -> None:
    log = Log(budget=3 * (SIZE + 600))
    for name in "abcde":
        log.append(name)
        log.checkpoint()
    assert list(log.tail.streams) == ["c", "d", "e"]
    assert log.tail.bytes == bytes_held(log.tail) == 3 * (SIZE + 600)


def test_a_stream_that_wrote_again_is_not_the_first_to_go() -> None:
    log = Log(budget=3 * (SIZE + 600) + SIZE)
    for name in "abcad":
        log.append(name)
        log.checkpoint()
    assert list(log.tail.streams) == ["a", "c", "d"]


def test_the_queue_of_cached_streams_does_not_grow_with_every_checkpoint() -> None:
    log = Log()
    for _ in range(50):
        log.append("a", "b")
        log.checkpoint()
    assert len(log.tail._cached) <= 2


def test_a_stream_with_an_event_on_its_way_keeps_its_place() -> None:
    log = Log(budget=0)
    log.append("a")
    log.tail.streams["a"].last = 99
    log.checkpoint()
    assert ids_of(log.tail, "a") == []
    assert log.tail.streams["a"].last == 99
    assert log.tail.bytes == bytes_held(log.tail)


def test_a_stream_that_comes_back_after_eviction_begins_anew() -> None:
    log = Log(budget=0)
    log.append("a")
    evicted = log.tail.streams["a"]
    log.checkpoint()
    assert "a" not in log.tail.streams
    assert log.tail.bytes == 0
    log.append("a")
    assert log.tail.streams["a"] is not evicted
    log.checkpoint()
    assert log.tail.bytes == log.tail.unsegmented_bytes == 0


@pytest.mark.promise("memory-bounded")
def test_memory_is_accounted_for_through_any_number_of_turns() -> None:
    log = Log(budget=40 * SIZE, cached_events=2)
    for turn in range(200):
        log.append(*(f"stream-{(turn * 7 + each * each) % 23}" for each in range(turn % 11)))
        if turn % 3 == 0:
            log.seal()
        if turn % 5 == 0:
            log.tail.segmented([each for each in log.tail.generations if each.sealed])
        assert log.tail.bytes == bytes_held(log.tail)
        assert log.tail.unsegmented_bytes == sum(each.bytes for each in log.tail.generations)
    log.checkpoint()
    assert log.tail.unsegmented_bytes == 0
    assert log.tail.bytes <= 40 * SIZE


def test_events_go_to_segments_in_the_order_of_their_ids() -> None:
    log = Log()
    log.append("a", "b", "a")
    log.seal()
    log.append("c", "a", "b")
    log.seal()
    events = log.tail.unsegmented(list(log.tail.generations))
    assert (events.ids, events.streams) == ([1, 2, 3, 4, 5, 6], ["a", "b", "a", "c", "a", "b"])
    assert events.frames == [frame for generation in log.tail.generations for frame in generation.frames]


def test_what_the_disk_may_not_hold_moves_to_another_generation_in_order() -> None:
    log = Log()
    log.append("a", "b", "a", "b")
    source = log.tail.generation(log.ordinal)
    source.synced = 1
    target = Generation(0)
    target.ids, target.frames = [9], [FRAME]
    target.owners, target.bytes = [log.tail.streams["a"]], SIZE
    log.tail.move_unsynced(source, target)
    assert (source.ids, target.ids) == ([1], [2, 3, 4, 9])
    assert (source.bytes, target.bytes) == (SIZE, 4 * SIZE)
    assert [owner.name for owner in target.owners] == ["b", "a", "b", "a"]
    assert ids_of(log.tail, "a") == [1, 3]


@pytest.mark.promise("volatile-bounded")
def test_forgotten_events_leave_a_gap_that_is_remembered() -> None:
    log = Log()
    log.append("a")
    log.checkpoint()
    log.append("a", "b", "a", "b", "a")
    generation = log.tail.generation(log.ordinal)
    log.tail.forget(generation, 0, 3)
    assert generation.ids == [5, 6]
    # What came before is kept: while the disk fails it may be in no segment, and would be nowhere.
    assert ids_of(log.tail, "a") == [1, 6]
    assert ids_of(log.tail, "b") == [5]
    assert (log.tail.streams["a"].lost, log.tail.streams["a"].in_segments) == (4, 1)
    assert log.tail.streams["b"].lost == 3
    assert generation.bytes == log.tail.unsegmented_bytes == 2 * SIZE
    assert log.tail.bytes == bytes_held(log.tail)
    assert log.tail.stream_of(2) is None


def test_a_stream_with_a_gap_is_not_evicted_as_if_it_had_none() -> None:
    log = Log(budget=0)
    log.append("a", "a")
    log.tail.forget(log.tail.generation(log.ordinal), 0, 1)
    log.checkpoint()
    assert log.tail.streams["a"].lost == 1
