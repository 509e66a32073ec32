"""What whoever starts a server or a command chooses: environment variables, and paths on the command line."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Any, Final

from click.testing import CliRunner

from crash_fuzz_inputs import Input, Target, damaged
from crash_kill import BrokenPromiseError
from logstore import create_event_store, get_config, run_maintenance_tasks
from logstore.cli import main
from logstore.config import MEMORY_DB_PATH, EventStoreConfig
from logstore.storage import Log

_VARIABLES: Final = (
    "EVENT_STORE_PERSISTENT",
    "EVENT_STORE_DB_PATH",
    "EVENT_STORE_MAX_EVENTS",
    "EVENT_STORE_RETENTION_DAYS",
    "EVENT_STORE_MAX_BYTES",
    "EVENT_STORE_CACHE_SIZE",
    "EVENT_STORE_CACHE_BYTES",
    "EVENT_STORE_BACKUP_ENABLED",
    "EVENT_STORE_BACKUP_INTERVAL",
    "EVENT_STORE_BACKUP_RETENTION",
    "EVENT_STORE_DURABILITY",
    "EVENT_STORE_MAINTENANCE_INTERVAL",
    "EVENT_STORE_SYNC_INTERVAL",
    "EVENT_STORE_ON_WRITE_FAILURE",
)
_VALUES: Final = (
    b"",
    b" ",
    b"0",
    b"1",
    b"-1",
    b"+5",
    b" 7 ",
    b"1_000",
    b"1.5",
    b"1e5",
    b"1e308",
    b"1e999",
    b"nan",
    b"inf",
    b"0x10",
    b"2097152",
    b"2147483648",
    b"9223372036854775807",
    b"9223372036854775808",
    b"9" * 30,
    b"9" * 400,
    b"9" * 5_000,
    b"0.001",
    b"0.0009",
    b"true",
    b"TRUE",
    b"yes",
    b"Off",
    b"none",
    b"always",
    b"Interval",
    b"os",
    b"degrade",
    b"raise",
    b"\xff",
    b"\xd9\xa3",
    b"\xc2\xb2",
    b"\xe2\x80\xa8",
    b"\n",
    b":memory:",
)
NAMES: Final = (
    b"a.db",
    b"no suffix",
    b"a?mode=memory.db",
    b"a#b.db",
    b"a%41.db",
    b"-",
    b"--help",
    b".",
    b"..",
    b".db",
    b"x" * 255,
    b"x" * 250 + b".db",
    b"x" * 300,
    b"a" * 5_000,
    b"\xff\xfe.db",
    b"\xed\xa0\x80.db",
    b"line\nbreak.db",
    b"\x1b[31m.db",
    b"~",
    b"$HOME",
    b"a:b.db",
    b"file:a.db",
    b"'quoted\".db",
    b"a/../b.db",
    b"a//b.db",
    b"new/deep/er/a.db",
    b"a.db/",
    b"\xe2\x80\xae.db",
)


class EnvironmentTarget(Target):
    """Environment variables: what is taken as a setting makes a store that works."""

    name = "environment"
    share = 0.05

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="logstore-fuzz-"))
        os.chdir(self._folder)

    def draw(self, rng: random.Random) -> Input:
        lines = []
        for variable in rng.sample(_VARIABLES, rng.choice((1, 1, 2))):
            values = NAMES if variable.endswith("DB_PATH") else _VALUES
            lines.append(variable.encode() + b"=" + rng.choice(values))
        return Input(b"\0".join(lines))

    def feed(self, given: Input) -> bool:
        for variable in _VARIABLES:
            os.environb.pop(variable.encode(), None)
        for line in given.data.split(b"\0"):
            name, _, value = line.partition(b"=")
            os.environb[name] = value
        config = get_config("from_env")
        try:
            asyncio.run(self._use(config))
        finally:
            for entry in self._folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return True

    async def _use(self, config: EventStoreConfig) -> None:
        settings: dict[str, Any] = dict(config.__dict__)
        if config.db_path == MEMORY_DB_PATH:
            settings["db_path"] = "a.db"
        async with create_event_store(**settings) as store:
            first = await store.store_event("s", {"method": "m"})
            await store.store_event("s", {"method": "n"})
            found: list[Any] = []

            async def take(message: Any) -> None:
                found.append(message)

            await store.replay_events_after(first, take)
            if len(found) != 1:
                raise BrokenPromiseError(f"with {config} an event is not replayed")
        if config.persistent:
            results = await run_maintenance_tasks(settings["db_path"], settings)
            problems = {
                task: done["error"] for task, done in results.items() if isinstance(done, dict) and done.get("error")
            }
            if problems or not results["validation"]["valid"]:
                raise BrokenPromiseError(f"with {config} maintenance fails: {problems}, {results['validation']}")

    def close(self) -> None:
        os.chdir("/")
        shutil.rmtree(self._folder)


_COMMANDS: Final = (
    ["stats", "P"],
    ["streams", "P"],
    ["events", "P", "s"],
    ["events", "events.db", "P"],
    ["dump", "P"],
    ["verify", "P"],
    ["repair", "P"],
    ["compact", "P"],
    ["compact", "P", "--max-events", "1"],
    ["backup", "P"],
    ["backup", "events.db", "--to", "P"],
    ["restore", "P", "P"],
    ["restore", "events-backups", "P"],
    ["maintain", "P"],
    ["reindex", "P"],
    ["export", "P", "-"],
    ["export", "events.db", "P"],
    ["import", "P", "garbage"],
    ["import", "a.db", "P"],
)


class PathsTarget(Target):
    """Paths on the command line: each command ends with a result, or with one line that says why not."""

    name = "paths"
    share = 0.05

    def __init__(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="logstore-fuzz-"))
        for _ in range(2):
            asyncio.run(self._fill(self._home / "store" / "events.db"))
            CliRunner().invoke(main, ["backup", str(self._home / "store" / "events.db")])
        # Not every folder has a name that is text.
        self._folder = self._home / os.fsdecode(b"w\xffrk")

    @staticmethod
    async def _fill(path: Path) -> None:
        async with Log(path) as log:
            await log.append("s", b'{"method":"m"}')

    def _prepare(self, rng: random.Random) -> None:
        """Put a store in the working folder, perhaps a damaged one, and things that are none."""
        os.chdir("/")
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.copytree(self._home / "store", self._folder)
        os.chdir(self._folder)
        if rng.random() < 0.4:
            files = sorted(each for each in Path().rglob("*") if each.is_file() and each.stat().st_size)
            victim = rng.choice(files)
            victim.write_bytes(damaged(victim.read_bytes(), rng))
        Path("folder.db").mkdir()
        Path("garbage").write_bytes(b"\x00garbage\xff" * 99)
        Path("empty.db").touch()
        os.mkfifo("pipe.db")
        Path("loop.db").symlink_to("loop.db")
        Path("dangling.db").symlink_to("nowhere/at.all")
        Path("link.db").symlink_to("events.db")
        with sqlite3.connect("theirs.db") as theirs:
            theirs.execute("CREATE TABLE t (a)")
        theirs.close()

    def draw(self, rng: random.Random) -> Input:
        there = (
            b"events.db",
            b"folder.db",
            b"garbage",
            b"empty.db",
            b"loop.db",
            b"dangling.db",
            b"link.db",
            b"theirs.db",
        )
        log = (
            b"events-log",
            b"events-log/registry.log",
            b"events-log/lanes",
            b"events-backups",
            b"events-log/store.lock",
        )
        name = rng.choice((rng.choice(NAMES), rng.choice(there), rng.choice(log), b"events.db"))
        if rng.random() < 0.2:
            name = rng.choice((b"garbage/", b"folder.db/", b"loop.db/", b"./", b"new/")) + name
        return Input(name, False, (rng.randrange(len(_COMMANDS)), rng.getrandbits(32)))

    def feed(self, given: Input) -> bool:
        rng = random.Random(given.numbers[1])
        self._prepare(rng)
        path = os.fsdecode(given.data)
        if rng.random() < 0.5:
            path = f"{self._folder}/{path}"
        arguments = [path if each == "P" else each for each in _COMMANDS[given.numbers[0]]]
        done = CliRunner().invoke(main, arguments)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise BrokenPromiseError(f"{arguments} ends in a traceback") from done.exception
        if done.exit_code not in (0, 1, 2):
            raise BrokenPromiseError(f"{arguments} exits with {done.exit_code}")
        return done.exit_code == 0

    def close(self) -> None:
        os.chdir("/")
        shutil.rmtree(self._home)


SETTING_TARGETS: Final[tuple[type[Target], ...]] = (EnvironmentTarget, PathsTarget)
