"""Settings of an event store: one object, four presets, and the environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypedDict, get_args

from logstore.errors import ConfigurationError
from logstore.storage.options import MIB, Durability, LogOptions, Retention, WriteFailurePolicy

_DAY_S: Final = 86_400
_LONGEST_SHOWN: Final = 200
_MOST_DAYS: Final = 36_500
_MOST: Final = 10**15
"""Bounds that nobody reaches, and that dates and SQLite can be asked for."""
DEFAULT_DB_PATH: Final = "InternalStorage/events.db"
MEMORY_DB_PATH: Final = ":memory:"
"""A persistent store in a private folder that is made at first use and removed at close or exit."""


@dataclass(frozen=True)
class EventStoreConfig:
    """Settings of an event store.

    Attributes:
        persistent: Whether events are kept on disk.
        db_path: The SQLite catalogue; the log stands beside it in `<stem>-log/`. `:memory:` leaves nothing behind.
        max_events_per_stream: Events of a stream that are kept; those of the last ten minutes stay beyond that, and so
            does the stream of a request without its answer.
        retention_days: Age at which events go.
        max_bytes: Bytes of segments that are kept, with the same exceptions; 0 for no bound.
        memory_cache_size: Newest events of a stream that stay in memory.
        memory_cache_bytes: Budget for all events in memory.
        backup_enabled: Whether backups are made on a schedule.
        backup_interval_hours: Time between two of them.
        backup_retention_days: Age at which backups go; the newest stays.
        maintenance_interval_s: Time between two looks at what is to be dropped, compacted, backed up and scrubbed.
        durability: What an event id in hand means: `always`, on disk; `interval`, written, and synced every
            `sync_interval_s`; `os`, written.
        sync_interval_s: See `durability`.
        on_write_failure: While the disk fails, `degrade` serves from memory and says so; `raise` raises.
    """

    persistent: bool = True
    db_path: str | os.PathLike[str] = DEFAULT_DB_PATH
    max_events_per_stream: int = 1000
    retention_days: int = 30
    max_bytes: int = 0
    memory_cache_size: int = 100
    memory_cache_bytes: int = 100 * MIB
    backup_enabled: bool = False
    backup_interval_hours: int = 24
    backup_retention_days: int = 7
    maintenance_interval_s: float = 60.0
    durability: Durability = "always"
    sync_interval_s: float = 0.1
    on_write_failure: WriteFailurePolicy = "degrade"

    def __post_init__(self) -> None:
        """Refuse what could not work, naming the field and what is allowed."""
        for name, setting in _SETTINGS.items():
            value = getattr(self, name)
            if not setting.accepts(value):
                raise ConfigurationError(f"{name} must be {setting.allowed}, not {_shown(value)}")

    def log_options(self) -> LogOptions:
        """Return what the log engine needs of these settings."""
        return LogOptions(
            durability=self.durability,
            on_write_failure=self.on_write_failure,
            sync_interval_s=self.sync_interval_s,
            memory_bytes=self.memory_cache_bytes,
            cached_events_per_stream=min(self.memory_cache_size, self.max_events_per_stream),
            retention=self.retention(),
        )

    def retention(self) -> Retention:
        """Return what is kept."""
        return Retention(
            max_age_s=self.retention_days * _DAY_S,
            max_events=self.max_events_per_stream,
            max_bytes=self.max_bytes or None,
        )


class EngineSettings(TypedDict, total=False):
    """The keywords that both stores take; see `EventStoreConfig`."""

    max_events_per_stream: int
    retention_days: int
    max_bytes: int
    memory_cache_size: int
    memory_cache_bytes: int
    backup_enabled: bool
    backup_interval_hours: int
    backup_retention_days: int
    maintenance_interval_s: float
    durability: Durability
    sync_interval_s: float
    on_write_failure: WriteFailurePolicy


class EventStoreSettings(EngineSettings, total=False):
    """The keywords that `create_event_store` takes; see `EventStoreConfig`."""

    persistent: bool
    db_path: str | os.PathLike[str]


class _Setting(NamedTuple):
    """One setting: its environment variable, the text it is read from, and what is allowed."""

    variable: str
    parse: Callable[[str], object]
    accepts: Callable[[Any], bool]
    allowed: str


def _parse_switch(text: str) -> bool:
    return {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}[
        text.lower()
    ]


def _switch(variable: str) -> _Setting:
    return _Setting(
        variable, _parse_switch, lambda value: type(value) is bool, "a boolean (true, 1, yes, on; false, 0, no, off)"
    )


def _whole(variable: str, least: int, unit: str, most: int = _MOST) -> _Setting:
    return _Setting(
        variable,
        int,
        lambda value: type(value) is int and least <= value <= most,
        f"a whole number of {unit}, {least} to {most}",
    )


def _seconds(variable: str) -> _Setting:
    return _Setting(
        variable,
        float,
        lambda value: type(value) in (int, float) and 0.001 <= value <= _MOST_DAYS * _DAY_S,
        f"a number of seconds, 0.001 to {_MOST_DAYS * _DAY_S}",
    )


def _shown(value: object) -> str:
    try:
        shown = repr(value)
    except ValueError:
        # Python writes out no integer of some thousands of digits.
        return "a number of too many digits"
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}…"


def _is_path(value: object) -> bool:
    return isinstance(value, str) and value != "" and "\0" not in value


def _choice(variable: str, values: tuple[str, ...]) -> _Setting:
    return _Setting(variable, str.lower, lambda value: value in values, f"one of {', '.join(values)}")


_SETTINGS: Final[Mapping[str, _Setting]] = {
    "persistent": _switch("EVENT_STORE_PERSISTENT"),
    "db_path": _Setting(
        "EVENT_STORE_DB_PATH",
        str,
        lambda value: isinstance(value, (str, os.PathLike)) and _is_path(os.fspath(value)),
        "the path of a file, or :memory:",
    ),
    "max_events_per_stream": _whole("EVENT_STORE_MAX_EVENTS", 1, "events"),
    "retention_days": _whole("EVENT_STORE_RETENTION_DAYS", 1, "days", _MOST_DAYS),
    "max_bytes": _whole("EVENT_STORE_MAX_BYTES", 0, "bytes"),
    "memory_cache_size": _whole("EVENT_STORE_CACHE_SIZE", 0, "events"),
    "memory_cache_bytes": _whole("EVENT_STORE_CACHE_BYTES", MIB, "bytes"),
    "backup_enabled": _switch("EVENT_STORE_BACKUP_ENABLED"),
    "backup_interval_hours": _whole("EVENT_STORE_BACKUP_INTERVAL", 1, "hours", 24 * _MOST_DAYS),
    "backup_retention_days": _whole("EVENT_STORE_BACKUP_RETENTION", 1, "days", _MOST_DAYS),
    "durability": _choice("EVENT_STORE_DURABILITY", get_args(Durability)),
    "maintenance_interval_s": _seconds("EVENT_STORE_MAINTENANCE_INTERVAL"),
    "sync_interval_s": _seconds("EVENT_STORE_SYNC_INTERVAL"),
    "on_write_failure": _choice("EVENT_STORE_ON_WRITE_FAILURE", get_args(WriteFailurePolicy)),
}

_PRESETS: Final[Mapping[str, EventStoreSettings]] = {
    "development": {"persistent": False},
    # Nothing survives the process, so nothing needs to be on disk before it is acknowledged.
    "testing": {"db_path": MEMORY_DB_PATH, "durability": "os"},
    "production": {"backup_enabled": True},
}


def get_config(name: str) -> EventStoreConfig:
    """Return the settings of a preset.

    Args:
        name: `development` (in memory), `testing` (persistent, leaves nothing behind), `production` (on disk, with
            backups), or `from_env` (like `production`, but for what `EVENT_STORE_…` variables say).

    Raises:
        ConfigurationError: The name is unknown, or a variable has a value that is not allowed.
    """
    if name == "from_env":
        return _config_from(os.environ)
    if name not in _PRESETS:
        raise ConfigurationError(f"unknown configuration {name!r}; there are {', '.join([*_PRESETS, 'from_env'])}")
    return config_of(_PRESETS[name])


def config_of(settings: Mapping[str, Any]) -> EventStoreConfig:
    """Return the configuration that the keywords of a call describe.

    Raises:
        ConfigurationError: A keyword is unknown, or has a value that is not allowed.
    """
    unknown = sorted(set(settings) - set(_SETTINGS))
    if unknown:
        raise ConfigurationError(f"unknown setting {', '.join(unknown)}; there are {', '.join(_SETTINGS)}")
    return EventStoreConfig(**settings)


def _config_from(environment: Mapping[str, str]) -> EventStoreConfig:
    found: dict[str, Any] = dict(_PRESETS["production"])
    for name, setting in _SETTINGS.items():
        text = environment.get(setting.variable)
        if text is None:
            continue
        try:
            value = setting.parse(text.strip())
        except (ValueError, KeyError):
            value = None
        if not setting.accepts(value):
            raise ConfigurationError(f"{setting.variable} must be {setting.allowed}, not {_shown(text)}")
        found[name] = value
    return config_of(found)
