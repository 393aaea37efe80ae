"""The page of a run that is still being written, followed in a browser."""

from __future__ import annotations

import http.server
import json
import threading
from http import HTTPStatus
from typing import Any, cast

from .page import payload, render
from .run import Run

__all__ = ["PageServer", "serve"]

# A page of another site could have its own name point here; it is not answered.
_HOSTS = ("localhost", "127.0.0.1", "[::1]")


class PageServer(http.server.ThreadingHTTPServer):
    """Serves a run's page on this machine alone; what is new is read when asked for.

    Args:
        run: what to follow.
        port: of this machine; 0 takes a free one.
    """

    daemon_threads = True

    def __init__(self, run: Run, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.run = run
        self.version = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def page(self) -> str:
        """The page as the run stands."""
        with self._lock:
            self._refresh()
            return render(self.run, is_live=True)

    def news(self, known: int) -> dict[str, Any]:
        """What the page shows now, if that is newer than the version it knows."""
        with self._lock:
            self._refresh()
            if known == self.version:
                return {"version": self.version}
            return {"version": self.version} | payload(self.run)

    def _refresh(self) -> None:
        if self.run.refresh():
            self.version += 1


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """The page, or its data."""
        server = cast(PageServer, self.server)
        host = self.headers.get("Host", "").rpartition(":")[0]
        path, _, query = self.path.partition("?")
        if host not in _HOSTS:
            self.send_error(HTTPStatus.FORBIDDEN, "Ask for it as localhost.")
        elif path == "/":
            self._send("text/html; charset=utf-8", server.page())
        elif path == "/data.json":
            known = int(query) if query.isdecimal() else -1
            text = json.dumps(server.news(known), allow_nan=False)
            self._send("application/json", text)
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, kind: str, text: str) -> None:
        body = text.encode("utf-8")
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are no news."""


def serve(run: Run, port: int = 0) -> None:
    """Serve a run's page until interrupted."""
    with PageServer(run, port) as server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
