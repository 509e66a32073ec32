"""A slice of the damage campaign, and that it sees what it is to see."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

import crash_damage
from crash_damage import DamageCampaign
from crash_kill import BrokenPromiseError


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DamageCampaign]:
    logger = logging.getLogger("logstore")
    before = logger.level
    campaign = DamageCampaign(tmp_path_factory.mktemp("campaign"), seed=7)
    yield campaign
    campaign.finish()
    logger.setLevel(before)


def run_some(campaign: DamageCampaign, count: int) -> None:
    for number in range(count):
        campaign.run(number)


@pytest.mark.promise("nothing-wrong-is-served", "verify-finds-all", "damage-no-traceback")
def test_damages_are_reported_and_nothing_wrong_is_served(campaign: DamageCampaign) -> None:
    run_some(campaign, 25)
    assert campaign.figures["changed content and were reported"] == campaign.figures["changed content"] > 10


@pytest.mark.promise("verify-finds-all")
def test_it_sees_damage_that_is_not_reported(campaign: DamageCampaign, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DamageCampaign, "_verify", lambda *_, **__: ([], None))
    with pytest.raises(BrokenPromiseError, match="verify is content with"):
        run_some(campaign, 20)


def test_it_sees_an_event_that_was_never_stored(campaign: DamageCampaign) -> None:
    stream, events = next(iter(campaign.events.items()))
    wrong = [(events[0][0], events[0][1], b"other bytes"), *events[1:]]
    campaign.compare({stream: events})
    with pytest.raises(BrokenPromiseError, match="never there"):
        campaign.compare({stream: wrong})
    with pytest.raises(BrokenPromiseError, match="after"):
        campaign.compare({stream: [events[1], events[0]]})


def test_what_hangs_is_ended(campaign: DamageCampaign, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crash_damage, "RUN_S", 1)

    def hang(*_: object, **__: object) -> None:
        while True:
            pass

    monkeypatch.setattr(DamageCampaign, "_verify", hang)
    with pytest.raises(BrokenPromiseError, match="not done within"):
        campaign.run(0)
