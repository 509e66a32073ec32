"""The catalogue in other tools: the documented commands run, and Datasette's metadata fits the tables."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from logstore.storage import Log
from tests.engine import in_segments, small

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "logstore" / "docs"
METADATA = DOCS / "datasette.yaml"


@pytest.fixture
async def folder(tmp_path: Path) -> Path:
    """A folder with a store where the documentation has it; a session that has ended, and one that has not."""
    path = tmp_path / "InternalStorage" / "events.db"
    async with Log(path, small()) as log:
        await log.append_many([("my-stream", b'{"n": 1}', 0), ("token/1", b"{}", 0), ("token/2", b"{}", 0)])
        await log.sessions.open("open", b"", "token/")
        await log.sessions.open("ended", b"", "other/")
        await log.sessions.end("ended")
        await log.append("my-stream", b'{"n": 2}')
        await in_segments(log)
    return tmp_path


def run(command: str, folder: Path) -> str:
    """Run a line as a shell does, with the commands of this Python."""
    command = re.sub(r"^logstore\b", f"{sys.executable} -m logstore", command)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sh", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def documented() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / "inspecting.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.promise("open-to-other-tools", "documented-commands")
@pytest.mark.slow
async def test_every_documented_command_runs(folder: Path) -> None:
    commands = documented()
    assert {command.split()[0] for command in commands} == {"logstore", "sqlite-utils", "datasette"}
    for command in commands:
        # Instead of serving, Datasette answers one request.
        serving = command.startswith("datasette")
        output = run(f"{command} --get /events/stream_summary.json?_shape=array" if serving else command, folder)
        if serving:
            assert {row["name"] for row in json.loads(output)} == {"my-stream", "token/1", "token/2"}
        assert output or "> datasette.yaml" in command


ASK = """
import asyncio, json, sys
from datasette.app import Datasette
from datasette.utils import parse_metadata

async def main(database, metadata, *paths):
    with open(metadata) as file:
        site = Datasette([database], metadata=parse_metadata(file.read()))
    print(json.dumps({path: (await site.client.get(path)).text for path in paths}))

asyncio.run(main(*sys.argv[1:]))
"""


def pages(folder: Path, *paths: str) -> dict[str, str]:
    """Return what Datasette answers; in a process of its own, whose warnings are not ours."""
    database = folder / "InternalStorage" / "events.db"
    arguments = [sys.executable, "-c", ASK, str(database), str(METADATA), *paths]
    found: dict[str, str] = json.loads(subprocess.check_output(arguments, text=True, timeout=60))
    return found


def described(folder: Path) -> dict[str, Any]:
    (answer,) = pages(folder, "/-/metadata.json").values()
    tables: dict[str, Any] = json.loads(answer)["databases"]["events"]["tables"]
    return tables


@pytest.mark.promise("open-to-other-tools")
async def test_datasette_shows_every_page_with_its_explanation(folder: Path) -> None:
    metadata = described(folder)
    shown = pages(folder, *(f"/events/{name}" for name in metadata))
    for name, table in metadata.items():
        assert table.get("description", "").split("`")[0] in shown[f"/events/{name}"]
        assert table.get("hidden") or table["title"] in shown[f"/events/{name}"]


async def test_the_metadata_names_every_table_and_no_column_that_is_not_there(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "InternalStorage" / "events.db")) as database:
        there = {
            name: {column for _, column, *_ in database.execute(f"SELECT * FROM pragma_table_info('{name}')")}
            for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
            if not name.startswith("sqlite_")
        }
    tables = described(folder)
    assert tables.keys() == there.keys()
    for name, table in tables.items():
        named = {*table.get("columns", {}), *table.get("units", {}), *table.get("facets", [])}
        named |= {table[key] for key in ("sort", "sort_desc", "label_column") if key in table}
        assert named <= there[name], name
        if name.endswith(("_summary", "_health")):
            assert there[name] - {"stream_id"} == set(table["columns"]), name


async def rows(path: Path, view: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(path)) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(f"SELECT * FROM {view}")]


async def test_the_views_tell_sizes_and_ages(folder: Path) -> None:
    path = folder / "InternalStorage" / "events.db"
    streams = {row["name"]: row for row in await rows(path, "stream_summary")}
    assert {name: row["events"] for name, row in streams.items()} == {"my-stream": 2, "token/1": 1, "token/2": 1}
    assert all(0 <= row["age_s"] < 600 for row in streams.values())
    segments = await rows(path, "segment_health")
    assert {row["live_percent"] for row in segments} == {100.0}
    assert sum(row["live_bytes"] for row in segments) == sum(row["bytes"] for row in streams.values())
    sessions = {row["session_hash"]: row for row in await rows(path, "session_summary")}
    assert (sessions["open"]["state"], sessions["open"]["streams"], sessions["open"]["events"]) == ("open", 2, 2)
    assert (sessions["ended"]["state"], sessions["ended"]["streams"]) == ("ended", 0)
    (store,) = await rows(path, "store_summary")
    assert (store["streams"], store["events"], store["open_sessions"], store["ended_sessions"]) == (3, 4, 1, 1)


async def test_a_catalogue_of_an_earlier_release_gets_the_views_anew(folder: Path) -> None:
    path = folder / "InternalStorage" / "events.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DROP VIEW session_summary")
        database.execute("DROP VIEW stream_summary")
        database.execute("CREATE VIEW stream_summary AS SELECT 1 AS outdated")
        database.execute("DELETE FROM _sqlite_migrations WHERE name = '0003_views'")
    async with Log(path):
        pass
    assert len(await rows(path, "stream_summary")) == 3
    assert len(await rows(path, "session_summary")) == 2
