"""The campaign of the SDK's own client: that it runs, finds nothing, and would find what is there."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from mcp_types import CallToolResult, TextContent

import crash
from crash_kill import BrokenPromiseError
from crash_resume import ResumeCampaign
from crash_sdk_client import Plan, SdkRun
from tests.mcp.rig import DEADLINE_S, Workers
from tests.mcp.rig_balancer import Balancer
from tests.mcp.rig_client import BrokenRuleError
from tests.mcp.rig_sdk_client import WatchedCall, sdk_client


@pytest.mark.slow
def test_the_sdk_s_client_gets_exact_results_while_its_connections_break_and_workers_are_restarted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--calls", "16", "--clients", "4", "--workers", "3")
    status = crash.main(["sdk", *sizes, "--seed", "5", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert status == 0, said
    figures = {label: figure for figure, _, label in (line.strip().partition("  ") for line in said.splitlines())}
    assert figures["calls"] == "16"
    for label in (
        "calls with one abrupt cut",
        "calls with several clean ends",
        "resumes on another worker than before",
    ):
        assert int(figures[label]) > 0


def test_the_campaign_fails_where_the_layer_is_missing(tmp_path: Path) -> None:
    campaign = ResumeCampaign(tmp_path, 1, calls=4, clients=2, workers=2, begin=SdkRun, bare=True)
    with pytest.raises(BrokenPromiseError, match=r"^client.* (got|ended with) .*MCPError"):
        campaign.run(0)
    assert campaign.figures["calls"] == 0


async def test_a_report_that_the_client_hears_twice_is_seen(tmp_path: Path) -> None:
    async with (
        asyncio.timeout(DEADLINE_S),
        Workers.running(tmp_path / "events.db", 2, retry_interval=20) as workers,
        Balancer.over(workers.ports) as balancer,
        sdk_client(balancer) as (client, wire),
    ):
        call = wire.begin("n")
        calling = asyncio.create_task(client.call_tool("count", {"to": 6, "label": "n"}, progress_callback=call.hear))
        # One abrupt cut more than the client gets over: after a broken resume it asks again with the old id.
        for responses, steps in ((1, 2), (2, 4)):
            workers.conductor.allow("n", 2)
            await wire.reached(carriers=responses, ids=1 + steps)
            broken = call.carriers[-1].connection
            assert await balancer.cut(where=lambda each: each is broken)  # noqa: B023
        workers.conductor.allow_all("n")
        result = await calling
    with pytest.raises(BrokenRuleError, match=r"of 6 reports these came: .*'n 3', 'n 4', 'n 3', 'n 4', 'n 5'"):
        call.check(6, result)


def result_of(text: str, *, failed: bool = False) -> CallToolResult:
    return CallToolResult(content=[TextContent(type="text", text=text)], is_error=failed)


EXACT = result_of("n counted to 3")


def test_what_came_once_and_in_order_is_exact() -> None:
    WatchedCall("n", ids=["9", "10", "11", "12", "13"], reports=["n 1", "n 2", "n 3"]).check(3, EXACT)


@pytest.mark.parametrize(
    ("reports", "ids", "result", "why"),
    [
        ("1 3", "9 10 11 12", EXACT, "these came"),
        ("1 2", "9 10 11 12", EXACT, "these came"),
        ("1 2 2 3", "9 10 11 12 13", EXACT, "these came"),
        ("1 3 2", "9 10 11 12 13", EXACT, "these came"),
        ("1 2 3 4", "9 10 11 12 13", EXACT, "these came"),
        ("1 2 3", "9 10 11 12 12", EXACT, "these events"),
        ("1 2 3", "9 10 12 11 13", EXACT, "these events"),
        ("1 2 3", "9 10 11 12", EXACT, "4 events"),
        ("1 2 3", "9 10 11 12 13 14", EXACT, "6 events"),
        ("1 2 3", "9 10 11 12 13", result_of("n counted to 4"), "the result"),
        ("1 2 3", "9 10 11 12 13", result_of("m counted to 3"), "the result"),
        ("1 2 3", "9 10 11 12 13", result_of("n counted to 3", failed=True), "the result"),
        ("1 2 3", "9 10 11 12 13", CallToolResult(content=[]), "the result"),
    ],
)
def test_an_account_that_is_wrong_is_seen(reports: str, ids: str, result: CallToolResult, why: str) -> None:
    call = WatchedCall("n", ids=ids.split(), reports=[f"n {step}" for step in reports.split()])
    with pytest.raises(BrokenRuleError, match=why):
        call.check(3, result)


def test_a_report_of_another_call_is_seen() -> None:
    call = WatchedCall("n", ids=["9", "10", "11"], reports=["m 1"])
    with pytest.raises(BrokenRuleError, match="these came"):
        call.check(1, result_of("n counted to 1"))


@pytest.mark.parametrize("seed", range(50))
def test_every_plan_is_within_the_limits_of_the_client(seed: int) -> None:
    plan = Plan.drawn(random.Random(seed))
    # One abrupt cut, or clean ends only.
    assert len(plan.cuts) == 1 or {cut.how for cut in plan.cuts} == {"clean"}
    allowed, seen = 0, 1
    for cut in plan.cuts:
        allowed += cut.steps
        # After the first id, and never waiting for an event that may not come.
        assert seen <= cut.ids <= 1 + allowed
        seen = cut.ids
    assert allowed <= plan.steps
