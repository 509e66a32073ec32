"""The store snippets of the original's documentation run as written, apart from the import lines."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from logstore import EventStoreConfig, EventStoreManager, PersistentEventStore, get_config

BASIC_USE = """
from event_store import create_event_store
from event_store_config import get_config

# Получаем конфигурацию
config = get_config("production")

# Создаем хранилище
store = create_event_store(
    persistent=config.persistent,
    db_path=config.db_path,
    max_events_per_stream=config.max_events_per_stream
)

# Сохраняем событие
event_id = await store.store_event("stream_1", {
    "method": "tools/call",
    "params": {"name": "calculator", "args": {"a": 5, "b": 3}}
})

# Переигрываем события после определенного ID
async def handle_event(event_message):
    print(f"Событие: {event_message.message}")

await store.replay_events_after(last_event_id, handle_event)
"""

PRESETS = """
from event_store_config import get_config

# Для разработки (in-memory)
config = get_config("development")

# Для тестирования (SQLite в памяти)
config = get_config("testing")

# Для продакшена (файловая SQLite)
config = get_config("production")

# Из переменных окружения
config = get_config("from_env")
"""

ENVIRONMENT = """
EVENT_STORE_PERSISTENT=true
EVENT_STORE_DB_PATH=InternalStorage/events.db
EVENT_STORE_MAX_EVENTS=1000
EVENT_STORE_RETENTION_DAYS=30
EVENT_STORE_CACHE_SIZE=100
EVENT_STORE_BACKUP_ENABLED=true
EVENT_STORE_BACKUP_INTERVAL=24
EVENT_STORE_BACKUP_RETENTION=7
"""

STATISTICS = """
# Базовая статистика
stats = store.get_stream_stats()
print(f"Потоки: {stats}")

# Детальная статистика (для PersistentEventStore)
db_info = store.get_database_info()
print(f"Размер БД: {db_info['database_size_mb']} MB")
"""

MANAGER = """
from event_store_migrations import EventStoreManager

manager = EventStoreManager("InternalStorage/events.db")

# Создать бэкап
backup_path = manager.create_backup()

# Восстановить из бэкапа
manager.restore_from_backup("path/to/backup.db")

# Очистить старые бэкапы
deleted_count = manager.cleanup_old_backups(retention_days=7)

# Расширенная статистика
detailed_stats = manager.get_database_stats()
"""

VALIDATION = """
validation = manager.validate_database()

if validation['valid']:
    print("✅ База данных валидна")
else:
    print("❌ Ошибки:")
    for error in validation['errors']:
        print(f"  - {error}")
"""

TRANSFER = """
# Экспорт всех событий
count = manager.export_events("backup.json")

# Экспорт с фильтрацией
count = manager.export_events(
    "filtered.json",
    stream_id="specific_stream",
    start_date="2024-01-01T00:00:00",
    end_date="2024-12-31T23:59:59"
)

# Импорт событий
count = manager.import_events("backup.json")
"""

MAINTENANCE = """
from event_store_migrations import run_maintenance_tasks

# Запуск задач обслуживания
results = await run_maintenance_tasks(
    "InternalStorage/events.db",
    config.__dict__
)

print(f"Результаты: {results}")
"""

TESTING = """
config = get_config("testing")  # SQLite в памяти
store = create_event_store(**config.__dict__)
"""


@pytest.fixture
async def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[dict[str, Any]]:
    """What the snippets find defined, in an empty working folder; the stores they make are closed."""
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    yield found
    if "store" in found:
        await found["store"].close()


async def run(snippet: str, names: dict[str, Any]) -> None:
    ours = re.sub(r"^from event_store\w* import", "from logstore import", snippet, flags=re.MULTILINE)
    code = compile(ours, "original", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, names)
    if inspect.isawaitable(result):
        await result


@pytest.mark.promise("original-api")
async def test_basic_use(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    async with PersistentEventStore("InternalStorage/events.db") as earlier:
        names["last_event_id"] = await earlier.store_event("stream_1", {"method": "seen"})
    await run(BASIC_USE, names)
    message = {"method": "tools/call", "params": {"name": "calculator", "args": {"a": 5, "b": 3}}}
    assert capsys.readouterr().out == f"Событие: {message}\n"
    assert int(names["event_id"]) > int(names["last_event_id"])


async def test_presets(names: dict[str, Any]) -> None:
    await run(PRESETS, names)
    assert isinstance(names["config"], EventStoreConfig)


async def test_environment(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EVENT_STORE_")]:
        monkeypatch.delenv(name)
    for line in ENVIRONMENT.split():
        monkeypatch.setenv(*line.split("=", 1))
    await run(PRESETS, names)
    assert names["config"] == EventStoreConfig(backup_enabled=True)


@pytest.mark.promise("original-api")
async def test_statistics(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    names["last_event_id"] = "1"
    await run(BASIC_USE, names)
    await run(STATISTICS, names)
    printed = capsys.readouterr().out
    assert "'stream_1': {'events': 1," in printed
    assert re.search(r"Размер БД: 0\.\d+ MB", printed)


async def test_testing(names: dict[str, Any]) -> None:
    await run(PRESETS.splitlines()[1] + "\nfrom event_store import create_event_store\n" + TESTING, names)
    event_id = await names["store"].store_event("s", {"method": "m"})
    assert event_id.isdigit()
    assert names["store"].get_database_info()["database_path"] != ":memory:"


def events_in(export: str) -> list[Any]:
    events: list[Any] = json.loads(Path(export).read_text())["events"]
    return events


def damage_a_segment() -> Path:
    (segment,) = Path("InternalStorage/events-log/segments").iterdir()
    segment.write_bytes(segment.read_bytes()[:-1] + b"?")
    return segment


async def filled(names: dict[str, Any]) -> None:
    """Run the snippet that makes a manager, over a store with events and a backup where the snippet looks for one."""
    async with PersistentEventStore("InternalStorage/events.db") as store:
        await store.store_events([("stream_1", {"method": f"m{number}"}) for number in range(5)])
    await run(MANAGER.replace('"path/to/backup.db"', "backup_path"), names)


@pytest.mark.promise("original-api")
async def test_the_manager(names: dict[str, Any]) -> None:
    await filled(names)
    assert names["backup_path"].startswith("InternalStorage/events-backups/")
    assert names["deleted_count"] == 0
    assert names["detailed_stats"]["total_events"] == 5
    async with PersistentEventStore("InternalStorage/events.db") as store:
        assert store.get_stream_stats()["stream_1"]["events"] == 5


@pytest.mark.promise("original-api")
async def test_validation(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    await filled(names)
    await run(VALIDATION, names)
    assert capsys.readouterr().out == "✅ База данных валидна\n"
    segment = damage_a_segment()
    await run(VALIDATION, names)
    printed = capsys.readouterr().out
    assert printed.startswith("❌ Ошибки:\n  - ")
    assert str(segment) in printed


@pytest.mark.promise("original-api")
async def test_export_and_import(names: dict[str, Any]) -> None:
    await filled(names)
    await run(TRANSFER, names)
    assert names["count"] == 0
    assert len(events_in("backup.json")) == 5
    assert events_in("filtered.json") == []
    names["manager"] = EventStoreManager("elsewhere/events.db")
    assert names["manager"].import_events("backup.json") == 5


@pytest.mark.promise("original-api")
async def test_maintenance(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    await filled(names)
    names["config"] = get_config("production")
    await run(MAINTENANCE, names)
    assert names["results"]["validation"]["valid"]
    assert set(names["results"]) == {"retention", "backup", "rotation", "validation"}
    assert "skipped" in names["results"]["backup"]
    assert capsys.readouterr().out.startswith("Результаты: {")
