"""The commands that look: what they print, that they change nothing, and that nothing ends in a traceback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from logstore.cli import main
from logstore.cli.output import age, shown
from logstore.cli.reference import reference
from logstore.errors import GapError
from logstore.ops.access import open_existing
from logstore.ops.compaction.compact import compact
from logstore.ops.following import FollowedStore, follow
from logstore.storage import FLAG_FINAL, FLAG_MODEL, FLAG_PRIMING, Event, Log
from logstore.storage.options import Retention
from tests.engine import Process, deadline, eventually, in_segments, process, small

ROOT = Path(__file__).parent.parent
ODD = "\u202eodd ✓ 'name\" \\ – \U0001f600"
LOOKS = ("stats", "streams", "events", "follow")


def logstore(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def printed(*arguments: object) -> Any:
    """Return what a command prints as JSON."""
    result = logstore(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with three streams: a request that was answered, a long one, and one with an odd name."""
    path = tmp_path / "events.db"
    answer = b'{"jsonrpc":"2.0","id":1,"result":{}}'

    async def fill() -> None:
        async with Log(path) as log:
            await log.append_many([("token/1", b"", FLAG_PRIMING), ("token/1", answer, FLAG_MODEL | FLAG_FINAL)])
            await log.append_many(
                [("long", json.dumps({"n": n, "text": "ü" * 300}, ensure_ascii=False).encode(), 0) for n in range(40)]
            )
            await log.append(ODD, b"\xff\x00 no JSON")

    asyncio.run(fill())
    return path


# stats


def test_stats_in_one_screen(store: Path) -> None:
    result = logstore("stats", store)
    assert result.exit_code == 0
    assert result.output.startswith(f"{store}: ok\n")
    assert "43 in 3 streams" in result.output
    lines = result.output.splitlines()
    assert len(lines) < 24
    assert max(map(len, lines[1:])) <= 100


@pytest.mark.promise("ids-are-text")
def test_stats_as_json_for_programs(store: Path) -> None:
    found = printed("stats", store)
    assert (found["status"], found["total_events"], found["total_streams"]) == ("ok", 43, 3)
    assert isinstance(found["last_event_id"], str)
    assert found["sizes"]["segments"] > 10_000
    assert "streams" not in found


async def test_stats_shows_the_processes_and_their_latencies(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with Log(path) as log, deadline():
        await log.append("s", b"{}")
        figures = tmp_path / "events-log" / "lanes" / "0000" / "figures.json"
        await eventually(figures.exists)
        result = await asyncio.to_thread(logstore, "stats", path)
    assert result.exit_code == 0
    assert f"\n{os.getpid()}" in result.output
    for operation in ("append", "commit", "read", "checkpoint"):
        assert f"  {operation} " in result.output


@pytest.mark.promise("errors-are-one-line")
def test_stats_says_what_is_wrong_and_exits_with_1(store: Path) -> None:
    store.unlink()
    result = logstore("stats", store)
    assert result.exit_code == 1
    assert f"{store}: degraded" in result.output
    assert f"logstore reindex {store}" in result.output
    assert json.loads(logstore("stats", store, "--json").output)["total_events"] is None


# streams


@pytest.mark.promise("shown-escaped")
def test_streams_has_a_row_for_each(store: Path) -> None:
    output = logstore("streams", store).output
    assert len(output.splitlines()) == 2 + 3
    # What would turn the line around is escaped.
    assert "\\u202eodd ✓" in output
    assert "\u202e" not in output


def test_streams_sorts_filters_and_limits(store: Path) -> None:
    def names(*options: object) -> list[str]:
        return [row["stream"] for row in printed("streams", store, *options)["streams"]]

    assert names() == [ODD, "long", "token/1"]
    assert names("--sort", "events") == ["long", "token/1", ODD]
    assert names("--sort", "bytes", "--limit", 1) == ["long"]
    assert names("--sort", "name") == sorted(["long", "token/1", ODD])
    assert names("--like", "o") == [ODD, "long", "token/1"]
    assert names("--like", "oken") == ["token/1"]
    assert names("--like", "%") == []
    assert "2 more streams" in logstore("streams", store, "--limit", 1).stderr


# events


def test_events_are_a_line_each(store: Path) -> None:
    lines = logstore("events", store, "token/1").output.splitlines()
    assert len(lines) == 3
    assert lines[1].split()[-1] == "priming"
    assert lines[2].endswith('model final    {"id":1,"result":{}}')


def test_a_long_message_is_cut_to_the_line_and_whole_as_json(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = logstore("events", store, "long").output.splitlines()
    assert len(lines) == 41
    assert {len(line) for line in lines[1:]} == {100}
    whole = [json.loads(line) for line in logstore("events", store, "long", "--json").output.splitlines()]
    assert [each["message"]["n"] for each in whole] == list(range(40))
    assert whole[0]["message"]["text"] == "ü" * 300
    assert all(isinstance(each["event_id"], str) for each in whole)


def test_events_after_one_and_no_more_than_asked_for(store: Path) -> None:
    whole = [json.loads(line) for line in logstore("events", store, "long", "--json").output.splitlines()]
    output = logstore("events", store, "long", "--after", whole[9]["event_id"], "--limit", 3, "--json").output
    assert [json.loads(line) for line in output.splitlines()] == whole[10:13]
    nothing = logstore("events", store, "long", "--after", whole[-1]["event_id"])
    assert (nothing.exit_code, nothing.output) == (0, "")


@pytest.mark.promise("shown-escaped")
def test_a_payload_that_is_no_json_is_shown_escaped(store: Path) -> None:
    (_, line) = logstore("events", store, ODD).output.splitlines()
    assert line.endswith("\\xff\\x00 no JSON")
    (event,) = [json.loads(line) for line in logstore("events", store, ODD, "--json").output.splitlines()]
    assert event["kind"] == "bytes"


@pytest.mark.parametrize("after", [(), ("--after", "1")])
def test_a_stream_that_is_not_there_is_told(store: Path, after: tuple[str, ...]) -> None:
    result = logstore("events", store, "nothing", *after)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "'nothing'" in result.stderr


# follow


async def lines_of(follower: Process, count: int) -> list[Any]:
    return [json.loads(await follower.line()) for _ in range(count)]


FOLLOW = "import sys; from logstore.cli import main; main(['follow', *sys.argv[1:], '--json'])"


async def test_follow_prints_what_comes_until_ctrl_c(store: Path) -> None:
    with process(FOLLOW, store, "long", "--after", "0") as follower:
        assert [line["message"]["n"] for line in await lines_of(follower, 40)] == list(range(40))
        async with Log(store, small()) as log:
            for number in range(40, 60):
                await log.append("long", json.dumps({"n": number}).encode())
                await log.append("other", b"{}")
            assert [line["message"]["n"] for line in await lines_of(follower, 20)] == list(range(40, 60))
        async with Log(store, small()) as log:
            await log.append("long", b'{"n": 60}')
        assert [line["message"]["n"] for line in await lines_of(follower, 1)] == [60]
        os.kill(follower.pid, signal.SIGINT)
        assert await follower.rest() == []


class _EnoughError(Exception):
    """Ends what would go on for ever."""


async def followed(
    path: Path, stream: str | None, after: int | None, *steps: Callable[[], Awaitable[object]]
) -> tuple[list[Event], list[GapError]]:
    """Follow a store; between two looks one step after the other is done. Return what came, and the gaps."""
    loop = asyncio.get_running_loop()
    rest = iter(steps)
    found: list[Event] = []
    gaps: list[GapError] = []

    def wait(_: float) -> None:
        step = next(rest, None)
        if step is None:
            raise _EnoughError

        async def take() -> None:
            await step()

        asyncio.run_coroutine_threadsafe(take(), loop).result(30)

    def run() -> None:
        with FollowedStore(path) as view, contextlib.suppress(_EnoughError):
            for event in follow(view, stream, after, on_gap=gaps.append, wait=wait):
                found.append(event)

    await asyncio.to_thread(run)
    return found, gaps


class Servers:
    """Two processes' worth of logs over one store, and what they have stored."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.logs = [Log(path, small()), Log(path, small())]
        self.stored: list[tuple[str, str]] = []

    async def append(self, streams: int = 3, count: int = 4) -> None:
        for number in range(count):
            for server, log in enumerate(self.logs):
                for stream in range(streams):
                    name = f"{server}-{stream}"
                    self.stored.append((name, await log.append(name, b"%d" % number)))

    async def append_and_checkpoint(self) -> None:
        # Streams that nobody has seen before, whose journals are gone when the next look comes.
        await self.append(streams=40, count=2)
        for log in self.logs:
            await in_segments(log)

    async def restart(self) -> None:
        await self.logs[0].close()
        self.logs[0] = Log(self._path, small())
        await self.append()

    async def close(self) -> None:
        for log in self.logs:
            await log.close()


@pytest.mark.promise("followers-miss-nothing")
@pytest.mark.parametrize("after", [0, None])
async def test_follow_loses_nothing_and_prints_nothing_twice(store: Path, after: int | None) -> None:
    servers = Servers(store)
    async with deadline():
        found, gaps = await followed(
            store,
            None,
            after,
            servers.append,
            servers.append_and_checkpoint,
            servers.append,
            servers.restart,
            servers.append_and_checkpoint,
            servers.append_and_checkpoint,
            servers.append,
            servers.close,
        )
    assert gaps == []
    before = 43 if after == 0 else 0
    assert len(found) == before + len(servers.stored)
    assert {(event.stream, event.event_id) for event in found[before:]} == set(servers.stored)
    for stream in {event.stream for event in found}:
        ids = [event.id for event in found if event.stream == stream]
        assert ids == sorted(set(ids))


async def test_follow_all_begins_after_an_event_in_the_order_of_ids(store: Path) -> None:
    whole, _ = await followed(store, None, 0)
    assert [event.id for event in whole] == sorted(event.id for event in whole)
    assert len(whole) == 43
    rest, gaps = await followed(store, None, whole[20].id)
    assert ([event.id for event in rest], gaps) == ([event.id for event in whole[21:]], [])


async def test_follow_says_what_retention_dropped_and_goes_on(store: Path) -> None:
    long, _ = await followed(store, "long", 0)

    async def drop_and_append() -> None:
        opened = open_existing(store)
        try:
            compact(opened, Retention(max_age_s=0.0))
        finally:
            opened.close(empty=True)
        async with Log(store) as log:
            await log.append("long", b"{}")

    found, gaps = await followed(store, "long", long[30].id, drop_and_append)
    assert [event.id for event in found[:9]] == [event.id for event in long[31:]]
    assert (len(found), gaps) == (10, [])
    found, gaps = await followed(store, "long", long[30].id)
    assert [event.payload for event in found] == [b"{}"]
    assert len(gaps) == 1


async def test_follow_says_where_damage_is_and_goes_on_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    for number in range(3):
        async with Log(path) as log:
            await log.append_many([("s", b"%d" % number, 0)] * 3)
    _, damaged, _ = sorted((tmp_path / "events-log" / "segments").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:80].ljust(damaged.stat().st_size, b"\0"))
    found, gaps = await followed(path, "s", 0)
    assert [event.payload for event in found] == [b"0"] * 3 + [b"2"] * 3
    assert len(gaps) == 1


# doc


def test_doc_lists_and_shows_the_pages() -> None:
    listing = logstore("doc").output
    pages = {page.name for page in (ROOT / "logstore" / "docs").iterdir() if page.is_file()}
    assert {line.split()[0] for line in listing.splitlines()} == pages
    for page in pages:
        text = (ROOT / "logstore" / "docs" / page).read_text()
        assert logstore("doc", page).output == text
        assert logstore("doc", page.removesuffix(".md")).output == text


@pytest.mark.parametrize("page", ["nothing", "../config.py", "/etc/passwd"])
def test_a_page_that_is_not_there_is_wrong_usage(page: str) -> None:
    result = logstore("doc", page)
    assert result.exit_code == 2
    assert "inspecting" in result.stderr


def test_the_page_of_the_commands_is_what_they_say_themselves() -> None:
    page = ROOT / "logstore" / "docs" / "commands.md"
    assert page.read_text() == reference(), f"write it anew: python -m logstore.cli.reference > {page}"


# all of them


@pytest.mark.promise("errors-are-one-line")
@pytest.mark.parametrize("command", LOOKS)
def test_a_wrong_path_is_one_clear_line(tmp_path: Path, command: str) -> None:
    foreign = tmp_path / "foreign.db"
    with contextlib.closing(sqlite3.connect(foreign)) as database:
        database.execute("CREATE TABLE t (a)")
    streams = ("s",) if command == "events" else ()
    for path in (tmp_path, tmp_path / "nothing.db", foreign):
        result = logstore(command, path, *streams)
        assert result.exit_code == 1, path
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [foreign]


@pytest.mark.parametrize("command", LOOKS)
def test_a_damaged_page_of_the_catalogue_is_one_line_that_says_what_to_do(store: Path, command: str) -> None:
    with contextlib.closing(sqlite3.connect(store)) as database:
        (page_bytes,) = database.execute("PRAGMA page_size").fetchone()
        (root,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'extents'").fetchone()
    with store.open("r+b") as file:
        file.seek((root - 1) * page_bytes)
        file.write(b"\xff" * page_bytes)
    result = logstore(command, store, *(("long",) if command == "events" else ()))
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if "SQLite says" in line]
    assert "malformed" in line
    assert command == "events" or f"logstore reindex {store}" in line


@pytest.mark.promise("damage-no-traceback")
@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_store_is_no_traceback(store: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    files = [store, *(file for file in store.parent.rglob("*") if file.is_file() and file.stat().st_size > 100)]
    # The catalogue every other time: it is what all commands ask.
    file = rng.choice(files) if seed % 2 else store
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 20))):
        start = rng.randrange(len(data))
        data[start : start + rng.choice((1, 500, 5000))] = rng.randbytes(rng.choice((1, 500)))
    file.write_bytes(data)

    def enough(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", enough)
    for command in LOOKS:
        streams = ("long",) if command == "events" else ()
        after = ("--after", "0") if command == "follow" else ()
        result = logstore(command, store, *streams, *after)
        assert result.exit_code in (0, 1)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info


@pytest.mark.parametrize("arguments", [("events", "x.db", "s", "--after", "x"), ("follow", "x.db", "--after", "-1")])
def test_what_is_no_event_id_is_wrong_usage(arguments: tuple[str, ...]) -> None:
    result = logstore(*arguments)
    assert result.exit_code == 2
    assert "is not an event id" in result.stderr


@pytest.mark.promise("look-changes-nothing")
def test_looks_change_nothing(store: Path) -> None:
    def content() -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in store.parent.rglob("*") if file.is_file()}

    before = content()
    logstore("stats", store)
    logstore("streams", store)
    logstore("events", store, "long")
    assert content() == before


@pytest.mark.promise("look-changes-nothing")
@pytest.mark.parametrize("damaged", ["events.db", "events-log/segments/*.segment", "events-log/registry.log"])
def test_looks_at_a_damaged_store_change_nothing(store: Path, damaged: str) -> None:
    (file,) = store.parent.glob(damaged)
    data = bytearray(file.read_bytes())
    for place in range(len(data) // 2, len(data), 100):
        data[place] ^= 0xFF
    file.write_bytes(data)

    def content() -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in store.parent.rglob("*") if file.is_file()}

    before = content()
    commands = (
        ("verify", store),
        ("stats", store),
        ("streams", store),
        ("events", store, "long"),
        ("export", store, "-"),
    )
    verified, *others = [logstore(*command).exit_code for command in commands]
    assert verified == 1
    assert set(others) <= {0, 1}
    assert content() == before


@pytest.mark.promise("mcp-loaded-lazily")
@pytest.mark.parametrize("command", LOOKS)
def test_a_look_does_not_load_mcp(store: Path, command: str) -> None:
    streams = ["long"] if command == "events" else []
    code = f"""
import sys, time
from logstore.cli import main
def enough(_):
    raise KeyboardInterrupt
time.sleep = enough
try:
    main({[command, str(store), *streams]!r})
except SystemExit as end:
    assert not end.code, end.code
print(sorted({{"mcp", "mcp_types", "pydantic", "starlette", "sqlite_utils.cli"}} & sys.modules.keys()))
"""
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.splitlines()[-1] == "[]"


def test_a_reader_that_has_seen_enough_is_no_traceback(store: Path) -> None:
    async def fill() -> None:
        async with Log(store) as log:
            # More than a pipe holds, so that the reader is gone while there is something to write.
            await log.append_many([("long", b'{"text": "%s"}' % (b"x" * 1000), 0)] * 1000)

    asyncio.run(fill())
    command = f"{sys.executable} -m logstore follow {store} --after 0 --json"
    done = subprocess.run(
        ["sh", "-c", f"{command} | head -n 1"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert json.loads(done.stdout)
    assert done.stderr == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("command", ["streams", "events"])
def test_a_terminal_that_cannot_show_a_character_gets_an_escape(store: Path, command: str, encoding: str) -> None:
    for options in ([], ["--json"]):
        arguments = [str(store), *(["long"] if command == "events" else []), *options]
        done = subprocess.run(
            [sys.executable, "-m", "logstore", command, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        if options:
            assert all(json.loads(line) for line in done.stdout.decode().splitlines())


@pytest.mark.promise("shown-escaped")
@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("plain – ✓", None, "plain – ✓"),
        ("a\nb\x1b[31m", None, "a\\nb\\x1b[31m"),
        ("half \ud800", None, "half \\ud800"),
        ("12345", 5, "12345"),
        ("123456", 5, "1234…"),
        ("\n\n\n", 4, "\\n\\…"),
    ],
)
def test_text_is_shown_in_one_line(text: str, width: int | None, expected: str) -> None:
    assert shown(text, width) == expected


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7_200, "2 hours"), (200_000, "2 days")]
)
def test_ages_are_for_people(seconds: float, text: str) -> None:
    assert age(seconds) == text
