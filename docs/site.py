"""What the documentation site makes of pages beside Markdown: links to source files, generated tables.

Run by mkdocs (`hooks` in mkdocs.yml); no part of the package.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import headwater
from headwater.cli.app import COMMANDS
from headwater.cluster import NodeConfig
from headwater.spec.cluster import ClusterConfig

_ELSEWHERE = ("initializers", "kvstore")
_DOCS = Path(__file__).parent
_SOURCE = re.compile(r"\[`?([^\]`]+)`?\]\(((?:\.\./)+(?:headwater|examples|tests|deploy)[^)]*)\)")


def on_config(config: Any) -> Any:
    """A page that nobody put into the navigation is at the end of the topics."""
    text = str(config.nav)
    pages = [page.name for page in sorted(_DOCS.glob("*.md")) if f"'{page.name}'" not in text]
    next(part["Topics"] for part in config.nav if "Topics" in part).extend(pages)
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Files of the repository are no part of the site: their names stand there as they are."""
    text = _SOURCE.sub(lambda found: f"`{found.group(2).lstrip('./')}`", markdown)
    text = text.replace("<!-- options -->", options()).replace("<!-- commands -->", commands())
    text = text.replace("<!-- decisions -->", decisions())
    return text.replace("<!-- other names -->", other_names(markdown))


def options() -> str:
    """Every keyword of a cluster, from where it is defined."""
    rows = [
        f"| `{one.name}` | {one.metadata['help']} |"
        for config in (ClusterConfig, NodeConfig)
        for one in dataclasses.fields(config)
    ]
    return "\n".join(["| keyword | meaning |", "|---|---|", *rows])


def commands() -> str:
    """Every command, as `headwater --help` lists them."""
    rows = [f"| `headwater {name}` | {text} |" for name, text in COMMANDS.items()]
    return "\n".join(["| command | does |", "|---|---|", *rows])


def other_names(markdown: str) -> str:
    """A section for each public name that the page has none for."""
    names = [name for name in headwater.__all__ if f"::: headwater.{name}\n" not in f"{markdown}\n"]
    return "\n\n".join(f"::: headwater.{name}" for name in names if name not in _ELSEWHERE)


def decisions() -> str:
    """The titles of all decisions, as links."""
    pages = sorted(_DOCS.glob("decisions/[0-9]*.md"))
    return "\n".join(f"- [{_title(page)}]({page.name})" for page in pages)


def _title(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
