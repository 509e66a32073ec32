"""An export holds every event as it was stored, in order, and says what is missing."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import json
import os
import stat
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from logstore.cli import main
from logstore.errors import ConfigurationError, DamageError, NotAStoreError
from logstore.ops.access import StoreView
from logstore.ops.transfer.event_json import read_event, write_event
from logstore.ops.transfer.export import export_events, export_store
from logstore.ops.transfer.over_gaps import GapReader
from logstore.ops.transfer.selection import Moment, Selection
from logstore.storage import Log
from logstore.storage.origin import encode_origin
from logstore.storage.record import (
    FLAG_FINAL,
    FLAG_IMPORTED,
    FLAG_MODEL,
    FLAG_PRIMING,
    FLAG_REQUEST,
    FRAME_HEADER,
    Event,
)
from logstore.storage.segment import iter_segment
from tests.engine import read_all, small
from tests.storage.disks import Fault, FaultyDisk

EVERYTHING = Selection()
RESULT = b'{"jsonrpc":"2.0","id":1,"result":{}}'
PAYLOADS = [
    (b"", FLAG_PRIMING),
    (b'{"jsonrpc":"2.0","method":"m","params":{"a":[1,2.50,"\xc3\xa9\\u00e9"]}}', FLAG_MODEL),
    (b'{"method": "tools/call",  "params": {"n": 1e5}}', 0),
    (RESULT, FLAG_MODEL | FLAG_FINAL | FLAG_REQUEST),
    (encode_origin("event-store", "7#0") + b'{"x":1}', FLAG_IMPORTED),
    (encode_origin("mcp-persist", "8#1"), FLAG_IMPORTED | FLAG_PRIMING),
    # What people could not read, or would not come back.
    (b"\x00\xff\n", 0),
    (b'{"a":\n1}', 0),
    (b"[1]", 0),
    (b'{"a":NaN}', FLAG_MODEL),
    (b'{"no":"JSON-RPC"}', FLAG_MODEL),
    (b"", 0),
    (b'{"x":1}', FLAG_PRIMING | FLAG_MODEL),
    (b"no origin", FLAG_IMPORTED | FLAG_FINAL),
    (b'{"x":1}', 1 << 20),
    (b'{"a":' * 250 + b"1" + b"}" * 250, 0),
]


def lines(data: bytes) -> list[dict[str, Any]]:
    """Return the events of an NDJSON export that is whole."""
    head, *events, tail = [json.loads(line) for line in data.splitlines()]
    assert (head["format"], head["version"]) == ("logstore-export", 1)
    assert tail["count"] == len(events)
    return events


def exported(path: Path, selection: Selection = EVERYTHING) -> list[dict[str, Any]]:
    out = io.BytesIO()
    result = export_store(path, out, selection, form="ndjson")
    found = lines(out.getvalue())
    assert result.events == len(found)
    return found


async def fill(path: Path, streams: int, events: int, payload: bytes = b'{"x":1}') -> list[str]:
    async with Log(path, small(durability="os")) as log:
        items = [(f"s{each % streams}", payload, 0) for each in range(events)]
        return [event_id for at in range(0, events, 500) for event_id in await log.append_many(items[at : at + 500])]


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[Log]:
    # Nothing goes to segments by itself before the log is closed.
    async with Log(tmp_path / "events.db", small(checkpoint_interval_s=3600.0)) as opened:
        yield opened


@pytest.mark.promise("export-says-what-is-missing")
@pytest.mark.parametrize(("payload", "flags"), PAYLOADS)
def test_every_event_comes_back_from_json_as_it_was(payload: bytes, flags: int) -> None:
    event = Event(5 << 30, 4, 1_700_000_000_000_001, "s/é ", flags, payload)
    data = write_event(event)
    assert b"\n" not in data
    assert read_event(data) == event


@given(st.binary(), st.integers(0, (1 << 31) - 1), st.integers(0, 1 << 55))
def test_any_payload_with_any_flags_comes_back_from_json(payload: bytes, flags: int, time_us: int) -> None:
    event = Event(5, 0, time_us % 250_000_000_000_000_000, "s", flags, payload)
    assert read_event(write_event(event)) == event


@pytest.mark.promise("export-says-what-is-missing")
@pytest.mark.parametrize("form", ["json", "ndjson"])
async def test_events_in_journals_and_segments_are_exported_in_order(tmp_path: Path, form: str) -> None:
    path, target = tmp_path / "events.db", tmp_path / "out"
    ids = await fill(path, 3, 1000)
    async with Log(path, small(checkpoint_interval_s=3600.0)) as log:
        ids += [await log.append("s1", b'{"late":true}'), await log.append("new", b"", FLAG_PRIMING)]
        assert export_events(path, target, form="ndjson" if form == "ndjson" else "json") == 1002
    data = target.read_bytes()
    events = lines(data) if form == "ndjson" else json.loads(data)["events"]
    assert [event["stream_id"] for event in events] == sorted(event["stream_id"] for event in events)
    for name in ("new", "s0", "s1", "s2"):
        of_stream = [event for event in events if event["stream_id"] == name]
        assert [event["event_id"] for event in of_stream] == sorted(event["event_id"] for event in of_stream)
        # A writer that has been opened again does not know what came before.
        assert [event["prev"] for event in of_stream] == [
            None if place == 0 or event["message"] == {"late": True} else of_stream[place - 1]["event_id"]
            for place, event in enumerate(of_stream)
        ]
    assert sorted(event["event_id"] for event in events) == ids
    if form == "json":
        whole = json.loads(data)
        assert (whole["format"], whole["version"], whole["count"], whole["gaps"]) == ("logstore-export", 1, 1002, [])
        assert datetime.fromisoformat(whole["exported_at"]).tzinfo is not None
        assert data.count(b"\n") == 1002 + 2


async def test_an_event_is_laid_out_for_people(log: Log) -> None:
    first = await log.append("1", b"", FLAG_PRIMING)
    second = await log.append("1", RESULT, FLAG_MODEL | FLAG_FINAL | FLAG_REQUEST)
    stored = await log.read("1")
    times = [datetime.fromtimestamp(event.time_us / 1e6, UTC).isoformat(timespec="microseconds") for event in stored]
    assert exported(log.path) == [
        {"event_id": first, "stream_id": "1", "timestamp": times[0], "prev": None, "kind": "priming", "message": None},
        {
            "event_id": second,
            "stream_id": "1",
            "timestamp": times[1],
            "prev": first,
            "kind": "model",
            "message": {"jsonrpc": "2.0", "id": 1, "result": {}},
            "final": True,
            "request": True,
        },
    ]


@pytest.mark.parametrize("form", ["json", "ndjson"])
async def test_an_empty_export_is_whole(log: Log, form: str) -> None:
    out = io.BytesIO()
    assert export_events(log.path, out, form="ndjson" if form == "ndjson" else "json") == 0
    assert not lines(out.getvalue()) if form == "ndjson" else json.loads(out.getvalue())["events"] == []


async def test_only_one_stream(log: Log) -> None:
    wanted = await log.append("s1", b"{}")
    await log.append("s10", b"{}")
    assert [event["event_id"] for event in exported(log.path, Selection(stream="s1"))] == [wanted]
    assert exported(log.path, Selection(stream="s")) == []


async def test_only_one_session_by_its_id_hash_or_prefix(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    key = hashlib.sha256(b"the id").hexdigest()
    async with Log(path) as log:
        await log.sessions.open(key, b"", "token1/")
        await log.sessions.open("another", b"", "token10/")
        wanted = [await log.append("token1/1", b"{}"), await log.append("token1/_GET_stream", b"{}")]
        for stream in ("token1", "token10/1", "token2/1", "token0/1"):
            await log.append(stream, b"{}")
    for session in ("the id", key, "token1/"):
        assert [event["event_id"] for event in exported(path, Selection(session=session))] == wanted
    assert exported(path, Selection(session="the id", stream="token10/1")) == []
    assert b"the id" not in json.dumps(exported(path)).encode()
    for unknown in ("token", "", "\ud800", "é"):
        with pytest.raises(ConfigurationError, match="knows no session"):
            exported(path, Selection(session=unknown))


async def test_only_a_time_both_ends_included(log: Log) -> None:
    ids = [await log.append("s", b"{}") for _ in range(5)]
    times = [datetime.fromtimestamp(event.time_us / 1e6, UTC) for event in await log.read("s")]
    second = timedelta(seconds=1)

    def found(start: Moment, end: Moment) -> list[str]:
        return [event["event_id"] for event in exported(log.path, Selection(start=start, end=end))]

    assert found(times[1], times[3]) == ids[1:4]
    assert found(times[1].isoformat(timespec="microseconds"), None) == ids[1:]
    assert found(None, times[1].replace(tzinfo=None).isoformat(timespec="microseconds")) == ids[:2]
    assert found((times[0] - second).isoformat(timespec="seconds"), times[4].isoformat(timespec="seconds")) == ids
    assert found("2024-01-01T00:00:00", (times[4] + timedelta(days=0)).date().isoformat()) == ids
    assert found(None, (times[0] - timedelta(days=1)).date().isoformat()) == []
    assert found((times[4] + second).isoformat(timespec="seconds"), None) == []


@pytest.mark.parametrize("moment", ["yesterday", "2024-13-01", "", "2024-01-01T00:00:00+99:00", "0000-00-00"])
async def test_a_time_that_is_none_is_refused(log: Log, moment: str, tmp_path: Path) -> None:
    for selection in (Selection(start=moment), Selection(end=moment)):
        with pytest.raises(ConfigurationError, match="is not a time"):
            export_store(log.path, tmp_path / "out", selection)
    assert not (tmp_path / "out").exists()


def damage(path: Path, *events: int) -> None:
    """Flip a bit in some of the events of the only segment, counted from 0."""
    (file,) = path.with_name("events-log").joinpath("segments").iterdir()
    data = bytearray(file.read_bytes())
    offsets = [offset for offset, _ in iter_segment(bytes(data), file)]
    for event in events:
        data[offsets[event] + FRAME_HEADER.size + 5] ^= 1
    file.write_bytes(data)


@pytest.mark.promise("export-says-what-is-missing")
@pytest.mark.parametrize("bad", [[0], [7], [99], [3, 4, 50], list(range(100))])
async def test_what_lies_around_damage_is_exported_and_what_is_missing_counted(tmp_path: Path, bad: list[int]) -> None:
    path = tmp_path / "events.db"
    ids = await fill(path, 1, 100, b'{"x":"%s"}' % (b"y" * 100))
    damage(path, *bad)
    out = io.BytesIO()
    result = export_store(path, out, EVERYTHING, form="ndjson")
    assert [event["event_id"] for event in lines(out.getvalue())] == [
        event_id for place, event_id in enumerate(ids) if place not in bad
    ]
    assert result.missing == len(bad)
    assert result.gap_count == len(result.gaps) == 1
    assert result.gaps[0].stream_id == "s0"
    assert result.gaps[0].after == (ids[bad[0] - 1] if bad[0] else None)
    assert json.loads(out.getvalue().splitlines()[-1])["gaps"][0]["missing"] == len(bad)


@pytest.mark.promise("export-says-what-is-missing")
async def test_a_lost_segment_is_a_gap_and_the_rest_is_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "events.db"
    ids: list[str] = []
    for _ in range(3):
        ids += await fill(path, 1, 10)
    segments = sorted(path.with_name("events-log").joinpath("segments").iterdir(), key=lambda each: int(each.stem))
    assert len(segments) == 3
    segments[1].unlink()
    result = export_store(path, tmp_path / "out", EVERYTHING)
    assert [event["event_id"] for event in json.loads((tmp_path / "out").read_text())["events"]] == ids[:10] + ids[20:]
    assert (result.missing, [gap.after for gap in result.gaps]) == (10, [ids[9]])
    assert export_events(path, tmp_path / "out") == 20
    assert f"stream 's0' has a gap after event {ids[9]}" in caplog.text


async def test_an_event_that_only_its_successor_knows_of_is_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    ids = await fill(path, 1, 10)
    damage(path, 5)
    # An index that is made again knows nothing of the damaged event.
    path.unlink()
    async with Log(path):
        pass
    result = export_store(path, tmp_path / "out", EVERYTHING)
    assert (result.events, result.missing, result.gap_count) == (9, 0, 1)
    assert (result.gaps[0].after, result.gaps[0].missing) == (ids[4], None)
    assert f"event {ids[5]} is gone" in result.gaps[0].reason


async def test_a_store_without_its_catalogue_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    await fill(path, 1, 10)
    path.unlink()
    with pytest.raises(DamageError, match="logstore reindex"):
        export_events(path, tmp_path / "out")
    with pytest.raises(NotAStoreError):
        export_events(tmp_path / "none.db", tmp_path / "out")
    assert not (tmp_path / "out").exists()


async def test_a_stream_that_grows_as_fast_as_it_is_read_has_an_end(log: Log) -> None:
    first = [await log.append("s", b"{}") for _ in range(100)]
    loop = asyncio.get_running_loop()
    started = time.monotonic()

    def read() -> list[str]:
        with StoreView(log.path) as view:
            found: list[str] = []
            for place, event in enumerate(GapReader(view).events("s")):
                found.append(event.event_id)
                if place % 50 == 0:
                    asyncio.run_coroutine_threadsafe(log.append_many([("s", b"{}", 0)] * 50), loop).result()
                assert time.monotonic() - started < 20, "it goes on and on"
            return found

    found = await asyncio.to_thread(read)
    assert found[:100] == first
    assert found == [event.event_id for event in await read_all(log, "s")][: len(found)]


@pytest.mark.promise("look-changes-nothing")
async def test_nothing_of_the_store_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "store" / "events.db"
    await fill(path, 3, 100)

    def snapshot() -> dict[str, tuple[int, bytes]]:
        files = [each for each in path.parent.rglob("*") if each.is_file()]
        return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}

    before = snapshot()
    export_events(path, tmp_path / "out")
    assert snapshot() == before


@pytest.mark.promise("files-are-private", "export-whole-or-absent")
async def test_a_file_is_private_and_in_place_only_when_it_is_whole(tmp_path: Path) -> None:
    path, target = tmp_path / "events.db", tmp_path / "out.json"
    await fill(path, 1, 10)
    part = tmp_path / ".out.json.logstore-part"
    target.write_text("an earlier one")
    for fault in (
        Fault("create", name="out.json"),
        Fault("write", name="out.json", error=errno.ENOSPC, written=3),
        Fault("sync", name="out.json"),
        Fault("rename", name="out.json"),
    ):
        disk = FaultyDisk()
        disk.fail(fault)
        with pytest.raises(OSError, match=os.strerror(fault.error)):
            export_store(path, target, EVERYTHING, disk=disk)
        assert target.read_text() == "an earlier one"
        assert not part.exists()
    # Left by a process that died.
    part.write_text("half")
    disk = FaultyDisk()
    export_store(path, target, EVERYTHING, disk=disk)
    assert json.loads(target.read_text())["count"] == 10
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert not part.exists()
    steps = [kind for kind, name in disk.calls if "out.json" in name]
    assert steps[-2:] == ["sync", "rename"]
    assert disk.calls[-1] == ("sync_folder", tmp_path.name)


async def test_files_of_the_store_and_folders_are_no_targets(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    await fill(path, 1, 10)
    (tmp_path / "link").symlink_to(path)
    for target in (path, tmp_path / "link", tmp_path / "events.db-wal", tmp_path / "events-log" / "registry.log"):
        with pytest.raises(ConfigurationError, match="belongs to the store"):
            export_events(path, target)
    with pytest.raises(IsADirectoryError):
        export_events(path, tmp_path)
    assert len(exported(path)) == 10


async def test_a_pipe_is_written_and_not_replaced(tmp_path: Path) -> None:
    path, pipe = tmp_path / "events.db", tmp_path / "pipe"
    await fill(path, 1, 10)
    os.mkfifo(pipe)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    await asyncio.to_thread(export_events, path, pipe, form="ndjson")
    reader.join(30)
    assert len(lines(found[0])) == 10
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.promise("transfer-memory")
@pytest.mark.slow
async def test_memory_does_not_grow_with_the_number_of_events(tmp_path: Path) -> None:
    class Nowhere(io.BytesIO):
        def write(self, data: Any) -> int:
            return len(data)

    peaks: list[int] = []
    for events in (10_000, 50_000):
        path = tmp_path / f"{events}.db"
        await fill(path, events // 500, events, b'{"x":"%s"}' % (b"y" * 100))
        tracemalloc.start()
        try:
            assert export_events(path, Nowhere()) == events
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.3 + (1 << 20)


async def test_progress_is_told(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    await fill(path, 1, 2500)
    told: list[tuple[str, int, int | None]] = []
    export_events(path, tmp_path / "out", progress=lambda *each: told.append(each))
    assert told == [("events exported", 1000, None), ("events exported", 2000, None)]


# The command.


async def test_the_command_writes_a_file_or_stdout(tmp_path: Path) -> None:
    path, target = tmp_path / "events.db", tmp_path / "out.json"
    await fill(path, 2, 10)
    result = CliRunner().invoke(main, ["export", str(path), str(target)])
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"10 events written to {target}\n", "")
    result = CliRunner().invoke(main, ["export", str(path), str(target), "--json", "--stream", "s1"])
    assert json.loads(result.stdout) == {
        "file": str(target),
        "events": 5,
        "missing": 0,
        "gap_count": 0,
        "gaps": [],
    }
    result = CliRunner().invoke(main, ["export", str(path), "-", "--ndjson", "--from", "2024-01-01"])
    assert result.exit_code == 0
    assert len(lines(result.stdout_bytes)) == 10
    assert result.stderr == "10 events written to stdout\n"


async def test_the_command_exits_with_1_when_events_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    ids = await fill(path, 1, 10)
    damage(path, 0)
    result = CliRunner().invoke(main, ["export", str(path), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "9 events written" in result.stdout
    assert "stream s0: 1 events are missing at its beginning" in result.stdout
    result = CliRunner().invoke(main, ["export", str(path), str(tmp_path / "out"), "--json"])
    assert json.loads(result.stdout)["missing"] == 1
    assert [event["event_id"] for event in exported(path)] == ids[1:]


async def test_the_command_refuses_wrong_usage(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    await fill(path, 1, 1)
    assert CliRunner().invoke(main, ["export", str(path), "x", "--from", "soon"]).exit_code == 2
    assert CliRunner().invoke(main, ["export", str(path)]).exit_code == 2
    result = CliRunner().invoke(main, ["export", str(tmp_path / "none.db"), "x"])
    assert (result.exit_code, "there is no store" in result.stderr) == (1, True)
