"""The page itself, with NiceGUI: a process of its own, which only reads.

Invariants:
- Nothing is fetched from elsewhere: scripts and styles are those of the installed packages.
- A browser can change nothing in a cluster: the page has no button but that for light and dark.
- Only pages of this server may read it: requests and sockets from other origins, or for other hosts, are
  refused, so that no web site that is open in the same browser can.
"""

from __future__ import annotations

import importlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from headwater.cli.health import Health
from headwater.errors import ConfigurationError
from headwater.page import charts, markup
from headwater.page.poller import PageState, Poller
from headwater.page.style import STYLE

_EVERY_S = 0.5
_STALE_S = 2.0
"""How old a moment is before the page says so, in seconds."""


def check_library() -> Any:
    """NiceGUI.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        return importlib.import_module("nicegui")
    except ImportError as error:
        raise ConfigurationError(
            "the page needs NiceGUI, which is not installed: install Headwater's extra `page`, as "
            "pip install '.[page]' in a clone"
        ) from error


def serve(poller: Poller, address: str, host: str, port: int, *, ready: Callable[[], None]) -> None:
    """Serve the page until the process is told to end; blocks. `ready` is called once it can be opened."""
    library = check_library()
    os.environ.pop("PYTEST_CURRENT_TEST", None)  # NiceGUI takes whatever pytest starts for a test of its own
    ui, app = library.ui, library.app
    app.add_middleware(OwnPagesOnly, hosts=_hosts(host))
    knock = threading.Thread(target=_once_open, args=(host, port, ready), name="headwater-knock", daemon=True)
    app.on_startup(knock.start)

    @ui.page("/", title="Headwater", response_timeout=30)  # type: ignore[untyped-decorator]
    def main() -> None:
        Page(ui, address).follow(poller)

    ui.run(
        host=host,
        port=port,
        show=False,
        reload=False,
        dark=None,
        title="Headwater",
        favicon="💧",
        show_welcome_message=False,
        reconnect_timeout=10.0,
    )


def _once_open(host: str, port: int, ready: Callable[[], None]) -> None:
    """The server listens a moment after it has begun: call `ready` then."""
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            ready()
            return


def _hosts(host: str) -> set[str]:
    return {host, "localhost", "127.0.0.1", "[::1]"} if host in ("127.0.0.1", "localhost", "::1") else set()


class OwnPagesOnly:
    """ASGI middleware: refuses what does not come from a page of this server.

    Args:
        hosts: names under which it may be reached; empty: any.
    """

    def __init__(self, app: Any, hosts: set[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI says."""
        if scope["type"] in ("http", "websocket") and not self._is_own(dict(scope["headers"])):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await send({"type": "http.response.start", "status": 403, "headers": []})
                await send({"type": "http.response.body", "body": b"only pages of this server may read it\n"})
            return
        await self._app(scope, receive, send)

    def _is_own(self, headers: dict[bytes, bytes]) -> bool:
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        named = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self._hosts and named not in self._hosts:
            return False
        return not origin or origin.partition("://")[2] == host


class Page:
    """What one browser shows; its elements are made once, and changed where something has."""

    def __init__(self, ui: Any, address: str) -> None:
        self._ui = ui
        self._seen: dict[str, Any] = {}
        ui.add_css(STYLE)
        dark = ui.dark_mode(None)
        with ui.element("div").classes("hw"):  # NiceGUI has made the page's main
            self._head(address, dark)
            self._tiles = ui.html("", sanitize=False)
            with ui.element("section").classes("card wide").props('aria-labelledby="waits"'):
                self._title("waits", "Who waits for whom now")
                self._waits = ui.html("", sanitize=False).props('aria-live="polite"')
                self._slowest = ui.html("", sanitize=False)
            with ui.element("div").classes("grid2 charts"):
                self._pace = self._chart("pace", "Steps a second")
                self._metrics = self._chart("metrics", "Logged by the workers, mean over ranks")
                self._exposed = self._chart("exposed", "Exposed time by rank and stage")
                self._staleness = self._chart("staleness", "Steps by staleness, in commits")
            self._workers = self._table("workers", "Workers")
            with ui.element("div").classes("grid2"):
                self._nodes = self._table("nodes", "Servers and coordinator", wide=False)
                self._models = self._table("models", "Models and tables", wide=False)
            with ui.element("section").classes("card wide").props('aria-labelledby="events"'):
                self._title("events", "Events")
                self._events = ui.html("", sanitize=False).props('role="log" aria-live="polite"')

    def _head(self, address: str, dark: Any) -> None:
        ui = self._ui
        with ui.element("header"):
            ui.html("<h1>Headwater</h1>", sanitize=False)
            self._status = ui.html("", sanitize=False).props('role="status"')
            self._about = ui.html("", sanitize=False).classes("about")
            ui.html(f"<span>{markup.escape(address)}</span>", sanitize=False).classes("about push")
            button = ui.element("button").classes("toggle").props('type="button" aria-label="Light or dark"')
            with button:
                ui.html("Light / dark", sanitize=False)
            button.on("click", js_handler="() => Quasar.Dark.toggle()")
        del dark

    def _title(self, name: str, text: str) -> None:
        self._ui.html(f'<h2 id="{name}">{text}</h2>', sanitize=False)

    def _chart(self, name: str, text: str) -> Any:
        with self._ui.element("section").classes("card").props(f'aria-labelledby="{name}"'):
            self._title(name, text)
            return self._ui.echart({}).classes("chart").props(f'role="img" aria-label="{text}"')

    def _table(self, name: str, text: str, wide: bool = True) -> Any:
        kind = "card wide" if wide else "card"
        with self._ui.element("section").classes(kind).props(f'aria-labelledby="{name}"'):
            self._title(name, text)
            with (
                self._ui.element("div")
                .classes("scroll")
                .props(f'tabindex="0" role="region" aria-label="{text}"')
            ):
                return self._ui.html("", sanitize=False)

    def follow(self, poller: Poller) -> None:
        """Show what `poller` has, twice a second, for as long as the browser is there."""
        self.show(poller.shown())
        self._ui.timer(_EVERY_S, lambda: self.show(poller.shown()))

    def show(self, shown: PageState) -> None:
        """Change what is not shown yet."""
        self._text("status", self._status, _status(shown))
        self._text("events", self._events, markup.events(shown))
        moment = shown.moment
        if moment is None or self._seen.get("number") == shown.number:
            return
        self._seen["number"] = shown.number
        self._text("about", self._about, markup.about(moment))
        self._text("tiles", self._tiles, markup.tiles(moment))
        self._text("waits", self._waits, markup.waits(moment))
        slowest = f'<p class="slowest">Waited for most: {markup.escape(moment.slowest)}</p>'
        self._text("slowest", self._slowest, slowest if moment.slowest else "")
        self._text("workers", self._workers, markup.workers(moment))
        self._text("nodes", self._nodes, markup.nodes(moment))
        self._text("models", self._models, markup.models(moment))
        self._options("pace", self._pace, charts.pace(shown.points))
        self._options("metrics", self._metrics, charts.metrics(shown.points))
        self._options("exposed", self._exposed, charts.exposed(moment))
        self._options("staleness", self._staleness, charts.staleness(moment))

    def _text(self, name: str, element: Any, text: str) -> None:
        if self._seen.get(name) != text:
            self._seen[name] = text
            element.set_content(text)

    def _options(self, name: str, chart: Any, options: dict[str, Any]) -> None:
        if self._seen.get(name) != options:
            self._seen[name] = options
            chart.options.clear()
            chart.options.update(options)
            chart.update()


def _status(shown: PageState) -> str:
    """The pill at the top."""
    if shown.moment is None:
        return _pill("warn", f"no answer yet: {shown.error}")
    if shown.error and shown.since > _STALE_S:
        return _pill("bad", f"no answer for {shown.since:.0f} s; below is how it was")
    text = Health.of(shown.moment.statistics).summary()
    kind = "good" if text == "healthy" else "warn" if text.startswith("starting") else "bad"
    return _pill(kind, text)


def _pill(kind: str, text: str) -> str:
    return f'<span class="pill {kind}">{markup.escape(text)}</span>'
