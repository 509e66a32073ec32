"""The client: the SDK's own, calling the server's tool."""

from __future__ import annotations

from itertools import zip_longest

from mcp import ClientSession, MCPError
from mcp.shared.message import ClientMessageMetadata
from mcp_types import CallToolRequest, CallToolRequestParams, CallToolResult, TextContent

from logstore.cli.demo.account import Entry
from logstore.cli.demo.growing import Growing, StandstillError

TOOL = "count"


class Caller:
    """One call of the tool, and what reached the client of it.

    Attributes:
        event_ids: Ids in the order in which they came; the first one is that of the priming event, which says nothing.
        texts: What the progress reports and the result say, in the order in which they came.
    """

    def __init__(self) -> None:
        self.event_ids: Growing[str] = Growing("event ids reached the client")
        self.texts: Growing[str] = Growing("messages reached the client")

    async def call(self, session: ClientSession, steps: int) -> None:
        """Call the tool and wait for its result; the SDK resumes by itself when the connection breaks.

        Raises:
            StandstillError: The SDK gave up, or the server answered with an error.
        """
        request = CallToolRequest(params=CallToolRequestParams(name=TOOL, arguments={"steps": steps}))
        try:
            # Not `call_tool`: that one does not tell the event ids.
            result = await session.send_request(
                request,
                CallToolResult,
                metadata=ClientMessageMetadata(on_resumption_token_update=self._on_event_id),
                progress_callback=self._on_progress,
            )
        except MCPError as error:
            reason = f"the call failed: {error}"
            self.texts.end(reason)
            self.event_ids.end(reason)
            raise StandstillError(reason) from error
        content = result.content[0]
        self.texts.add(content.text if isinstance(content, TextContent) else repr(content))
        self.texts.end("the call ended")

    def entries(self) -> list[Entry]:
        """Return the events that the client received."""
        return [
            Entry(event_id, text)
            for event_id, text in zip_longest(self.event_ids.items[1:], self.texts.items, fillvalue="nothing")
        ]

    async def _on_event_id(self, event_id: str) -> None:
        self.event_ids.add(event_id)

    async def _on_progress(self, progress: float, total: float | None, message: str | None) -> None:
        self.texts.add(message or f"{progress} of {total}")
