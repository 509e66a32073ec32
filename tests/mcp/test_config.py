"""Settings: presets, the environment, and errors that name what is wrong and what is allowed."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from logstore import EventStoreConfig, InMemoryEventStore, PersistentEventStore, create_event_store, get_config
from logstore.config import EngineSettings, EventStoreSettings
from logstore.errors import ConfigurationError

VARIABLES = {
    "EVENT_STORE_PERSISTENT": ("persistent", "false", False),
    "EVENT_STORE_DB_PATH": ("db_path", "/var/lib/events.db", "/var/lib/events.db"),
    "EVENT_STORE_MAX_EVENTS": ("max_events_per_stream", "5", 5),
    "EVENT_STORE_RETENTION_DAYS": ("retention_days", "6", 6),
    "EVENT_STORE_MAX_BYTES": ("max_bytes", "1000000", 1_000_000),
    "EVENT_STORE_CACHE_SIZE": ("memory_cache_size", "7", 7),
    "EVENT_STORE_CACHE_BYTES": ("memory_cache_bytes", "2000000", 2_000_000),
    "EVENT_STORE_BACKUP_ENABLED": ("backup_enabled", "No", False),
    "EVENT_STORE_BACKUP_INTERVAL": ("backup_interval_hours", " 8 ", 8),
    "EVENT_STORE_BACKUP_RETENTION": ("backup_retention_days", "9", 9),
    "EVENT_STORE_MAINTENANCE_INTERVAL": ("maintenance_interval_s", "12.5", 12.5),
    "EVENT_STORE_DURABILITY": ("durability", "Interval", "interval"),
    "EVENT_STORE_SYNC_INTERVAL": ("sync_interval_s", "0.5", 0.5),
    "EVENT_STORE_ON_WRITE_FAILURE": ("on_write_failure", "raise", "raise"),
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("EVENT_STORE_"):
            monkeypatch.delenv(name)


def test_the_presets_are_what_their_names_say() -> None:
    assert not get_config("development").persistent
    testing = get_config("testing")
    assert testing.persistent
    assert testing.db_path == ":memory:"
    production = get_config("production")
    assert (production.persistent, production.db_path) == (True, "InternalStorage/events.db")
    assert (production.durability, production.backup_enabled) == ("always", True)


def test_an_empty_environment_is_production() -> None:
    config = get_config("from_env")
    assert config == get_config("production")
    assert (config.max_events_per_stream, config.retention_days, config.memory_cache_size) == (1000, 30, 100)
    assert (config.backup_interval_hours, config.backup_retention_days) == (24, 7)


def test_every_setting_has_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, (_, text, _) in VARIABLES.items():
        monkeypatch.setenv(variable, text)
    assert dataclasses.asdict(get_config("from_env")) == {field: value for field, _, value in VARIABLES.values()}


@pytest.mark.promise("settings-named")
@pytest.mark.parametrize(
    ("variable", "text", "allowed"),
    [
        ("EVENT_STORE_PERSISTENT", "maybe", "a boolean (true, 1, yes, on; false, 0, no, off)"),
        ("EVENT_STORE_DB_PATH", "", "the path of a file"),
        ("EVENT_STORE_MAX_EVENTS", "many", "a whole number of events, 1 to"),
        ("EVENT_STORE_MAX_EVENTS", "0", "1 to"),
        ("EVENT_STORE_MAX_EVENTS", "1.5", "a whole number"),
        ("EVENT_STORE_RETENTION_DAYS", "-1", "a whole number of days, 1 to"),
        ("EVENT_STORE_MAX_BYTES", "-1", "a whole number of bytes, 0 to"),
        ("EVENT_STORE_CACHE_SIZE", "-1", "0 to"),
        ("EVENT_STORE_CACHE_BYTES", "10", "a whole number of bytes, 1048576 to"),
        ("EVENT_STORE_BACKUP_INTERVAL", "0", "a whole number of hours"),
        # More than a date, an integer of SQLite's or a wait can be.
        ("EVENT_STORE_RETENTION_DAYS", "36501", "1 to 36500"),
        ("EVENT_STORE_BACKUP_RETENTION", "999999999", "1 to 36500"),
        ("EVENT_STORE_BACKUP_INTERVAL", "9223372036854775808", "1 to 876000"),
        ("EVENT_STORE_MAX_EVENTS", "9" * 30, "1 to 1000000000000000"),
        ("EVENT_STORE_MAINTENANCE_INTERVAL", "1e308", "0.001 to"),
        ("EVENT_STORE_DURABILITY", "sometimes", "one of always, interval, os"),
        ("EVENT_STORE_SYNC_INTERVAL", "nan", "a number of seconds, 0.001 to"),
        ("EVENT_STORE_ON_WRITE_FAILURE", "ignore", "one of degrade, raise"),
    ],
)
def test_a_bad_variable_is_named_with_its_value_and_what_is_allowed(
    variable: str, text: str, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigurationError) as caught:
        get_config("from_env")
    for words in (variable, repr(text), allowed):
        assert words in str(caught.value)


@pytest.mark.promise("settings-named")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("persistent", "yes"),
        ("persistent", 1),
        ("db_path", ""),
        ("db_path", 7),
        ("db_path", "a\0b"),
        ("max_events_per_stream", True),
        ("max_events_per_stream", 0),
        ("max_events_per_stream", "5"),
        ("retention_days", 1.5),
        ("memory_cache_bytes", 0),
        ("durability", None),
        ("sync_interval_s", 0),
        ("sync_interval_s", float("inf")),
        ("retention_days", 10**100),
    ],
)
def test_a_bad_field_is_named_with_its_value(field: str, value: Any) -> None:
    settings: dict[str, Any] = {field: value}
    for make in (EventStoreConfig, create_event_store):
        with pytest.raises(ConfigurationError, match=f"{field} must be") as caught:
            make(**settings)
        assert repr(value) in str(caught.value)


def test_a_value_that_cannot_be_shown_or_not_whole_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="not a number of too many digits"):
        EventStoreConfig(max_bytes=10**5_000)
    monkeypatch.setenv("EVENT_STORE_MAX_BYTES", "9" * 100_000)
    with pytest.raises(ConfigurationError) as caught:
        get_config("from_env")
    assert len(str(caught.value)) < 1_000


@pytest.mark.promise("settings-named")
def test_an_unknown_preset_names_the_others() -> None:
    with pytest.raises(ConfigurationError, match="'staging'; there are development, testing, production, from_env"):
        get_config("staging")


@pytest.mark.promise("settings-named")
def test_an_unknown_keyword_names_the_others() -> None:
    settings: dict[str, Any] = {"max_event_per_stream": 5}
    with pytest.raises(
        ConfigurationError, match=r"unknown setting max_event_per_stream; there are persistent, db_path"
    ):
        create_event_store(**settings)


def test_the_config_is_frozen_and_passes_as_keywords() -> None:
    config = EventStoreConfig(db_path="x.db", durability="os")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.persistent = False  # type: ignore[misc]
    store = create_event_store(**config.__dict__)
    assert isinstance(store, PersistentEventStore)
    assert store.config == config
    assert isinstance(create_event_store(**get_config("development").__dict__), InMemoryEventStore)
    assert isinstance(create_event_store(db_path=Path("x.db")), PersistentEventStore)


def test_the_keywords_of_the_factory_are_the_fields_of_the_config() -> None:
    fields = [field.name for field in dataclasses.fields(EventStoreConfig)]
    assert set(EventStoreSettings.__annotations__) == set(fields)
    assert set(EngineSettings.__annotations__) == set(fields) - {"persistent", "db_path"}
    assert [field for field, _, _ in VARIABLES.values()] == fields


def test_the_engine_gets_its_part() -> None:
    options = EventStoreConfig(
        durability="interval", sync_interval_s=0.2, memory_cache_bytes=1 << 21, memory_cache_size=5
    ).log_options()
    assert (options.durability, options.sync_interval_s) == ("interval", 0.2)
    assert (options.memory_bytes, options.cached_events_per_stream) == (1 << 21, 5)


def test_making_a_store_touches_nothing(tmp_path: Path) -> None:
    create_event_store(db_path=tmp_path / "deep" / "events.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise("mcp-loaded-lazily")
def test_settings_load_without_the_sdk() -> None:
    code = (
        "import sys, logstore.config; sys.exit(bool({'mcp', 'mcp_types', 'pydantic', 'starlette'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
