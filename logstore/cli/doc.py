"""`logstore doc`."""

from __future__ import annotations

import sys
from importlib.resources import files

import click


@click.command(
    "doc",
    epilog="\b\nExamples:\n  logstore doc\n  logstore doc operations\n  logstore doc datasette.yaml > datasette.yaml",
)
@click.argument("page", required=False)
def command(page: str | None) -> None:
    """Show a page of the documentation, or list the pages.

    Markdown pages may be named without their `.md`.
    """
    pages = {entry.name: entry for entry in files("logstore").joinpath("docs").iterdir() if entry.is_file()}
    if page is None:
        width = max(map(len, pages))
        for name in sorted(pages):
            click.echo(f"{name:<{width}}  {_title(pages[name].read_text(encoding='utf-8'))}")
        return
    found = pages.get(page) or pages.get(f"{page}.md")
    if found is None:
        names = ", ".join(sorted(name.removesuffix(".md") for name in pages))
        raise click.BadParameter(f"there is no page {page!r}; there are {names}", param_hint="PAGE")
    text = found.read_text(encoding="utf-8")
    if sys.stdout.isatty():
        click.echo_via_pager(text)
    else:
        click.echo(text, nl=False)


def _title(text: str) -> str:
    return text.lstrip().partition("\n")[0].lstrip("# ")
